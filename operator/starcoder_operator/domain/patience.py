"""What waiting does to a decision: how long a cause, a gang that leaves and a run that fails again are waited for."""

from __future__ import annotations

from dataclasses import replace

from starcoder_operator.api.v1alpha1 import StarCoderRunStatus

from . import backoff, failure, network
from .attempt_time import awaiting_since
from .formation import AwaitCause, BackOff, Decision, Ended, Go, Hold, Leave, held, next_attempt
from .hearing import Limits
from .leaving import leaving, left_unsaved, time_left
from .members import MemberView
from .seats import taking_part
from .snapshot import Snapshot, own_assignment
from .timestamps import seconds_between

AWAIT_CAUSE = 3.0
"""Seconds for which a lost connection waits for its cause. One that shows later still replaces it in the count."""
AWAIT_LAST_CAUSE = 60.0
"""The same where counting it would make the run fail: longer than a dead node takes to be NotReady (50 s)."""


def over(
    snapshot: Snapshot, status: StarCoderRunStatus, members: tuple[MemberView, ...], decision: Decision, limits: Limits
) -> Decision:
    """The decision, or what comes of it now that the time is up; a new attempt that has to wait waits.

    A lost connection whose cause has not shown in time is put down to the network where that is cut, else counted as
    what it is. A gang that does not leave in time is
    ended.
    """
    match decision:
        case AwaitCause(found, signs) if left(snapshot, status) <= 0:
            apart = network.cut(snapshot, members, limits) if found.cause in failure.OF_PEERS else None
            return Ended(apart or found, signs)
        case Leave() if time_left(snapshot) <= 0:
            return _left_behind(snapshot, members, decision)
        case Go():
            return _backed_off(snapshot, status, decision)
    return decision


def left(snapshot: Snapshot, status: StarCoderRunStatus) -> float:
    """Seconds for which the cause of a lost connection is still waited for."""
    since = awaiting_since(snapshot)
    waited = seconds_between(since, snapshot.now) if since else 0.0
    limit = snapshot.spec.failure_policy.max_restarts_without_progress
    return (AWAIT_LAST_CAUSE if status.restarts_without_progress >= limit else AWAIT_CAUSE) - waited


def _left_behind(snapshot: Snapshot, members: tuple[MemberView, ...], decision: Leave) -> Ended | Hold:
    current = own_assignment(snapshot)
    assert current is not None
    why = left_unsaved(snapshot, leaving(snapshot, current, taking_part(current, members)))
    if decision.because is not None:
        return Ended(replace(decision.because, message=f"{decision.because.message}; {why}"))
    return Hold(held(snapshot, members, next_attempt(snapshot)), why, unsaved=True)


def _backed_off(snapshot: Snapshot, status: StarCoderRunStatus, decision: Go) -> Go | BackOff:
    """An attempt that could run now waits where too many before it have failed."""
    moment = backoff.until(snapshot.spec.failure_policy.backoff, snapshot.uid, status, snapshot.now)
    if moment is None:
        return decision
    count, allowed = backoff.repeats(status) + 1, "any number is"
    if status.last_failure is not None and failure.was_charged(status.last_failure):
        allowed = f"{snapshot.spec.failure_policy.max_restarts_without_progress} are"
    why = f"{count} failures without a newer verified checkpoint ({allowed} allowed): tries again at {moment}"
    return BackOff(moment, why)
