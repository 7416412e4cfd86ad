"""The decision of one pass: Snapshot in, Plan out. Pure: no I/O, no clock, no memory but the status.

Steps: take in what the reports say (`progress`), decide about the attempt (`formation`), charge a failure (`failure`),
see to the Pods (`placement`), say how things stand (`situation`), account for the time (`goodput`), tell what is new
(`story`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from starcoder_operator.api.v1alpha1 import StarCoderRunStatus
from starcoder_operator.api.v1alpha1.status import State
from starcoder_trainer.contract.assignment import Assignment

from . import (
    avoidance,
    budget,
    failure,
    goodput,
    patience,
    progress,
    reasons,
    situation,
    sizing,
    storage_reach,
    story,
    user_error,
)
from .attempt_time import awaiting_since
from .conditions import Claim, merged
from .elasticity import pool_size
from .failure import Failure, Response
from .formation import (
    AwaitCause,
    BackOff,
    Decision,
    Drain,
    Ended,
    Finished,
    Go,
    Hold,
    Leave,
    Stay,
    Unclear,
    decide,
    held,
    iterations_pass,
    next_attempt,
)
from .hearing import USUAL, Limits
from .leaving import Leaving, leaving, left_unsaved, time_left, told_to_leave
from .looks import LOOK_AT_LEAVING, look_again
from .members import MemberView, members_of
from .placement import Placement, place, unchanged
from .plan import (
    Action,
    DeleteGang,
    DeletePod,
    EnsureAccess,
    EnsureDisruptionBudget,
    EnsureLeases,
    Plan,
    WriteAssignment,
)
from .seats import boot_ids, taking_part
from .snapshot import PodView, Snapshot, is_held, own_assignment
from .timestamps import seconds_between
from .training_config import training_config
from .validation import name_problems, problems

OVER: tuple[State, ...] = ("Succeeded", "Failed")
LINGER = 60.0
"""Seconds that Pods get to end by themselves, and so to keep their logs, once the run is over."""


@dataclass(frozen=True)
class Outcome:
    """What one kind of run (invalid, suspended, wanted, over) comes to."""

    status: StarCoderRunStatus
    """Figures, counters and records; state, conditions and message are laid over it."""
    state: State
    claims: tuple[Claim, ...]
    actions: tuple[Action, ...] = ()
    look_again: float | None = None


def plan(snapshot: Snapshot, *, limits: Limits = USUAL) -> Plan:
    """What is to be recorded and done now.

    Args:
        limits: how long agents may be silent.
    """
    members = members_of(snapshot, limits)
    status = progress.absorbed(snapshot, members)
    wrong = [str(v) for v in (*name_problems(snapshot.name), *problems(snapshot.spec))]
    if status.state in OVER:
        outcome = _over(snapshot, status)
    elif wrong:
        outcome = _invalid(snapshot, status, members, wrong)
    elif snapshot.spec.suspend:
        outcome = _suspended(snapshot, status, members)
    else:
        outcome = _wanted(snapshot, status, members, limits)
    written = next((a.assignment for a in outcome.actions if isinstance(a, WriteAssignment)), own_assignment(snapshot))
    if outcome.status.draining is not None and not (written is not None and written.phase in ("run", "drain")):
        outcome = replace(outcome, status=outcome.status.model_copy(update={"draining": None}))
    after = goodput.accounted(snapshot, members, _told(snapshot, outcome), written, limits)
    actions = (*story.told(snapshot.status, after), *outcome.actions, *_budget(snapshot, members, after))
    return Plan(after, actions, outcome.look_again)


def _budget(snapshot: Snapshot, members: tuple[MemberView, ...], status: StarCoderRunStatus) -> tuple[Action, ...]:
    """Last of all actions: that it is refused keeps nothing else from being done."""
    wanted = 0 if status.state in OVER else budget.min_available(members, own_assignment(snapshot))
    return (EnsureDisruptionBudget(wanted),) if wanted != (snapshot.budget or 0) else ()


def _invalid(
    snapshot: Snapshot, status: StarCoderRunStatus, members: tuple[MemberView, ...], wrong: list[str]
) -> Outcome:
    """Nothing is created; what runs already goes on as it was accepted."""
    goes_on = iterations_pass(snapshot, members)
    claims = [Claim("Accepted", "False", reasons.INVALID_SPEC, "; ".join(wrong))]
    if goes_on:
        claims.append(Claim("Training", "True", reasons.TRAINING, "iterations pass, with the spec as it was accepted"))
    elif status.condition("Training"):
        claims.append(Claim("Training", "False", reasons.INVALID_SPEC, "no attempt begins until the spec is valid"))
    claims.append(Claim("Complete", "False", reasons.IN_PROGRESS))
    stands = status.state if snapshot.pods and status.state != "Running" else "Pending"
    return Outcome(status if goes_on else progress.resting(status), "Running" if goes_on else stands, tuple(claims))


def _suspended(snapshot: Snapshot, status: StarCoderRunStatus, members: tuple[MemberView, ...]) -> Outcome:
    """Workers leave with a checkpoint, then Pods and PodGroup go; the next attempt is placed anew."""
    standing, gang = len(snapshot.pods), _leaving(snapshot, members)
    drained = gang is None or time_left(snapshot) <= 0
    if gang is not None and not drained:
        reason, message = reasons.SUSPENDING, str(gang)
    elif standing:
        reason, message = reasons.SUSPENDING, f"workers stop: {standing} Pods are still there"
    else:
        reason, message = reasons.SUSPENDED, "the run is suspended (spec.suspend) and holds no GPU"
    training = Claim("Training", "False", reason, message)
    in_progress = Claim("Complete", "False", reasons.IN_PROGRESS)
    accepted = situation.accepted(replace(snapshot, problems={}))
    if gang is not None and not drained:
        status = told_to_leave(progress.resting(status), None, snapshot.now)
        saved = situation.checkpoint_verified(snapshot, status, gang.busy)
        said = (accepted, saved, training, in_progress)
        return Outcome(status, status.state, said, _tell(snapshot, "drain"), LOOK_AT_LEAVING)
    if gang is not None:
        training = Claim("Training", "False", reasons.GRACE_EXCEEDED, left_unsaved(snapshot, gang))
    scheduled = Claim("Scheduled", "False", reason, message)
    claims = (accepted, scheduled, *situation.not_degraded(snapshot, reason, message), training, in_progress)
    actions = (*_tell(snapshot, "stop"), *_delete(snapshot.pods, "the run is suspended"), *_delete_gang(snapshot))
    state: State = status.state if standing and status.state != "Suspended" else "Suspended"
    return Outcome(progress.resting(status), state, claims, actions)


def _leaving(snapshot: Snapshot, members: tuple[MemberView, ...]) -> Leaving | None:
    """How far the gang of a run that is not to train is with leaving; None where there is nothing to wait for."""
    current = own_assignment(snapshot)
    if current is None or current.phase not in ("run", "drain"):
        return None
    at_work = taking_part(current, members)
    gang = leaving(snapshot, current, at_work)
    rest = [m for m in at_work if m.index not in gang.excused]
    failures = failure.find(rest, current.attempt, boot_ids(current))
    trains = any(m.report is not None and m.report.state != "starting" for m in gang.busy)
    return gang if trains and not failures else None


def _over(snapshot: Snapshot, status: StarCoderRunStatus) -> Outcome:
    """Succeeded or Failed, for ever. Pods end by themselves and keep their logs; those that do not are deleted."""
    standing = [p for p in snapshot.pods if p.phase not in ("Succeeded", "Failed") and not p.deleting]
    left = LINGER - seconds_between(status.completed_at or snapshot.now, snapshot.now)
    late = [p for p in standing if left <= 0 or not p.scheduled]
    actions = (*_tell(snapshot, "stop"), *_delete(late, "the run is over"), *_delete_gang(snapshot))
    wait = max(left, 1.0) if len(late) < len(standing) else None
    return Outcome(progress.resting(status), status.state, (), actions, wait)


def _wanted(snapshot: Snapshot, status: StarCoderRunStatus, members: tuple[MemberView, ...], limits: Limits) -> Outcome:
    """A run that is to train."""
    config = training_config(snapshot.name, snapshot.namespace, snapshot.uid, snapshot.spec).to_json()
    decision = patience.over(snapshot, status, members, decide(snapshot, members, config, limits), limits)
    if isinstance(decision, Finished):
        return _succeeded(snapshot, status, members)
    status, decision = _counted(snapshot, status, members, decision)
    if isinstance(decision, Ended) and (over := _given_up(snapshot, status, members, decision.failure)):
        return over
    status, forgiving = avoidance.forgiven(snapshot, members, avoidance.unanswered(snapshot, members, status))
    avoided = avoidance.avoided(status)
    placement, write = unchanged(snapshot, members), None
    match decision:
        case Ended():
            write = held(snapshot, members, next_attempt(snapshot))
            placement = place(snapshot, members, avoided=avoided)
        case Hold(assignment):
            write = assignment
            placement = place(snapshot, members, avoided=avoided)
        case Go(assignment):
            write = assignment
            status = progress.resized(snapshot, status, assignment)
        case Drain(assignment, because, why):
            # The attempt ends as it was: the agents commit its last step where they have those before it.
            write, config = assignment, snapshot.assignment.config_json if snapshot.assignment else config
            status = told_to_leave(status, because, snapshot.now, why)
            placement = place(snapshot, members, _at_work(snapshot), avoided)
        case Stay() | Unclear() | BackOff() if is_held(snapshot):
            placement = place(snapshot, members, avoided=avoided)
        case Stay() | Leave() | AwaitCause():
            # Spares that are lost are replaced; those at work are left alone.
            placement = place(snapshot, members, _at_work(snapshot), avoided)
            if isinstance(decision, Leave):
                status = told_to_leave(status, decision.because, snapshot.now)
        case Unclear() | BackOff():
            pass
    forming = isinstance(decision, Ended | Hold) or is_held(snapshot)
    at_work = taking_part(write or own_assignment(snapshot), members)
    claims = (
        situation.accepted(snapshot, placement),
        situation.scheduled(snapshot, members, placement),
        situation.training(snapshot, at_work, decision, sizing.outlook(snapshot, members) if forming else ""),
        situation.checkpoint_verified(snapshot, status, at_work),
        *situation.degraded(snapshot, status, write),
        Claim("Complete", "False", reasons.IN_PROGRESS),
    )
    trains, awaits = decision == Stay(), isinstance(decision, AwaitCause)
    status = (status if trains else progress.resting(status)).model_copy(
        update={
            "attempt": max([status.attempt, *(a.attempt for a in (own_assignment(snapshot), write) if a)]),
            "placement": placement.number,
            "incarnations": placement.incarnations,
            "waiting_since": sizing.waiting_since(snapshot, members) if forming else None,
            "awaiting_cause_since": (awaiting_since(snapshot) or snapshot.now) if awaits else None,
            "started_at": status.started_at or (snapshot.now if trains else None),
        }
    )
    return Outcome(
        status,
        _state(snapshot, decision, claims),
        claims,
        (*forgiving, *_in_order(snapshot, placement, _written(snapshot, write, config))),
        look_again(
            snapshot, members, decision, placement, limits=limits, patience=patience.left(snapshot, snapshot.status)
        ),
    )


def _counted(
    snapshot: Snapshot, status: StarCoderRunStatus, members: tuple[MemberView, ...], decision: Decision
) -> tuple[StarCoderRunStatus, Decision]:
    """The status with a failure that the decision tells of, and the decision with whose fault it is known to be."""
    ttl, now, last = snapshot.spec.failure_policy.node_avoidance.ttl.seconds, snapshot.now, status.last_failure
    match decision:
        case Ended(found, signs):
            where = user_error.nodes_of(found, signs)
            judged = user_error.judged(last, found, where)
            status = failure.charged(status, judged, now, where)
            status = avoidance.noted(status, failure.origins(found, signs), ttl=ttl, now=now)
            if user_error.is_repeated(last, judged) and len(where) == 1:
                why = "the same exception twice at the same iteration: elsewhere it shows whether it is the node's"
                status = avoidance.kept_away_from(status, found.node, 2, why, ttl=ttl, now=now)
            if storage_reach.is_of_the_node(snapshot, members, found, where):
                why = storage_reach.reason(found.member)
                status = avoidance.kept_away_from(status, found.node, 2, why, ttl=ttl, now=now)
            return status, Ended(judged, signs)
        case Hold(found=Failure() as found):
            return avoidance.noted(failure.reattributed(status, found), (found,), ttl=ttl, now=now), decision
    return status, decision


def _given_up(
    snapshot: Snapshot, status: StarCoderRunStatus, members: tuple[MemberView, ...], found: Failure
) -> Outcome | None:
    """The end of a run whose failure another try would meet again, or one too many."""
    limit, charged = snapshot.spec.failure_policy.max_restarts_without_progress, status.restarts_without_progress
    last = f"{found.cause} in Pod {found.pod or 'none'}: {found.message}"
    how = (
        "Mend the cause, then delete the run and apply it anew with `checkpoint.resume: Adopt` to go on from the "
        "newest verified checkpoint"
    )
    if found.rule.response is Response.FAIL:
        reason, message = str(found.cause), f"{last}. {how}"
    elif charged > limit:
        reason = reasons.RESTARTS_EXHAUSTED
        message = (
            f"{charged} failures since the last newer verified checkpoint, failurePolicy.maxRestartsWithoutProgress "
            f"allows {limit}; the last was {last}. {how}"
        )
    else:
        return None
    return _ended(snapshot, progress.resting(status), members, "Failed", Claim("Complete", "False", reason, message))


def _succeeded(snapshot: Snapshot, status: StarCoderRunStatus, members: tuple[MemberView, ...]) -> Outcome:
    iterations = snapshot.spec.training.iterations
    message = f"all {iterations} iterations are trained, the last checkpoint is verified"
    claim = Claim("Complete", "True", reasons.SUCCEEDED, message)
    return _ended(snapshot, progress.finished(snapshot, status), members, "Succeeded", claim)


def _ended(
    snapshot: Snapshot, status: StarCoderRunStatus, members: tuple[MemberView, ...], state: State, complete: Claim
) -> Outcome:
    status = status.model_copy(update={"completed_at": snapshot.now})
    claims = (
        situation.accepted(replace(snapshot, problems={})),
        situation.checkpoint_verified(snapshot, status, ()),
        Claim("Training", "False", complete.reason, complete.message),
        *situation.not_degraded(snapshot, complete.reason, complete.message),
        complete,
    )
    over = _over(snapshot, status)
    return Outcome(status, state, claims, over.actions, over.look_again)


def _at_work(snapshot: Snapshot) -> frozenset[int]:
    current = own_assignment(snapshot)
    runs = current is not None and current.phase in ("run", "drain")
    return frozenset(place.index for place in current.members) if current and runs else frozenset()


def _written(snapshot: Snapshot, assignment: Assignment | None, config: str) -> tuple[Action, ...]:
    if assignment is None:
        return ()
    version = snapshot.assignment.resource_version if snapshot.assignment else ""
    return (WriteAssignment(assignment, config, version),)


def _tell(snapshot: Snapshot, phase: Literal["drain", "stop"]) -> tuple[Action, ...]:
    """Tells the agents to have their workers leave, or to end them."""
    current = own_assignment(snapshot)
    if current is None or snapshot.assignment is None or current.phase == phase:
        return ()
    return _written(snapshot, replace(current, phase=phase), snapshot.assignment.config_json)


def _delete(pods: Iterable[PodView], why: str) -> tuple[Action, ...]:
    return tuple(DeletePod(pod.name, pod.uid, why) for pod in pods if not pod.deleting)


def _delete_gang(snapshot: Snapshot) -> tuple[Action, ...]:
    return (DeleteGang(snapshot.gang.name, snapshot.gang.uid),) if snapshot.gang else ()


def _in_order(snapshot: Snapshot, placement: Placement, write: tuple[Action, ...]) -> tuple[Action, ...]:
    """An assignment that is there is changed first: survivors stop at once, and nothing that is refused to Pods keeps
    an attempt from being held. A first one comes when there is somebody to read it."""
    known = {lease.member for lease in snapshot.leases}
    leases = tuple(i for i in range(pool_size(snapshot.spec)) if i not in known)
    needed: list[Action] = [] if snapshot.rbac_present else [EnsureAccess()]
    needed += [EnsureLeases(leases)] if leases else []
    if snapshot.assignment is None:
        return (*needed, *placement.actions, *write)
    return (*write, *needed, *placement.actions)


def _state(snapshot: Snapshot, decision: Decision, claims: tuple[Claim, ...]) -> State:
    before, said = snapshot.status.state, {c.type: c for c in claims}
    if said["Training"].holds:
        return "Running"
    if isinstance(decision, AwaitCause | Drain | Leave | Unclear) and not is_held(snapshot):
        return before
    if isinstance(decision, Hold) and decision.planned:
        return "Starting"
    if isinstance(decision, Ended) or before in ("Running", "Recovering"):
        return "Recovering"
    return "Starting" if said["Accepted"].holds and said["Scheduled"].holds else "Pending"


def _told(snapshot: Snapshot, outcome: Outcome) -> StarCoderRunStatus:
    """The status with state, conditions, and the reason and message that explain the state."""
    before = snapshot.status.conditions
    conditions = merged(before, outcome.claims, now=snapshot.now, generation=snapshot.generation)
    status = outcome.status.model_copy(update={"state": outcome.state, "conditions": conditions})
    if not outcome.claims:
        return status
    reason, message = _explanation(status, {c.type: c for c in outcome.claims})
    return status.model_copy(update={"reason": reason, "message": message})


def _explanation(status: StarCoderRunStatus, said: dict[str, Claim]) -> tuple[str, str]:
    """(reason, message) of the claim that explains the state."""
    if status.state in OVER:
        return said["Complete"].reason, said["Complete"].message
    for kind in ("Accepted", "Scheduled", "Training"):
        if kind == "Scheduled" and status.state == "Running":
            continue  # it trains without those that are missing
        if kind in said and not said[kind].holds:
            because, last = said[kind], status.last_failure
            how = situation.how_it_ended(last.cause, last.message) if last and status.state == "Recovering" else ""
            return because.reason, because.message if how in ("", because.message) else f"{how}; {because.message}"
    checkpoint = said.get("CheckpointVerified")
    if checkpoint is not None and checkpoint.reason in reasons.WARNINGS:
        return checkpoint.reason, f"attempt {status.attempt} trains; {checkpoint.message}"
    degraded = said.get("Degraded")
    if degraded is not None and degraded.holds:
        return degraded.reason, f"attempt {status.attempt} {degraded.message}"
    return reasons.TRAINING, f"attempt {status.attempt} trains"
