"""Where a run's time went: each pass puts the time since the last account into buckets.

An account goes to `status.goodput.asOf`, and its buckets add up to asOf - since, always. Outside of an attempt that
runs, the time from asOf to now belongs to the bucket that the last pass named. While an attempt runs, the leader's
report says in seconds of its own clock what they went into; asOf moves by so much and no further, so that nothing is
guessed: an operator that was away for minutes finds what happened meanwhile in the report. What is left when the
attempt ends is what nobody reported: the iteration that was under way, and the time until the failure was noticed.
"""

from __future__ import annotations

from typing import Any

from starcoder_operator.api.v1alpha1 import StarCoderRunStatus
from starcoder_operator.api.v1alpha1.goodput import Bucket, Buckets, Goodput
from starcoder_trainer.contract.assignment import Assignment

from . import backoff, recovery
from .attempt_time import ACTIVE, Run, Shares, run_of, shares_of, silence
from .hearing import Limits
from .members import MemberView
from .seats import taking_part
from .situation import first_problem
from .snapshot import Snapshot
from .timestamps import at_millisecond, milliseconds

OVER = ("Succeeded", "Failed")


def accounted(
    snapshot: Snapshot,
    members: tuple[MemberView, ...],
    status: StarCoderRunStatus,
    written: Assignment | None,
    limits: Limits,
) -> StarCoderRunStatus:
    """`status` with its account taken to now, and the records of its recoveries.

    Args:
        status: as it is to be written otherwise.
        written: the assignment as it will be after this pass.
        limits: by which silent agents were judged.
    """
    if snapshot.status.state in OVER:
        return status
    account, now = snapshot.status.goodput or _opened(snapshot), milliseconds(snapshot.instant or snapshot.now)
    elapsed = max(0, now - milliseconds(account.as_of))
    run = run_of(snapshot, account, written, over=status.state in OVER)
    if run is None:
        shares: Shares = {account.bucket or "queued": elapsed}
    else:
        shares = shares_of(snapshot, silence(members, status.last_failure, limits), status, run, elapsed)
    recoveries = recovery.recorded(snapshot, status, written=written, run=run, shares=shares, now=now)
    reached = max(account.reached, run.heard.iteration if run is not None and run.heard is not None else 0)
    buckets = _sum(account.buckets, shares)
    bucket = _bucket(snapshot, members, status, written, run, is_recovering=recovery.is_open(recoveries))
    goodput = account.model_copy(
        update={
            "buckets": buckets,
            "ratio": _ratio(buckets),
            "bucket": bucket,
            "as_of": at_millisecond(milliseconds(account.as_of) + sum(shares.values())),
            "reached": reached,
            # Where the clock went back nothing was added, so nothing of the report is used up either.
            "reported": (run.reported if run is not None and elapsed else None) or account.reported,
        }
    )
    return status.model_copy(update={"goodput": goodput, "recoveries": recovery.staged(recoveries, bucket)})


def without_time(status: StarCoderRunStatus) -> dict[str, Any]:
    """As the API server takes it, without what time alone changes in the account and in a recovery's present stage."""
    told = status.to_dict()
    told["goodput"] = told.get("goodput", {}).get("bucket")
    told["recoveries"] = [{k: v for k, v in each.items() if k != "seconds"} for each in told.get("recoveries", ())]
    return told


def _opened(snapshot: Snapshot) -> Goodput:
    """From the run's creation; from now where it has lived and its account is lost or was never kept."""
    lived = snapshot.status.attempt > 0 or snapshot.assignment is not None
    since = snapshot.created_at
    if lived or not since:
        since = snapshot.instant or snapshot.now
    begin = at_millisecond(milliseconds(since))
    return Goodput(since=begin, as_of=begin, bucket="queued")


def _bucket(
    snapshot: Snapshot,
    members: tuple[MemberView, ...],
    status: StarCoderRunStatus,
    written: Assignment | None,
    run: Run | None,
    *,
    is_recovering: bool,
) -> Bucket | None:
    """What the time from now on goes into."""
    if status.state in OVER:
        return None
    if written is not None and written.phase in ACTIVE:
        if run is None or not run.goes_on:
            return "forming"
        return run.bucket
    if snapshot.spec.suspend:
        return "suspended"
    complete = written is not None and written.phase == "hold" and all(place.boot_id for place in written.members)
    waits = backoff.until(snapshot.spec.failure_policy.backoff, snapshot.uid, status, snapshot.now) is not None
    if complete and not waits and first_problem(taking_part(written, members)) is None:
        return "forming"
    if is_recovering:
        return "placing"
    scheduled = status.condition("Scheduled")
    return "starting" if scheduled is not None and scheduled.status == "True" else "queued"


def _sum(buckets: Buckets, shares: Shares) -> Buckets:
    """In milliseconds, so that nothing is lost to rounding however often it is added to."""
    seconds = buckets.to_dict()
    more = {name: (round(seconds[name] * 1000) + part) / 1000 for name, part in shares.items()}
    return Buckets.model_validate(seconds | more)


def _ratio(buckets: Buckets) -> float | None:
    lived = sum(buckets.to_dict().values()) - buckets.suspended
    return round(buckets.training / lived, 4) if lived > 0 else None
