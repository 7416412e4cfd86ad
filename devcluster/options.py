"""What a cluster may be asked to be."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from .addresses import MAX_NODES

NodeMonitor = Literal["stock", "fast"]
NODE_MONITORS: tuple[str, ...] = get_args(NodeMonitor)


@dataclass(frozen=True)
class Options:
    """Raises ValueError, naming field, value and range."""

    nodes: int = 3
    gpus_per_node: int = 2
    node_monitor: NodeMonitor = "stock"
    """stock: a silent node is lost after 40 to 50 s, as in most clusters; fast: after 5 s."""
    gangs: bool = True
    """Feature gate GenericWorkload with scheduling.k8s.io/v1beta1: Kubernetes' own PodGroup."""

    def __post_init__(self) -> None:
        if not 0 <= self.nodes <= MAX_NODES:
            raise ValueError(f"nodes: found {self.nodes}, expected 0 to {MAX_NODES}")
        if self.gpus_per_node < 0:
            raise ValueError(f"gpus_per_node: found {self.gpus_per_node}, expected 0 or more")
        if self.node_monitor not in NODE_MONITORS:
            raise ValueError(f"node_monitor: found {self.node_monitor!r}, expected {' or '.join(NODE_MONITORS)}")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Options:
        return cls(**json.loads(text))
