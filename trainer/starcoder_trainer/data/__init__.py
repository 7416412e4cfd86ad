"""What the model is trained on: token files, the order of samples, fill-in-the-middle, and how data is prepared."""
