"""What the time of an attempt that runs went into: by its reports, and at its end what nobody reported.

Reports say it in cumulative seconds of the agent's own clock; only differences of one clock are ever taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from starcoder_operator.api.v1alpha1 import LastFailure, StarCoderRunStatus
from starcoder_operator.api.v1alpha1.goodput import Bucket, Goodput, Reported
from starcoder_trainer.contract.assignment import Assignment
from starcoder_trainer.contract.report import Spent, State

from . import reasons
from .hearing import Limits
from .layout import data_parallel
from .members import MemberView
from .snapshot import Snapshot, own_assignment
from .timestamps import milliseconds

ACTIVE = ("run", "drain")
"""Phases in which workers of the assignment's attempt may train."""

ENDED_WELL = ("done", "left")
"""States of an agent whose report says all of its attempt, the last checkpoint included."""

Shares = dict[Bucket, int]
"""Milliseconds by bucket."""


@dataclass(frozen=True)
class Heard:
    """Of the attempt that runs, by the freshest report of its members."""

    iteration: int
    state: State
    spent: Spent | None
    """None: the trainer is one that does not say."""


@dataclass(frozen=True)
class Run:
    """The attempt that ran in the time that is to be accounted for."""

    assignment: Assignment
    heard: Heard | None
    """None: its workers do not train yet."""
    base: Reported
    """What was heard of it before."""
    reached: int
    """Iterations done before, by any attempt."""
    copies: float
    """Share of the full data parallelism that it has."""
    is_new: bool
    """Nothing of it was accounted for before."""
    goes_on: bool
    """After this pass too."""

    @property
    def bucket(self) -> Bucket:
        """What it is at, as last heard of."""
        iteration = self.base.iteration if self.heard is None else self.heard.iteration
        if self.heard is None and self.is_new:
            return "forming"
        return "retraining" if iteration < self.reached else "training"

    @property
    def reported(self) -> Reported | None:
        """Where its report stands, for the next account."""
        if self.heard is None or self.heard.spent is None:
            return None
        spent = self.heard.spent
        return Reported(
            attempt=self.assignment.attempt,
            iteration=self.heard.iteration,
            forming=spent.forming,
            loading=spent.loading,
            data=spent.data,
            checkpoint=spent.checkpoint,
            compute=spent.compute,
        )


def run_of(snapshot: Snapshot, account: Goodput, written: Assignment | None, *, over: bool) -> Run | None:
    """What ran since the last pass; None where no attempt did, or the one that did was counted as ended.

    Args:
        written: the assignment as it will be after this pass.
        over: after this pass the run is.
    """
    current = own_assignment(snapshot)
    if current is None or current.phase not in ACTIVE or current.attempt < snapshot.status.attempt:
        return None
    base, is_new = account.reported, False
    if base is None or base.attempt != current.attempt:
        base, is_new = Reported(attempt=current.attempt, iteration=resumed_at(current)), True
    goes_on = not over and written is not None and written.attempt == current.attempt and written.phase in ACTIVE
    return Run(
        assignment=current,
        heard=_heard(snapshot, current, leader_only=goes_on),
        base=base,
        reached=account.reached,
        copies=min(1.0, current.layout.data / max(1, data_parallel(snapshot.spec))),
        is_new=is_new,
        goes_on=goes_on,
    )


def resumed_at(assignment: Assignment) -> int:
    """Iteration at which an attempt that runs began."""
    offer = assignment.offer
    return offer.checkpoint.step if offer is not None and offer.checkpoint is not None else 0


def _heard(snapshot: Snapshot, current: Assignment, *, leader_only: bool) -> Heard | None:
    """The leader's word; once the attempt has ended, that of the member that came furthest: the leader may be what was
    lost. As long as one still sees to its checkpoint, all wait for it."""
    boot_ids = {place.boot_id for place in current.members if place.boot_id}
    best: tuple[bool, float, int] | None = None
    found: Heard | None = None
    leaving = False
    for lease in snapshot.leases:
        report = lease.report
        if report is None or report.attempt != current.attempt or report.boot_id not in boot_ids:
            continue
        progress, leads = report.progress, report.boot_id == current.leader.boot_id
        if progress is None or report.state in ("idle", "starting") or (leader_only and not leads):
            continue
        if progress.spent is None and report.state in ("failed", "draining"):
            continue  # it failed before it trained, and the progress is of the attempt before
        rank = (progress.spent is not None, progress.spent.total if progress.spent else 0.0, progress.iteration)
        if best is None or rank > best:
            best, found = rank, Heard(progress.iteration, report.state, progress.spent)
        leaving |= report.state == "draining"
    return replace(found, state="draining") if found is not None and leaving else found


