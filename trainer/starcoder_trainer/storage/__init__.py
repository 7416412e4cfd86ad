"""Object storage: S3, and a local folder for training without Kubernetes."""
