"""Nodes as the watch shows them, and which runs have Pods there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from starcoder_operator.domain.snapshot import NodeView

from .kinds import Manifest

RunKey = tuple[str, str]
"""(namespace, name) of a StarCoderRun."""


def node_view(node: Manifest, fault_conditions: Collection[str] = ()) -> NodeView:
    """A Node's facts that decide whether a gang may stay there.

    Args:
        fault_conditions: types of conditions that tell of a broken device where they are True.
    """
    spec, status = node.get("spec") or {}, node.get("status") or {}
    conditions: list[Manifest] = status.get("conditions") or []
    ready = str(next((c.get("status") for c in conditions if c.get("type") == "Ready"), "Unknown"))
    faults = [c for c in conditions if c.get("type") in fault_conditions and c.get("status") == "True"]
    return NodeView(
        name=node["metadata"]["name"],
        ready={"True": True, "False": False}.get(ready),
        unschedulable=bool(spec.get("unschedulable")),
        noexecute_taints=tuple(
            sorted(str(t.get("key")) for t in spec.get("taints") or [] if t.get("effect") == "NoExecute")
        ),
        labels=dict(node["metadata"].get("labels") or {}),
        faults=tuple(sorted(_said(c) for c in faults)),
        extended={
            name: int(amount)
            for name, amount in (status.get("allocatable") or {}).items()
            if "/" in name and str(amount).isdecimal()
        },
    )


def _said(condition: Manifest) -> str:
    return ": ".join(filter(None, (str(condition["type"]), str(condition.get("message") or ""))))


class NodeCache:
    """Fed by the watch of Nodes and Pods; holds views, not bodies.

    A Node that is not here may still exist (the watch may be behind): ask the API server before taking it for gone.
    """

    def __init__(self, fault_conditions: Collection[str] = ()) -> None:
        """`fault_conditions`: as in `node_view`."""
        self._fault_conditions = frozenset(fault_conditions)
        self._views: dict[str, NodeView] = {}
        self._complete = False
        self._pods: dict[str, dict[str, RunKey]] = defaultdict(dict)
        """Node -> uid of Pod -> run."""
        self._node_of: dict[str, str] = {}

    def node_seen(self, node: Manifest) -> bool:
        """Whether anything of importance changed."""
        view = self.view(node)
        changed = self._views.get(view.name) != view
        self._views[view.name] = view
        return changed

    def view(self, node: Manifest) -> NodeView:
        return node_view(node, self._fault_conditions)

    def node_gone(self, name: str) -> None:
        self._views.pop(name, None)

    def pod_seen(self, uid: str, node: str, run: RunKey) -> None:
        if node and self._node_of.get(uid) != node:
            self._node_of[uid] = node
            self._pods[node][uid] = run

    def pod_gone(self, uid: str) -> None:
        node = self._node_of.pop(uid, None)
        if node is not None:
            self._pods[node].pop(uid, None)
            if not self._pods[node]:
                del self._pods[node]

    def forget_nodes(self) -> None:
        """Before all Nodes are listed anew: a Node that went while nobody watched is told by no event."""
        self._views.clear()
        self._complete = False

    def all_listed(self) -> None:
        """The list has come to its end."""
        self._complete = True

    @property
    def complete(self) -> bool:
        """All Nodes are here, as far as the watch has told."""
        return self._complete

    def all(self) -> dict[str, NodeView]:
        return dict(self._views)

    def runs_on(self, node: str) -> set[RunKey]:
        return set(self._pods[node].values()) if node in self._pods else set()
