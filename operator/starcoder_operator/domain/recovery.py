"""The last recoveries of a run: one record for each attempt that ended by a failure, with what each stage took."""

from __future__ import annotations

from starcoder_operator.api.v1alpha1 import LastFailure, StarCoderRunStatus
from starcoder_operator.api.v1alpha1.goodput import Bucket, Recovery, Stage, StageSeconds
from starcoder_trainer.contract.assignment import Assignment

from .attempt_time import ACTIVE, Run, Shares, resumed_at
from .snapshot import Snapshot
from .timestamps import at_millisecond

KEPT = 10
STAGES: tuple[Bucket, ...] = ("placing", "forming", "loading")
"""Buckets whose time is that of the stage of the same name while a recovery goes on."""


def is_open(recoveries: tuple[Recovery, ...]) -> bool:
    """Whether the last one goes on."""
    return bool(recoveries) and recoveries[-1].stage is not None


def completed(before: StarCoderRunStatus, after: StarCoderRunStatus) -> tuple[Recovery, ...]:
    """Those that came to their first iteration between two statuses."""
    known = {r.from_attempt for r in before.recoveries if r.total is not None}
    return tuple(r for r in after.recoveries if r.total is not None and r.from_attempt not in known)


def recorded(
    snapshot: Snapshot,
    status: StarCoderRunStatus,
    *,
    written: Assignment | None,
    run: Run | None,
    shares: Shares,
    now: int,
) -> tuple[Recovery, ...]:
    """The records after a pass.

    Args:
        status: as it is to be written otherwise.
        written: the assignment as it will be after this pass.
        run: what ran since the last account.
        shares: what that time went into.
        now: milliseconds since 1970.
    """
    before, records = snapshot.status, list(snapshot.status.recoveries)
    if is_open(before.recoveries):
        records[-1] = _further(records[-1], run, shares)
    failed, over = status.last_failure, status.state in ("Succeeded", "Failed")
    detecting = shares.get("detecting", 0)
    if failed is not None and status.restarts.total > before.restarts.total:
        begun = _begun(failed, run, from_attempt=before.attempt, at=now - detecting, detecting=detecting)
        records = _closed(records) if over else [*_closed(records), begun]
    elif failed is not None and records and failed != before.last_failure:
        records[-1] = records[-1].model_copy(update=_culprit(failed))
    if is_open(tuple(records)):
        if over or snapshot.spec.suspend:
            records = _closed(records)
        else:
            records[-1] = _going_on(records[-1], status, written)
    return tuple(records[-KEPT:])


def staged(recoveries: tuple[Recovery, ...], bucket: Bucket | None) -> tuple[Recovery, ...]:
    """The records with the stage of the one that goes on."""
    if not is_open(recoveries):
        return recoveries
    stage: Stage = bucket if bucket in ("placing", "forming") else "firstStep"
    return (*recoveries[:-1], recoveries[-1].model_copy(update={"stage": stage}))


def told(recovery: Recovery) -> str:
    """One that is over, in a sentence."""
    seconds = recovery.seconds
    stages = (
        ("detecting", seconds.detecting), ("placing", seconds.placing), ("forming", seconds.forming),
        ("loading", seconds.loading), ("first iteration", seconds.first_step),
    )  # fmt: skip
    listed = ", ".join(f"{name} {took:.1f} s" for name, took in stages if took is not None)
    where = f" of node {recovery.node}" if recovery.node else ""
    again = "1 iteration is" if recovery.iterations_lost == 1 else f"{recovery.iterations_lost} iterations are"
    return (
        f"attempt {recovery.to_attempt} trains again {recovery.total:.1f} s after {recovery.cause}{where}: {listed}; "
        f"it went on from iteration {recovery.resumed_at}, {again} done again"
    )


def _begun(failed: LastFailure, run: Run | None, *, from_attempt: int, at: int, detecting: int) -> Recovery:
    """Of the fault at `at`, milliseconds since 1970, noticed `detecting` milliseconds later."""
    reached = 0
    if run is not None:
        reached = max(run.base.iteration, run.heard.iteration if run.heard is not None else 0)
    return Recovery(
        cause=failed.cause,
        node=failed.node,
        pod=failed.pod,
        member=failed.member,
        at=at_millisecond(at),
        from_attempt=from_attempt,
        to_attempt=from_attempt + 1,
        iteration=reached,
        seconds=StageSeconds(detecting=detecting / 1000),
        stage="placing",
    )


def _culprit(failed: LastFailure) -> dict[str, str | int | None]:
    return {"cause": failed.cause, "node": failed.node, "pod": failed.pod, "member": failed.member}


def _further(recovery: Recovery, run: Run | None, shares: Shares) -> Recovery:
    """With the time of its stages; over, where an iteration was done."""
    seconds = recovery.seconds.model_dump()
    for stage in STAGES:
        if shares.get(stage):
            seconds[stage] = (round((seconds[stage] or 0) * 1000) + shares[stage]) / 1000
    heard = run.heard if run is not None else None
    if run is None or heard is None or run.assignment.attempt != recovery.to_attempt:
        return recovery.model_copy(update={"seconds": StageSeconds(**seconds)})
    if heard.iteration <= resumed_at(run.assignment):
        return recovery.model_copy(update={"seconds": StageSeconds(**seconds)})
    seconds["first_step"] = heard.spent.first_iteration if heard.spent is not None else None
    total = round(sum(took for took in seconds.values() if took is not None), 3)
    return recovery.model_copy(update={"seconds": StageSeconds(**seconds), "total": total, "stage": None})


def _going_on(recovery: Recovery, status: StarCoderRunStatus, written: Assignment | None) -> Recovery:
    found: dict[str, int] = {"to_attempt": status.attempt}
    if written is not None and written.phase in ACTIVE:
        found["resumed_at"] = resumed_at(written)
        found["iterations_lost"] = max(0, recovery.iteration - found["resumed_at"])
    return recovery.model_copy(update=found)


def _closed(records: list[Recovery]) -> list[Recovery]:
    return [r if r.stage is None else r.model_copy(update={"stage": None}) for r in records]
