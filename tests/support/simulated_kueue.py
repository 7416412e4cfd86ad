"""Kueue's groups of plain Pods as its documentation and source describe them: gates, quota, counts, finalizers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.support.simulated_cluster import Pod, SimulatedCluster


@dataclass
class SimulatedKueue:
    quota: int = 1000
    """Pods that may be admitted at the same time."""
    admitted: dict[str, int] = field(default_factory=dict)
    """Group to its size: admitted whole, and so counted until it is finished."""
    excess: list[str] = field(default_factory=list)
    """Pods that were deleted because their group had them twice."""

    def reconcile(self, cluster: SimulatedCluster) -> None:
        for name in sorted({p.view.scheduling_group for p in cluster.pods.values() if p.view.scheduling_group}):
            self._group(cluster, name)

    def _group(self, cluster: SimulatedCluster, name: str) -> None:
        pods = [p for p in cluster.pods.values() if p.view.scheduling_group == name]
        sizes = {p.view.group_size for p in pods}
        assert len(sizes) == 1, f"Pods of {name} differ in their total count: {sizes}"
        (size,) = sizes
        active = [p for p in pods if _is_active(p)]
        for pod in sorted(active, key=lambda p: (p.view.gated, p.created, p.view.incarnation))[size:]:
            self.excess.append(pod.view.name)
            active.remove(pod)
            cluster.delete_pod(pod.view.name)
        if all(p.view.phase in ("Succeeded", "Failed") for p in pods):
            # none of its Pods is retriable: finished with the last of them
            self.admitted.pop(name, None)
            self._finalize(cluster, pods)
            return
        if name not in self.admitted:
            if len(active) < size or sum(self.admitted.values()) + size > self.quota:
                return
            self.admitted[name] = size
        for pod in active:
            pod.view = replace(pod.view, gated=False)
        ended = [p for p in pods if p.view.phase == "Failed"]
        self._finalize(cluster, ended[: max(0, len(ended) + len(active) - size)])

    @staticmethod
    def _finalize(cluster: SimulatedCluster, pods: list[Pod]) -> None:
        for pod in pods:
            if pod.view.deleting:
                cluster.pods.pop(pod.view.name, None)


def _is_active(pod: Pod) -> bool:
    return pod.view.phase != "Failed" and bool(pod.view.node or not pod.view.deleting)
