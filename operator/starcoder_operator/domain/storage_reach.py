"""One node that does not reach S3 while the others do: another member leads, and the node is avoided.

Only the leader asks S3 while the gang holds, so nobody knows whether the fault is the service's or that of one node.
After a while the next member tries, and so on in turn: where S3 is away for all, that does no harm. An attempt that
runs tells more: its leader has just claimed HEAD, so S3 is there.
"""

from __future__ import annotations

from collections.abc import Iterable

from starcoder_operator.api.v1alpha1 import LastFailure
from starcoder_trainer.contract.assignment import Member

from .elasticity import pool_size
from .failure import Cause, Failure
from .members import MemberView
from .snapshot import Snapshot

LEADER_PATIENCE = 60.0
"""Seconds for which a leader may be without S3: most outages are over sooner, and each change is another attempt."""


def next_leader(snapshot: Snapshot, members: tuple[MemberView, ...]) -> MemberView | None:
    """Who is to lead the next attempt instead of this one; None while the leader is to go on, or nobody else can."""
    if until_next(snapshot, members) != 0.0:
        return None
    assert snapshot.assignment is not None
    leader = snapshot.assignment.assignment.leader.index
    return min(_others(snapshot, members), key=lambda m: (m.index < leader, m.index))


def until_next(snapshot: Snapshot, members: tuple[MemberView, ...]) -> float | None:
    """Seconds until another member tries; None where that is not to come."""
    view = snapshot.assignment
    if view is None or view.assignment.phase != "hold" or not _others(snapshot, members):
        return None
    report = members[view.assignment.leader.index].report
    if report is None or report.attempt != view.assignment.attempt or report.offer is not None:
        return None
    if report.problem is None or report.problem.reason != "StorageUnreachable":
        return None
    return max(0.0, LEADER_PATIENCE - view.phase_for)


def led_by(leader: int, places: Iterable[Member]) -> list[Member]:
    """The places with `leader` in the first; who had it takes the leader's, or stands by where that had none."""
    places = list(places)
    first = places[0]
    return [Member(leader), *(first if place.index == leader else place for place in places[1:])]


def is_of_the_node(
    last: LastFailure | None,
    found: Failure,
    signs: Iterable[Failure],
    snapshot: Snapshot,
    members: tuple[MemberView, ...],
) -> bool:
    """Two attempts in a row ended because workers on this node alone could not read from S3, and it is not that of the
    leader, who could.

    Args:
        last: the failure before, as the status has it.
        found: what ended this attempt.
        signs: all that members showed of it.
    """
    if found.cause is not Cause.STORAGE or not found.node or snapshot.assignment is None:
        return False
    leader = members[snapshot.assignment.assignment.leader.index]
    where = {found.node} | {s.node for s in signs if s.cause is Cause.STORAGE}
    again = last is not None and last.cause == Cause.STORAGE and last.node == found.node
    return again and where == {found.node} and bool(leader.node) and leader.node != found.node


def _others(snapshot: Snapshot, members: tuple[MemberView, ...]) -> list[MemberView]:
    """Members that could lead, whether they take part or stand by."""
    assert snapshot.assignment is not None
    leader = snapshot.assignment.assignment.leader.index
    return [m for m in members[: pool_size(snapshot.spec)] if m.index != leader and m.fit]