def silence(members: tuple[MemberView, ...], failed: LastFailure | None, limits: Limits) -> float:
    """Seconds for which the member that failed was not heard; 0 where it said itself that it failed."""
    lost = next((m for m in members if failed is not None and m.pod_name == failed.pod and m.loss is not None), None)
    if lost is None or lost.lease is None:
        return 0.0
    # Whoever is suspected had missed so many beats when others began to say so.
    return max(lost.lease.age, limits.suspected) if lost.suspect else lost.lease.age


def shares_of(snapshot: Snapshot, silent: float, status: StarCoderRunStatus, run: Run, elapsed: int) -> Shares:
    """What went into what; where the attempt goes on, no more than was reported.

    Args:
        silent: seconds for which the member that failed was not heard, where the attempt has failed.
        status: as it is to be written.
        elapsed: milliseconds since the last account.
    """
    heard, shares = run.heard, _as_reported(run, elapsed)
    left = elapsed - sum(shares.values())
    if run.goes_on:
        # What passed between the operator's word and the first of the workers is no iteration's.
        begins = run.is_new and heard is not None and heard.spent is not None and heard.spent.first_iteration is None
        return _joined(shares, {"forming": left} if begins else {})
    if heard is not None and heard.state in ENDED_WELL:
        return _joined(shares, {"detecting": left})
    if status.restarts.total > snapshot.status.restarts.total:
        unheard = _until_the_fault(snapshot, _milli(silent), run, left)
        return _joined(shares, _under_way(run, unheard), {"detecting": left - unheard})
    if status.state == "Succeeded" or (heard is not None and heard.state == "draining"):
        return _joined(shares, {"checkpointStall": left})
    return _joined(shares, _under_way(run, left))


def _as_reported(run: Run, elapsed: int) -> Shares:
    """What is new in the report; never more than has passed."""
    if run.heard is None:
        return {}
    if run.heard.spent is None:
        return _under_way(run, elapsed)
    spent, base = run.heard.spent, run.base
    news = {
        "forming": _milli(spent.forming - base.forming),
        "loading": _milli(spent.loading - base.loading),
        "data": _milli(spent.data - base.data),
        "checkpoint": _milli(spent.checkpoint - base.checkpoint),
        "compute": _milli(spent.compute - base.compute),
    }
    known = base.forming + base.loading + base.data + base.checkpoint + base.compute
    found, limit = sum(news.values()), min(elapsed, _milli(spent.total - known))
    if found > limit:
        news = {phase: part * limit // found for phase, part in news.items()}
        news["compute"] += limit - sum(news.values())
    return _joined(
        {
            "forming": news["forming"],
            "loading": news["loading"],
            "dataWait": news["data"],
            "checkpointStall": news["checkpoint"],
        },
        _computed(run, news["compute"]),
    )


def _computed(run: Run, compute: int) -> Shares:
    """Milliseconds of iterations: those done before, those that are new, and what new ones lack for missing copies."""
    assert run.heard is not None
    done = run.heard.iteration - run.base.iteration
    if done <= 0:
        return _under_way(run, compute)
    again = round(compute * min(max(run.reached - run.base.iteration, 0), done) / done)
    return _joined({"retraining": again}, _new(run, compute - again))


def _under_way(run: Run, part: int) -> Shares:
    """Milliseconds of what the attempt was at when it was last heard of."""
    return _new(run, part) if run.bucket == "training" else {run.bucket: part}


def _new(run: Run, part: int) -> Shares:
    training = round(part * run.copies)
    return {"training": training, "degraded": part - training}


def awaiting_since(snapshot: Snapshot) -> str | None:
    """When the cause that is being waited for began to be; None where none was, as last written. The condition does not
    say: agents may have been silent before, which is Unknown too."""
    told = snapshot.status.condition("Training")
    if told is None or told.reason not in (reasons.PEER_LOST, reasons.HANGS):
        return None
    return snapshot.status.awaiting_cause_since or told.last_transition_time


def _until_the_fault(snapshot: Snapshot, silent: int, run: Run, left: int) -> int:
    """Of the milliseconds that nobody reported, those before the fault: up to the first sign of it, and no more than an
    iteration usually takes, since one that was done would have been reported."""
    if since := awaiting_since(snapshot):
        silent = max(silent, milliseconds(snapshot.instant or snapshot.now) - milliseconds(since))
    before = left - silent
    spent = run.heard.spent if run.heard is not None else None
    if run.heard is not None and spent is not None and spent.first_iteration is not None:
        done = max(1, run.heard.iteration - resumed_at(run.assignment))
        usual = (spent.data + spent.checkpoint + spent.compute) / done
        before = min(before, _milli(usual * snapshot.spec.training.log_every_iterations))
    return max(0, before)


def _milli(seconds: float) -> int:
    return max(0, round(seconds * 1000))


def _joined(*shares: Shares) -> Shares:
    out: Shares = {}
    for each in shares:
        for bucket, part in each.items():
            out[bucket] = out.get(bucket, 0) + part
    return out
