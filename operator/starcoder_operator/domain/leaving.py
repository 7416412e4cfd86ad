"""How far a gang is with leaving its attempt: on purpose, with a checkpoint, and as a whole.

Phase `drain` tells all agents; SIGTERM to any Pod of the gang does the same without the API, since the ranks agree on a
stop flag with each iteration. All save the same iteration and end. Until that checkpoint is in HEAD the next attempt is
not held: `hold` would kill workers that are saving. A Pod that is on its way out is therefore no failure as long as its
agent is heard and has time.
"""

from __future__ import annotations

from dataclasses import dataclass

from starcoder_operator.api.v1alpha1 import Draining, StarCoderRunStatus
from starcoder_trainer.contract.assignment import Assignment
from starcoder_trainer.contract.report import Report

from . import reasons
from .failure import Cause, Failure
from .members import LossKind, MemberView
from .seats import boot_ids
from .snapshot import Snapshot

AT_WORK = frozenset({"starting", "training", "draining"})
"""States of an agent whose workers, or whose uploads, an end by force would cut short."""
MOST_NAMED = 3
"""Pods, in a message."""
OUT = frozenset({"left", "done"})
_FAREWELL = frozenset({"draining", "left", "done"})


@dataclass(frozen=True)
class Leaving:
    """Of the members that an assignment lists, in rank order."""

    asked: bool
    """By phase `drain`, or by a Pod's SIGTERM as a member's report shows."""
    going: tuple[MemberView, ...]
    """Their Pods are on their way out, and their agents still see to the checkpoint."""
    left: tuple[MemberView, ...]
    """Their workers ended well, and their part of the checkpoint is safe; the Pod may be gone since."""
    busy: tuple[MemberView, ...]
    """Not lost and at work, those that are going among them."""
    members: int
    cut_short: str = ""
    """What an agent says that had to give up before the checkpoint was whole."""

    @property
    def complete(self) -> bool:
        return self.members > 0 and len(self.left) == self.members

    @property
    def excused(self) -> frozenset[int]:
        """Members whose loss ends nothing: it is waited for, or what it could cost is safe."""
        return frozenset(m.index for m in (*self.going, *self.left))

    @property
    def iteration(self) -> int:
        """That of the checkpoint with which they left."""
        return max((r.progress.iteration for m in self.left if (r := _lease_report(m)) and r.progress), default=0)

    def __str__(self) -> str:
        return f"the workers take a checkpoint and leave: {len(self.left)} of {self.members} members have left"


def leaving(snapshot: Snapshot, current: Assignment, at_work: tuple[MemberView, ...]) -> Leaving:
    """How the members of the attempt that runs stand.

    Args:
        at_work: the members that `current` lists.
    """
    listed = boot_ids(current)

    def own(member: MemberView) -> Report | None:
        report = _lease_report(member)
        mine = report is not None and (report.attempt, report.boot_id) == (current.attempt, listed[member.index])
        return report if mine else None

    said = [(m, report) for m in at_work if (report := own(m)) is not None]
    left = tuple(m for m, report in said if report.state in OUT)
    going = tuple(m for m, report in said if report.state in AT_WORK and _is_going(snapshot, m, report))
    busy = tuple(m for m, report in said if report.state in AT_WORK and (m.loss is None or m in going))
    return Leaving(
        asked=current.phase == "drain" or any(report.state in ("draining", "left") for _, report in said),
        going=going,
        left=left,
        busy=busy,
        members=len(at_work),
        cut_short=next(
            (p.message for _, r in said if (p := r.problem) is not None and p.reason == reasons.GRACE_EXCEEDED), ""
        ),
    )


def told_to_leave(status: StarCoderRunStatus, because: Failure | None, now: str, why: str = "") -> StarCoderRunStatus:
    """The status that says so. The first reason stands: what is left of a Pod that was evicted does not tell any more
    that it was."""
    if status.draining is not None:
        return status
    known = Draining(since=now, message=why)
    if because is not None:
        known = Draining(
            since=now,
            cause=because.cause,
            pod=because.pod or None,
            node=because.node or None,
            message=because.message,
        )
    return status.model_copy(update={"draining": known})


def reason_to_leave(snapshot: Snapshot, at_work: tuple[MemberView, ...]) -> Failure | None:
    """Why the gang was told to leave, where a Pod was on its way out."""
    known = snapshot.status.draining
    if known is None or known.cause is None:
        return None
    member = next((m.index for m in at_work if m.pod_name == known.pod), at_work[0].index if at_work else 0)
    return Failure(Cause(known.cause), member, known.pod or "", known.node or "", known.message)


def time_left(snapshot: Snapshot) -> float:
    """Seconds for which a gang that was told to leave is still waited for; by our own clock, since a wall clock that is
    set must not cut a checkpoint short."""
    view, grace = snapshot.assignment, float(snapshot.spec.workers.termination_grace_period_seconds)
    return grace - view.phase_for if view is not None and view.assignment.phase == "drain" else grace


def left_unsaved(snapshot: Snapshot, gang: Leaving) -> str:
    """Why iterations are trained again: its time is up, and the gang has not left."""
    grace = snapshot.spec.workers.termination_grace_period_seconds
    reports = [r for m in gang.busy if (r := _lease_report(m)) is not None]
    hindrance = next((r.problem.message for r in reports if r.problem is not None), "")
    slow = [m.pod_name for m in gang.busy][:MOST_NAMED]
    why = hindrance or f"{', '.join(slow)} still save or upload" if slow else "members are gone"
    newest = snapshot.status.checkpoint
    then = "goes on from the newest verified checkpoint" if newest else "starts over, since no checkpoint is verified"
    return (
        f"the gang was to leave with a checkpoint within {grace} s (workers.terminationGracePeriodSeconds), and "
        f"{len(gang.left)} of {gang.members} members have: {why}; training {then}"
        + (f", iteration {newest.iteration}" if newest else "")
    )


def _lease_report(member: MemberView) -> Report | None:
    """Also of an agent whose Pod is gone."""
    return member.lease.report if member.lease else None


def _is_going(snapshot: Snapshot, member: MemberView, report: Report) -> bool:
    pod, loss, node = member.pod, member.loss, snapshot.nodes.get(member.node)
    # Its worker container has ended well where the agent still uploads.
    if pod is None or loss is None or member.stale or pod.phase not in ("Running", "Succeeded"):
        return False
    if pod.deleting and pod.deleting_for >= pod.grace:
        return False
    if loss.kind in (LossKind.DISRUPTED, LossKind.DELETED):
        return True
    # A node that is tainted still works; one that shuts down in order is NotReady while its Pods end.
    if loss.kind is not LossKind.NODE or node is None:
        return False
    return node.ready is True or (node.ready is False and report.state in _FAREWELL)
