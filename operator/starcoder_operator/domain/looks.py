"""When a run is to be looked at again though nothing has been heard of it: only what time alone can change."""

from __future__ import annotations

from . import avoidance, sizing, storage_reach
from .formation import AwaitCause, BackOff, Decision, Drain, Ended, Go, Hold, Leave, Stay, Unclear
from .hearing import Limits
from .members import NODE_INDEX_LAG, MemberView
from .placement import Placement
from .snapshot import Snapshot, is_held
from .timestamps import seconds_between

WATCH_PROGRESS, WATCH_PROGRESS_LARGE, LARGE = 5.0, 12.0, 64
"""Seconds between looks at a gang that trains; from LARGE members on the longer ones."""
LOOK_AT_SERVER = 30.0
"""Seconds between looks at what nobody watches: whether the server has PodGroups now."""
LOOK_AT_SILENT = 5.0
LOOK_AT_UNKNOWN = 1.0
"""Seconds between looks at an agent whose node's kubelet is silent."""
LOOK_AT_SUSPECT = 1.0
"""Longest time between looks at a suspect that renews its Lease, or at a suspicion that may be an old one."""
LOOK_AT_LEAVING = 5.0
"""Seconds between looks at a gang that leaves: whether its time is up."""
LOOK_AT_AVOIDED = 15.0
"""Seconds between looks at nodes that a waiting Pod avoids."""


def look_again(
    snapshot: Snapshot,
    members: tuple[MemberView, ...],
    decision: Decision,
    placement: Placement,
    *,
    limits: Limits,
    patience: float,
) -> float | None:
    """Seconds from now; None where only an event can change anything.

    Args:
        patience: seconds for which the cause of a lost connection is still waited for.
    """
    looks: list[float] = [] if placement.look_again is None else [placement.look_again]
    ages = [m.lease.age for m in members if m.live and m.lease is not None]
    if ages:
        looks.append(max(0.5, limits.stale - max(ages) + 0.1))
    if any(m.suspect and m.live for m in members):
        looks.append(_until_judged(members, limits))
    if any(x.report and x.report.suspects and not x.witnessed and x.age < limits.stale for x in snapshot.leases):
        looks.append(LOOK_AT_SUSPECT)
    if ages and any(m.live and _is_unknown(snapshot, m.node) for m in members):
        looks.append(LOOK_AT_UNKNOWN)
    if isinstance(decision, Go | Stay) and not (is_held(snapshot) and isinstance(decision, Stay)):
        looks.append(WATCH_PROGRESS if len(members) < LARGE else WATCH_PROGRESS_LARGE)
    if isinstance(decision, AwaitCause):
        looks.append(max(0.1, patience))
    if isinstance(decision, Unclear):
        looks.append(LOOK_AT_SILENT)
    if isinstance(decision, BackOff):
        looks.append(max(0.1, seconds_between(snapshot.now, decision.until)))
    if isinstance(decision, Ended | Hold) or is_held(snapshot):
        left = sizing.look_again(snapshot, members)
        looks += [] if left is None else [left]
    if isinstance(decision, Drain | Leave):
        looks.append(LOOK_AT_LEAVING)
    if placement.missing and not snapshot.gang_api:
        looks.append(LOOK_AT_SERVER)
    if any(p.avoided_nodes and not p.scheduled for p in snapshot.pods):
        looks.append(LOOK_AT_AVOIDED)
    if (left := avoidance.until_unanswered(members)) is not None:
        looks.append(left + 0.1)
    if (left := storage_reach.until_next(snapshot, members)) is not None:
        looks.append(left + 0.1)
    unseen = [p.age for p in snapshot.pods if p.node and p.node not in snapshot.nodes and p.age < NODE_INDEX_LAG]
    if unseen and snapshot.nodes:
        looks.append(NODE_INDEX_LAG - max(unseen) + 0.1)
    return min(looks, default=None)


def _is_unknown(snapshot: Snapshot, node: str) -> bool:
    return node in snapshot.nodes and snapshot.nodes[node].ready is None


def _until_judged(members: tuple[MemberView, ...], limits: Limits) -> float:
    """Seconds until the first suspect is lost, unless it renews its Lease."""
    left = [limits.of_suspect(m.lease) - m.lease.renewed for m in members if m.suspect and m.live and m.lease]
    return min(LOOK_AT_SUSPECT, max(0.1, min(left) + 0.05))
