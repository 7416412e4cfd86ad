"""How many members an attempt takes: what is left when lost ones were waited for long enough, more when there are more.

Data parallelism may be any number, so a run goes on with whatever holds whole copies of the model, down to
`elasticity.minReplicas`. An attempt that is formed anyhow takes all that are there; one that runs leaves with a
checkpoint to grow, or because the spec asks for another form.
"""

from __future__ import annotations

from starcoder_operator.api.v1alpha1 import StarCoderRunStatus
from starcoder_trainer.contract.assignment import Assignment

from .elasticity import largest, least, pool_size, settled
from .layout import layout_of
from .members import MemberView
from .placement import waiting_trouble
from .snapshot import Snapshot, own_assignment
from .timestamps import after, seconds_between

STARTING = 300.0
"""Seconds for which a Pod that has a node is counted on to answer, beyond `elasticity.patience`: it pulls its image."""


def gang_size(snapshot: Snapshot, members: tuple[MemberView, ...]) -> int:
    """Places of the attempt that is held, or of the next where one runs."""
    target, possible = _target(snapshot), largest(snapshot.spec, _fit(snapshot, members))
    if possible >= target:
        return possible
    return possible if possible and _left(snapshot, members) <= 0 else target


def waiting_since(snapshot: Snapshot, members: tuple[MemberView, ...]) -> str | None:
    """For `status.waitingSince` while no attempt runs: since when the gang could train with fewer members and waits for
    those that are lost. Below the least it waits without end, and patience begins when there are enough."""
    could = 0 < largest(snapshot.spec, _fit(snapshot, members)) < _target(snapshot)
    return (snapshot.status.waiting_since or snapshot.now) if could else None


def look_again(snapshot: Snapshot, members: tuple[MemberView, ...]) -> float | None:
    """Seconds until a held attempt is to go on with fewer members; None where it is not to."""
    return None if waiting_since(snapshot, members) is None else max(0.1, _left(snapshot, members))


def outlook(snapshot: Snapshot, members: tuple[MemberView, ...]) -> str:
    """What becomes of a gang that is not whole, for people; empty where there is nothing to say."""
    spec, fit = snapshot.spec, _fit(snapshot, members)
    if least(spec) == spec.workers.replicas:
        return ""
    possible = largest(spec, fit)
    if not possible:
        return f"{fit} answer, and elasticity.minReplicas is {least(spec)}"
    if possible >= _target(snapshot):
        return ""
    if fit + len(_starting(snapshot, members)) >= _target(snapshot):
        return ""
    at = after(snapshot.status.waiting_since or snapshot.now, spec.elasticity.patience.seconds)
    return f"the run goes on with {possible} at {at} (elasticity.patience {spec.elasticity.patience})"


def regrouped(snapshot: Snapshot, members: tuple[MemberView, ...], current: Assignment) -> str:
    """What the attempt that runs is to leave for, with a checkpoint; empty where it is to run on."""
    spec = snapshot.spec
    possible, size = largest(spec, _fit(snapshot, members)), len(current.members)
    if not possible:
        return ""
    if _is_outdated(snapshot, current):
        return f"the spec asks for {possible} Pods, TP{spec.parallelism.tensor} x PP{spec.parallelism.pipeline}"
    if possible > size and grows_after(snapshot, snapshot.status) is None and not _more_come(snapshot, members):
        return f"grows from {size} to {possible} of {spec.workers.replicas} Pods"
    return ""


def grows_after(snapshot: Snapshot, status: StarCoderRunStatus) -> str | None:
    """When a run that trains with fewer members may grow, RFC 3339; None: now."""
    since, interval = status.resized_at, snapshot.spec.elasticity.grow_back.interval.seconds
    if since is None or seconds_between(since, snapshot.now) >= interval:
        return None
    return after(since, interval)


def _is_outdated(snapshot: Snapshot, current: Assignment) -> bool:
    """The spec was changed so that it can't be what runs."""
    spec, runs = snapshot.spec, current.layout
    wanted = layout_of(spec)
    if (wanted.tensor, wanted.pipeline, wanted.sequence) != (runs.tensor, runs.pipeline, runs.sequence):
        return True
    beyond = any(place.index >= pool_size(spec) for place in current.members)
    return beyond or len(current.members) > spec.workers.replicas


def _target(snapshot: Snapshot) -> int:
    """Members that the attempt takes without having waited."""
    current = own_assignment(snapshot)
    return settled(snapshot.spec, len(current.members) if current and current.phase != "stop" else 0)


def _fit(snapshot: Snapshot, members: tuple[MemberView, ...]) -> int:
    return sum(m.fit for m in members[: pool_size(snapshot.spec)])


def _left(snapshot: Snapshot, members: tuple[MemberView, ...]) -> float:
    """Seconds for which lost members are waited for still; longer where Pods that would make the gang whole start."""
    since = snapshot.status.waiting_since
    waited = seconds_between(since, snapshot.now) if since else 0.0
    left = snapshot.spec.elasticity.patience.seconds - waited
    starting = sorted(m.pod.scheduled_for for m in _starting(snapshot, members) if m.pod is not None)
    lacking = _target(snapshot) - _fit(snapshot, members)
    if lacking <= len(starting):
        # Whole when the youngest of as many as are lacking answers.
        left = max(left, STARTING - starting[lacking - 1])
    return left


def _starting(snapshot: Snapshot, members: tuple[MemberView, ...]) -> tuple[MemberView, ...]:
    """Their Pods have a node and nothing is known to keep them from answering soon."""
    return tuple(
        m for m in members[: pool_size(snapshot.spec)]
        if m.pod is not None and m.loss is None and m.pod.scheduled and m.report is None
        and m.pod.scheduled_for < STARTING and not waiting_trouble(m.pod)
    )  # fmt: skip


def _more_come(snapshot: Snapshot, members: tuple[MemberView, ...]) -> bool:
    """Growth waits for those that will answer in a moment: each costs a restart."""
    fit = _fit(snapshot, members)
    return largest(snapshot.spec, fit + len(_starting(snapshot, members))) > largest(snapshot.spec, fit)
