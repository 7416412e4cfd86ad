"""The modules that touch the world: the Kubernetes API, the clock, logs and metrics."""
