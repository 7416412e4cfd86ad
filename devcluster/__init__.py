"""A real Kubernetes on one Linux machine: etcd, control plane, and nodes that are namespaces (docs/adr/0009)."""
