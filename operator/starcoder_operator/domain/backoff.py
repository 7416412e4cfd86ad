"""How long a run that fails again and again waits before its next attempt, so that a crash loop burns neither S3 nor
GPUs of others.

All it needs is in the status, so the wait goes on where another operator takes over. The jitter is drawn by the run's
uid and the number of its failure: many runs that one fault stopped don't come back as one, and each pass finds the same
moment.
"""

from __future__ import annotations

import hashlib

from starcoder_operator.api.v1alpha1 import StarCoderRunStatus
from starcoder_operator.api.v1alpha1.failure_policy import Backoff

from .failure import Charge, rule_of
from .timestamps import after, is_before, seconds_between

MOST_DOUBLINGS = 30


def delay(policy: Backoff, uid: str, status: StarCoderRunStatus) -> float:
    """Seconds between the last failure and the attempt after it; 0 where it was not charged or is the first one."""
    repeats, last = status.restarts_without_progress - 1, status.last_failure
    rule = rule_of(last.cause) if last is not None else None
    if repeats < 1 or rule is None or rule.charge is not Charge.RUN:
        return 0.0
    doubled: int = policy.initial.seconds << min(repeats - 1, MOST_DOUBLINGS)
    longest = min(policy.max.seconds, doubled)
    return longest * (1 + _draw(uid, status.restarts.total)) / 2


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
