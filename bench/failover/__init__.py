"""How long a run trains nothing after a fault, and how much it trains again; beside it a plain Job under torchrun."""
