"""Nodes that a run keeps away from because it failed there again and again, and how they are forgiven.

What is lost or has a broken device now is avoided as long as it is so (`placement`). This is about nodes that look well
and are not: two failures that blame a node (`failure.Rule.blames_node`) within an hour are enough, or a Pod that does
not come up there. The memory is the status: `nodeFailures` and `avoidedNodes`.

A run is never kept waiting by its own caution: where the nodes that are left have no room for its replicas, the node
that was avoided first is used again.
"""

from __future__ import annotations

from collections.abc import Iterable

from starcoder_operator.api.v1alpha1 import StarCoderRunStatus
from starcoder_operator.api.v1alpha1.status import AvoidedNode, NodeFailure

from . import reasons
from .failure import Failure
from .members import MemberView, device_trouble, node_trouble
from .plan import EmitEvent
from .snapshot import PodView, Snapshot
from .timestamps import after, is_before, seconds_between

ENOUGH = 2
"""Failures after which a node is avoided, within WINDOW."""
WINDOW = 3600.0
"""Seconds."""
MOST_REMEMBERED = 64
"""Failures that the status keeps."""
NO_ANSWER = 900.0
"""Seconds for which a Pod may have a node and no word of its agent, where others of its kind have answered: a large
image takes minutes, a node whose network or GPU runtime is broken takes for ever."""
FORGIVE_AFTER = 20.0
"""Seconds for which a Pod finds no place before a node that it avoids is tried again: time for an autoscaler to begin
and for the scheduler to have looked more than once. Where it is plain that no node is left, nothing is waited for."""


def avoided(status: StarCoderRunStatus) -> frozenset[str]:
    return frozenset(a.node for a in status.avoided_nodes)


def noted(status: StarCoderRunStatus, failures: Iterable[Failure], *, ttl: int, now: str) -> StarCoderRunStatus:
    """The status with the failures that blame nodes remembered, and the nodes that had enough of them avoided.

    Args:
        ttl: seconds for which a node is avoided; 0: none ever is.
    """
    blamed = {f.node: f for f in failures if f.rule.blames_node and f.node}
    if not blamed or not ttl:
        return status
    recent = [f for f in status.node_failures if seconds_between(f.at, now) < WINDOW]
    recent += [NodeFailure(node=node, cause=f.cause, at=now) for node, f in blamed.items()]
    status = status.model_copy(update={"node_failures": tuple(recent[-MOST_REMEMBERED:])})
    for node in blamed:
        causes = [f.cause for f in status.node_failures if f.node == node]
        if len(causes) >= ENOUGH:
            why = f"{len(causes)} failures within an hour: {', '.join(causes)}"
            status = kept_away_from(status, node, len(causes), why, ttl=ttl, now=now)
    return status


def kept_away_from(
    status: StarCoderRunStatus, node: str, failures: int, reason: str, *, ttl: int, now: str
) -> StarCoderRunStatus:
    """The status with that node avoided for `ttl` seconds from now; one that is avoided already begins anew."""
    if not ttl or not node:
        return status
    others = [a for a in status.avoided_nodes if a.node != node]
    entry = AvoidedNode(node=node, failures=failures, reason=reason, since=now, until=after(now, ttl))
    return status.model_copy(update={"avoided_nodes": (*others, entry)})


def unanswered(snapshot: Snapshot, members: tuple[MemberView, ...], status: StarCoderRunStatus) -> StarCoderRunStatus:
    """The status with the nodes avoided on which a Pod does not come up, where others have room for it."""
    ttl, names = snapshot.spec.failure_policy.node_avoidance.ttl.seconds, avoided(status)
    for pod in _silent_from_the_start(members):
        if pod.scheduled_for < NO_ANSWER or pod.node in names:
            continue
        if _room_without(snapshot, names | {pod.node}):
            why = f"Pod {pod.name} has been there for {NO_ANSWER / 60:.0f} min and its agent has not answered"
            status = kept_away_from(status, pod.node, 1, why, ttl=ttl, now=snapshot.now)
            names = avoided(status)
    return status


