"""One node that does not reach S3 while the others do: another member leads, and the node is avoided.

Only the leader asks S3 while the gang holds, so nobody knows whether the fault is the service's or that of one node.
After a while the next member tries, and so on in turn: where S3 is away for all, that does no harm. An attempt that
runs tells more: its leader has just claimed HEAD, so S3 is there.
"""

from __future__ import annotations

from collections.abc import Iterable

from starcoder_trainer.contract.assignment import Member

from .avoidance import WINDOW
from .elasticity import pool_size
from .failure import Cause, Failure
from .members import MemberView
from .snapshot import Snapshot, own_assignment
from .timestamps import is_before, seconds_between

PATIENCE = 60.0
"""Seconds for which a member of a held attempt may be without S3: most outages are over sooner, and each change of the
leader is another attempt."""


def next_leader(snapshot: Snapshot, members: tuple[MemberView, ...]) -> MemberView | None:
    """Who is to lead the next attempt instead of this one; None while the leader is to go on, or nobody else can."""
    current = own_assignment(snapshot)
    if current is None or current.phase != "hold":
        return None
    leader = members[current.leader.index]
    said = leader.report
    if said is None or said.attempt != current.attempt or said.offer is not None or _left(snapshot, leader) != 0.0:
        return None
    others = [m for m in members[: pool_size(snapshot.spec)] if m.index != leader.index and m.fit]
    return min(others, key=lambda m: (m.index < leader.index, m.index), default=None)


def led_by(leader: int, places: Iterable[Member]) -> list[Member]:
    """The places with `leader` in the first; who had it takes the leader's, or stands by where that had none."""
    places = list(places)
    first = places[0]
    return [Member(leader), *(first if place.index == leader else place for place in places[1:])]


def is_passed_over(snapshot: Snapshot, members: tuple[MemberView, ...], member: MemberView) -> bool:
    """A held attempt waits no longer for this member to reach S3: the leader has, and what an upload of an attempt that
    is over tells is nobody's concern. Where the member's node is at fault, its workers will show it."""
    current = own_assignment(snapshot)
    leader = members[current.leader.index].report if current is not None else None
    if current is None or leader is None or leader.attempt != current.attempt or leader.offer is None:
        return False
    return _left(snapshot, member) == 0.0


def until_next(snapshot: Snapshot, members: tuple[MemberView, ...]) -> float | None:
    """Seconds until a held attempt waits for a member no longer; None where that is not to come."""
    current = own_assignment(snapshot)
    if current is None or current.phase != "hold":
        return None
    left = (_left(snapshot, members[place.index]) for place in current.members if place.index < len(members))
    return min((seconds for seconds in left if seconds), default=None)


def is_of_the_node(snapshot: Snapshot, members: tuple[MemberView, ...], found: Failure, where: tuple[str, ...]) -> bool:
    """Two attempts in a row ended because workers on this node alone could not read from S3, and it is not that of the
    leader, who could. Nothing was verified between, and the member has not been moved for it already: then it is what
    its ranks read, and not where.

    Args:
        snapshot: its status is as it was before.
        found: what ended this attempt.
        where: all nodes on which the same was seen.
    """
    current, status = own_assignment(snapshot), snapshot.status
    last, newest = status.last_failure, status.checkpoint
    if found.cause is not Cause.STORAGE or where != (found.node,) or current is None or last is None:
        return False
    leader = members[current.leader.index].node
    again = last.cause == Cause.STORAGE and last.nodes == where and seconds_between(last.at, snapshot.now) < WINDOW
    passed = newest is not None and is_before(last.at, newest.committed_at)
    moved = any(entry.reason == reason(found.member) for entry in status.avoided_nodes)
    return again and not passed and not moved and leader not in ("", found.node)


def reason(member: int) -> str:
    """Why its node is avoided."""
    return f"workers of member {member} could not read from S3 twice in a row, and the leader elsewhere could"


def _left(snapshot: Snapshot, member: MemberView) -> float | None:
    """Seconds for which the attempt waits for S3 to be reached from there; None where that is not its problem."""
    report, lease = member.report, member.lease
    if report is None or lease is None or report.problem is None or report.problem.reason != "StorageUnreachable":
        return None
    held_for = snapshot.assignment.phase_for if snapshot.assignment is not None else 0.0
    return max(0.0, PATIENCE - min(lease.troubled_for, held_for))
