"""How long a run that fails again and again waits before its next attempt, so that a crash loop burns neither S3 nor
GPUs of others.

All it needs is in the status, so the wait goes on where another operator takes over. The jitter is drawn by the run's
uid and the number of its failure: many runs that one fault stopped don't come back as one, and each pass finds the same
moment.
"""

from __future__ import annotations

import hashlib
import itertools

from starcoder_operator.api.v1alpha1 import StarCoderRunStatus
from starcoder_operator.api.v1alpha1.failure_policy import Backoff

from .failure import Cause, was_charged
from .timestamps import after, is_before, seconds_between

MOST_DOUBLINGS = 30
MET_AGAIN = frozenset({Cause.STORAGE, Cause.DATA_STALL, Cause.NETWORK_CUT})
"""Charged to nobody, and met again by every attempt until somebody mends it."""


def delay(policy: Backoff, uid: str, status: StarCoderRunStatus) -> float:
    """Seconds between the last failure and the attempt after it; 0 where it is the first one, or came of a loss."""
    before = repeats(status)
    if before < 1:
        return 0.0
    doubled: int = policy.initial.seconds << min(before - 1, MOST_DOUBLINGS)
    longest = min(policy.max.seconds, doubled)
    return longest * (1 + _draw(uid, status.restarts.total)) / 2


def repeats(status: StarCoderRunStatus) -> int:
    """Failures before the last one that it repeats, since the newest verified checkpoint.

    What S3 and the network do is charged to nobody. But an object that was deleted fails every attempt that comes to
    it, and each trains the same iterations again; and where the network is cut none forms.
    """
    last = status.last_failure
    if last is not None and was_charged(last):
        return max(0, status.restarts_without_progress - 1)
    if last is None or last.cause not in MET_AGAIN:
        return 0
    start = status.checkpoint.iteration if status.checkpoint else 0
    same = (r.cause in MET_AGAIN and (r.resumed_at or 0) == start for r in reversed(status.recoveries[:-1]))
    return sum(1 for _ in itertools.takewhile(bool, same))


def until(policy: Backoff, uid: str, status: StarCoderRunStatus, now: str) -> str | None:
    """When the next attempt may run, RFC 3339; None where nothing is waited for."""
    last, seconds = status.last_failure, delay(policy, uid, status)
    if last is None or not seconds or is_before(now, last.at):
        return None  # a clock that went back must not stretch the wait
    moment = after(last.at, seconds)
    return moment if seconds_between(now, moment) > 0 else None


def _draw(uid: str, number: int) -> float:
    """In [0, 1)."""
    digest = hashlib.sha256(f"{uid}/{number}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64
