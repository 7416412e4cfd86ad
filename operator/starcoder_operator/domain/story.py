"""Events: what became different between two statuses, told once. Each has a condition or a counter that outlives it."""

from __future__ import annotations

from collections.abc import Iterator

from starcoder_operator.api.v1alpha1 import StarCoderRunStatus

from . import reasons, recovery
from .plan import EmitEvent

GOOD_NEWS = frozenset({reasons.ALL_PODS_SCHEDULED, reasons.SUSPENDED, reasons.SUCCEEDED})


def told(before: StarCoderRunStatus, after: StarCoderRunStatus) -> tuple[EmitEvent, ...]:
    """News of a pass, in the order in which it happened."""
    recovered = (EmitEvent("Normal", reasons.RECOVERED, recovery.told(r)) for r in recovery.completed(before, after))
    events = (
        *_failure(before, after),
        *_avoided(before, after),
        *_checkpoint(before, after),
        *_size(before, after),
        *_conditions(before, after),
        *recovered,
    )
    return tuple(dict.fromkeys(events))


def _failure(before: StarCoderRunStatus, after: StarCoderRunStatus) -> Iterator[EmitEvent]:
    last = after.last_failure
    if last is None or last == before.last_failure:
        return
    where = "".join(f", {what} {name}" for what, name in (("Pod", last.pod), ("node", last.node)) if name)
    yield EmitEvent("Warning", last.cause, f"attempt {before.attempt} ended{where}: {last.message}")


def _avoided(before: StarCoderRunStatus, after: StarCoderRunStatus) -> Iterator[EmitEvent]:
    known = {a.node for a in before.avoided_nodes}
    for new in after.avoided_nodes:
        if new.node not in known:
            yield EmitEvent("Warning", reasons.NODE_AVOIDED, f"{new.node} is avoided until {new.until}: {new.reason}")


def _checkpoint(before: StarCoderRunStatus, after: StarCoderRunStatus) -> Iterator[EmitEvent]:
    checkpoint = after.checkpoint
    if checkpoint is None or before.checkpoint == checkpoint:
        return
    yield EmitEvent("Normal", reasons.NEW_CHECKPOINT, f"iteration {checkpoint.iteration} is verified: {checkpoint.uri}")


def _size(before: StarCoderRunStatus, after: StarCoderRunStatus) -> Iterator[EmitEvent]:
    """An attempt begins with fewer Pods than it should, or with another number than the one before."""
    was, now, wanted = before.workers.training, after.workers.training, after.workers.desired
    degraded = after.condition("Degraded")
    if now == (was or wanted) or degraded is None:
        return
    if now < min(was or wanted, wanted):
        yield EmitEvent("Warning", degraded.reason, degraded.message)
    else:
        yield EmitEvent("Normal", reasons.RESIZED, f"{degraded.message}; {was} before")


def _conditions(before: StarCoderRunStatus, after: StarCoderRunStatus) -> Iterator[EmitEvent]:
    failed = after.state == "Failed" and before.state != "Failed"
    for condition in after.conditions:
        known = before.condition(condition.type)
        if known is not None and known.reason == condition.reason:
            continue
        if condition.reason in reasons.WARNINGS or (condition.type == "Complete" and failed):
            yield EmitEvent("Warning", condition.reason, condition.message)
        elif condition.reason == reasons.DRAINING:
            yield EmitEvent("Normal", condition.reason, condition.message)
        elif condition.type == "Training" and condition.status == "True":
            if not recovery.is_open(before.recoveries):
                yield EmitEvent(
                    "Normal", _begin(before), f"attempt {after.attempt} trains from iteration {after.iteration}"
                )
        elif condition.reason in GOOD_NEWS and condition.type != "Training":
            yield EmitEvent("Normal", condition.reason, condition.message)


def _begin(before: StarCoderRunStatus) -> str:
    return reasons.TRAINING if before.started_at is None else reasons.RESUMED