def until_unanswered(members: tuple[MemberView, ...]) -> float | None:
    """Seconds until the next Pod has been silent for long enough."""
    left = (NO_ANSWER - pod.scheduled_for for pod in _silent_from_the_start(members))
    return min((seconds for seconds in left if seconds > 0), default=None)


def _silent_from_the_start(members: tuple[MemberView, ...]) -> list[PodView]:
    """Pods with a node and without a word of their agent, though one of the same template has come up elsewhere."""
    up = {(m.pod.template, m.pod.node) for m in members if m.pod is not None and m.report is not None}
    return [
        m.pod for m in members
        if m.pod is not None and m.pod.scheduled and m.loss is None and m.report is None
        and any(template == m.pod.template and node != m.pod.node for template, node in up)
    ]  # fmt: skip


def forgiven(
    snapshot: Snapshot, members: tuple[MemberView, ...], status: StarCoderRunStatus
) -> tuple[StarCoderRunStatus, tuple[EmitEvent, ...]]:
    """The status without the nodes whose time is over, and without those that the run can't do without."""
    kept = [a for a in status.avoided_nodes if is_before(snapshot.now, a.until)]
    events = [
        EmitEvent("Normal", reasons.NODE_FORGIVEN, f"{a.node} is used again: it was avoided long enough")
        for a in status.avoided_nodes if a not in kept
    ]  # fmt: skip
    while needed := _needed(snapshot, kept):
        kept.remove(needed)
        events.append(_no_room(needed, f"the other nodes have no room for {snapshot.spec.workers.replicas} Pods"))
    if kept and _waits_in_vain(members, _replicas(snapshot)):
        oldest = _oldest(kept)
        kept.remove(oldest)
        events.append(_no_room(oldest, "Pods that avoid it find no place"))
    if len(kept) == len(status.avoided_nodes):
        return status, ()
    return status.model_copy(update={"avoided_nodes": tuple(kept)}), tuple(events)


def _no_room(entry: AvoidedNode, why: str) -> EmitEvent:
    return EmitEvent("Warning", reasons.NODE_FORGIVEN, f"{entry.node} is used in spite of {entry.reason}: {why}")


def _oldest(entries: list[AvoidedNode]) -> AvoidedNode:
    return min(entries, key=lambda a: (a.since, a.node))


def _needed(snapshot: Snapshot, entries: list[AvoidedNode]) -> AvoidedNode | None:
    """The oldest of those without which the run has no room, as far as the nodes' GPUs tell. While nodes are still
    being listed there is nothing to be told from them."""
    helpful = [a for a in entries if places(snapshot, a.node)]
    if not snapshot.nodes_complete or not helpful or _room_without(snapshot, frozenset(a.node for a in entries)):
        return None
    return _oldest(helpful)


def _room_without(snapshot: Snapshot, names: frozenset[str]) -> bool:
    """The other nodes have room for the run's replicas, as far as their GPUs tell."""
    return sum(places(snapshot, n) for n in snapshot.nodes if n not in names) >= _replicas(snapshot)


def _replicas(snapshot: Snapshot) -> int:
    return snapshot.spec.workers.replicas


def places(snapshot: Snapshot, name: str) -> int:
    """Pods of this run that the node could hold at most: what others hold there is not known."""
    node, workers = snapshot.nodes.get(name), snapshot.spec.workers
    if node is None or node.unschedulable or device_trouble(name, snapshot.nodes):
        return 0
    if node_trouble(name, snapshot.nodes, workers.tolerations) is not None:
        return 0
    return node.extended.get(workers.gpu_resource, 0) // workers.gpus_per_worker


def _waits_in_vain(members: tuple[MemberView, ...], replicas: int) -> bool:
    """A Pod that avoids nodes has been told for a while that there is no room for it, and the run has too few: a spare
    is not worth a node that has failed."""
    if sum(m.pod is not None and m.loss is None and m.pod.scheduled for m in members) >= replicas:
        return False
    waiting = [m.pod for m in members if m.pod is not None and m.loss is None and not m.pod.scheduled]
    return any(pod.avoided_nodes and pod.unschedulable_message and pod.age >= FORGIVE_AFTER for pod in waiting) and all(
        pod.age >= FORGIVE_AFTER for pod in waiting
    )
