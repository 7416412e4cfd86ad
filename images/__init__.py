"""The project's images, built from their Containerfiles without a Docker daemon (docs/adr/0010)."""
