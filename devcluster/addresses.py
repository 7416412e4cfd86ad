"""Names and addresses of a cluster: all derived from its name and a node's number.

Addresses are the same in every cluster: they exist only inside its network namespaces (198.18.0.0/15 is the block that
RFC 2544 keeps for laboratories, so it hides no real host from a Pod).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

CONTROL_PLANE = "198.18.0.1"
NODES_PREFIX = 24
PODS = "198.18.16.0/20"
SERVICES = "198.19.0.0/20"
FIRST_SERVICE = "198.19.0.1"
"""ClusterIP of the Service `kubernetes`."""
API_PORT = 6443
S3_PORT = 7070
DNS_READY_PORT = 8181
MAX_NODES = 15
"""PODS holds a /24 for each."""

NAME = re.compile(r"[a-z][a-z0-9-]{0,29}")


def control_plane_netns(cluster: str) -> str:
    return f"{cluster}-cp"


def is_netns_of(cluster: str, netns: str) -> bool:
    return re.fullmatch(rf"{re.escape(cluster)}-(cp|n\d+)", netns) is not None


@dataclass(frozen=True)
class NodeAddress:
    """What node number `index` (from 1) of a cluster is called and where it lives."""

    cluster: str
    index: int

    @property
    def name(self) -> str:
        return f"n{self.index}"

    @property
    def netns(self) -> str:
        return f"{self.cluster}-{self.name}"

    @property
    def cgroup(self) -> str:
        return f"{self.cluster}-{self.name}"

    @property
    def veth(self) -> str:
        """Its end in the control plane's namespace."""
        return f"veth-{self.name}"

    @property
    def ip(self) -> str:
        return f"198.18.0.{10 + self.index}"

    @property
    def pods(self) -> str:
        return f"198.18.{16 + self.index}.0/24"


def nodes(cluster: str, count: int) -> tuple[NodeAddress, ...]:
    return tuple(NodeAddress(cluster, i) for i in range(1, count + 1))
