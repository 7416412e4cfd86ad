"""What each condition says now: small questions to the snapshot, each answered with a reason and a sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from starcoder_operator.api.v1alpha1 import StarCoderRunStatus
from starcoder_trainer.contract.assignment import Assignment
from starcoder_trainer.contract.report import Problem

from . import reasons
from .conditions import Claim
from .elasticity import least
from .failure import Cause
from .formation import AwaitCause, BackOff, Decision, Drain, Ended, Finished, Go, Hold, Leave, Stay, Unclear
from .layout import data_parallel
from .members import MemberView
from .placement import TRIED_SLOWLY, Placement, is_native, is_queued, waiting_trouble
from .sizing import grows_after
from .snapshot import Snapshot, own_assignment

REFUSALS = ("forbidden", "exceeded quota", "denied", "is there already")
"""Words of refusals that say nothing against the Pod itself: quota, Pod security, admission, a foreign object."""
LEDGER_PROBLEMS = ("CheckpointForeign", "CheckpointLost")
NAMES_NODES = "nodes are available"
"""In the scheduler's messages that say what the nodes lack."""
GANG_NONE = "or set `scheduling.gang: None` to have the Pods placed one by one"


def accepted(snapshot: Snapshot, placement: Placement | None = None) -> Claim:
    """The spec is valid; whether the API server takes a Pod of it shows when one is made."""
    told = snapshot.status.condition("Accepted")
    if told is not None and told.reason == reasons.POD_INVALID and _waits_to_try(snapshot, placement):
        return Claim("Accepted", "False", told.reason, told.message)
    refused = snapshot.problems.get("create pod", "")
    if refused and not any(word in refused for word in REFUSALS):
        return Claim("Accepted", "False", reasons.POD_INVALID, f"the API server refused a Pod of this spec: {refused}")
    return Claim("Accepted", "True", reasons.VALID, "the spec is valid")


def scheduled(snapshot: Snapshot, members: tuple[MemberView, ...], placement: Placement) -> Claim:
    """As many Pods have a node as are to train; spares hold nothing up."""
    wanted, spares = snapshot.spec.workers.replicas, snapshot.spec.elasticity.spares
    placed = sum(m.pod is not None and m.loss is None and m.pod.scheduled for m in members) - placement.dropped
    if placed >= wanted:
        more = f", and {min(placed - wanted, spares)} of {spares} spares" if spares else ""
        return Claim("Scheduled", "True", reasons.ALL_PODS_SCHEDULED, f"all {wanted} Pods have a node{more}")
    reason, message = _why_not_scheduled(snapshot, members, placement, f"{max(0, placed)} of {wanted} Pods")
    return Claim("Scheduled", "Unknown" if placement.trying else "False", reason, message)


def _why_not_scheduled(
    snapshot: Snapshot, members: tuple[MemberView, ...], placement: Placement, placed: str
) -> tuple[str, str]:
    if is_native(snapshot) and not snapshot.gang_api:
        return reasons.GANG_API_ABSENT, (
            "the API server does not serve scheduling.k8s.io/v1beta1 PodGroup, which `scheduling.gang: Native` needs: "
            f"turn on the feature gate GenericWorkload and that API, {GANG_NONE}"
        )
    if snapshot.problems:
        return reasons.REFUSED, refusals(snapshot)
    if placement.dropped and is_queued(snapshot):
        return reasons.GANG_FIELD_DROPPED, (
            "a new Pod came without Kueue's label kueue.x-k8s.io/managed, so its queue would be passed by: turn on "
            f"Kueue's integration `pod` and select this namespace, {GANG_NONE}"
        )
    if placement.dropped:
        return reasons.GANG_FIELD_DROPPED, (
            "the API server dropped spec.schedulingGroup of a new Pod, so the gang would not be placed as one: turn on "
            f"the feature gate GenericWorkload of API server and scheduler, {GANG_NONE}"
        )
    told = snapshot.status.condition("Scheduled")
    if told is not None and _waits_to_try(snapshot, placement):
        return told.reason, told.message
    waiting = [m.pod for m in members if m.pod is not None and m.loss is None and not m.pod.scheduled]
    why = _schedulers_words(pod.unschedulable_message for pod in waiting if pod.unschedulable_message)
    if not why and waiting and snapshot.gang is not None and snapshot.gang.scheduled is False:
        why = snapshot.gang.message
    if any(pod.gated for pod in waiting):
        groups = sorted({pod.scheduling_group for pod in waiting if pod.gated and pod.scheduling_group})
        return reasons.GATED, (
            f"{placed} have a node, scheduling gates hold the others: quota of LocalQueue "
            f"{snapshot.spec.scheduling.queue or 'none'} is waited for; see `kubectl describe workload "
            f"{' '.join(groups)}`"
        )
    if why:
        return reasons.UNSCHEDULABLE, f"{placed} have a node, the others find no room: {why}"
    return reasons.WAITING_FOR_SCHEDULER, f"{placed} have a node"


def _schedulers_words(messages: Iterable[str]) -> str:
    """The message that says most: of a gang some Pods are told what nodes lack, others only that it is not whole."""
    heard = Counter(messages)
    telling = {message: times for message, times in heard.items() if NAMES_NODES in message} or heard
    return min(telling, key=lambda message: (-telling[message], message), default="")


def _waits_to_try(snapshot: Snapshot, placement: Placement | None) -> bool:
    """What the server did the last time stands until it is known to do better."""
    if placement is None or snapshot.problems or not (placement.held_back or placement.trying):
        return False
    told = snapshot.status.condition("Scheduled")
    return told is not None and told.reason in TRIED_SLOWLY


def refusals(snapshot: Snapshot) -> str:
    """All that the API server refused the last time, in its own words."""
    said = "; ".join(f"{what}: {message}" for what, message in sorted(snapshot.problems.items()))
    return f"the API server refused: {said}"


def training(snapshot: Snapshot, at_work: tuple[MemberView, ...], decision: Decision, outlook: str = "") -> Claim:
    """Iterations pass.

    Args:
        at_work: members that take part in the attempt that runs or is held, in rank order.
        outlook: what becomes of a gang that is not whole.
    """
    match decision:
        case Stay(waiting=""):
            return Claim("Training", "True", reasons.TRAINING, "iterations pass")
        case BackOff(message=message):
            return Claim("Training", "False", reasons.BACKING_OFF, message)
        case AwaitCause(failure):
            reason = reasons.HANGS if failure.cause is Cause.HANG else reasons.PEER_LOST
            return Claim("Training", "Unknown", reason, f"{failure.pod}: {failure.message}")
        case Unclear():
            return Claim(
                "Training",
                "Unknown",
                reasons.AGENTS_SILENT,
                "no agent renews its Lease; workers train on without it, so nothing is judged. Look at the API server "
                "and the network between it and the Pods; where the Pods themselves hang, delete one",
            )
        case Finished():
            return Claim("Training", "False", reasons.SUCCEEDED, "the last iteration is trained")
        case Hold(why=why, unsaved=True):
            return Claim("Training", "False", reasons.GRACE_EXCEEDED, why)
        case Stay(waiting) | Hold(why=waiting):
            return Claim("Training", "False", *_why_not_training(snapshot, at_work, waiting, outlook))
        case Go():
            return Claim("Training", "False", reasons.FORMING, "the process group forms")
        case Drain(because=because) | Leave(because=because):
            how = decision.waiting if isinstance(decision, Leave) else "the workers take a checkpoint and leave"
            known = snapshot.status.draining.message if snapshot.status.draining else ""
            why = because.message if because is not None else decision.why if isinstance(decision, Drain) else known
            return Claim("Training", "False", reasons.DRAINING, f"{why}; {how}" if why else how)
        case Ended(failure):
            how = how_it_ended(failure.cause, failure.message)
            return Claim("Training", "False", *_why_not_training(snapshot, at_work, how, outlook))


def how_it_ended(cause: str, message: str) -> str:
    return f"attempt ended by {cause} ({message})"


def _why_not_training(
    snapshot: Snapshot, at_work: tuple[MemberView, ...], otherwise: str, outlook: str
) -> tuple[str, str]:
    more_to_say = f"; {outlook}" if outlook else ""
    if "write assignment" in snapshot.problems:
        return reasons.REFUSED, refusals(snapshot)
    standing = [m for m in at_work if m.pod is not None and m.loss is None]
    for member in standing:
        assert member.pod is not None
        if trouble := waiting_trouble(member.pod):
            return trouble
    if problem := first_problem(at_work):
        return problem.reason, problem.message
    started = [m for m in standing if m.pod is not None and m.pod.scheduled]
    if len(started) < len(at_work):
        return (
            reasons.WAITING_FOR_PODS,
            f"{len(at_work) - len(started)} of {len(at_work)} Pods are not placed yet{more_to_say}",
        )
    silent = [m.pod_name for m in at_work if not m.live]
    if silent:
        more = f" and {len(silent) - 3} more" if len(silent) > 3 else ""
        return reasons.WAITING_FOR_AGENTS, f"Pods start: {', '.join(silent[:3])}{more}{more_to_say}"
    return reasons.FORMING, otherwise


def first_problem(members: Iterable[MemberView]) -> Problem | None:
    """Of the live agents, in the order given; the leader sees most and is to come first."""
    return next((m.report.problem for m in members if m.live and m.report and m.report.problem), None)


def checkpoint_verified(snapshot: Snapshot, status: StarCoderRunStatus, at_work: tuple[MemberView, ...]) -> Claim:
    """A verified checkpoint exists, and writing the last one went well."""
    problem, current = first_problem(at_work), own_assignment(snapshot)
    runs = current is not None and current.phase in ("run", "drain")
    if problem is not None and (runs or problem.reason in LEDGER_PROBLEMS):
        return Claim("CheckpointVerified", "False", problem.reason, problem.message)
    if status.checkpoint is None:
        return Claim("CheckpointVerified", "False", reasons.NO_CHECKPOINT_YET, "no checkpoint is verified yet")
    found = f"iteration {status.checkpoint.iteration} at {status.checkpoint.uri}"
    return Claim("CheckpointVerified", "True", reasons.VERIFIED, found)


def degraded(snapshot: Snapshot, status: StarCoderRunStatus, written: Assignment | None) -> tuple[Claim, ...]:
    """It trains with fewer Pods than it is to; said of an attempt that runs, until another does."""
    runs = written if written is not None else own_assignment(snapshot)
    if runs is None or runs.phase != "run":
        return ()
    spec, now = snapshot.spec, len(runs.members)
    if now >= spec.workers.replicas:
        return (Claim("Degraded", "False", reasons.WHOLE, f"all {spec.workers.replicas} Pods train"),)
    gpus, all_gpus = now * runs.gpus_per_member, spec.workers.gpus
    soonest = grows_after(snapshot, status)
    not_before = f", not before {soonest} (elasticity.growBack.interval)" if soonest else ""
    message = (
        f"trains with {now} of {spec.workers.replicas} Pods, DP{runs.layout.data} of DP{data_parallel(spec)}: "
        f"{gpus} of {all_gpus} GPUs ({100 * gpus // all_gpus}%) on the same global batch; it grows "
        f"when more Pods answer{not_before}"
    )
    if now < least(spec):
        message += f"; elasticity.minReplicas {least(spec)} was asked for since, and holds from the next attempt on"
    return (Claim("Degraded", "True", reasons.SHRUNK, message),)


def not_degraded(snapshot: Snapshot, reason: str, message: str) -> tuple[Claim, ...]:
    """Of a run that does not train and is not to; nothing where it never did."""
    return (Claim("Degraded", "False", reason, message),) if snapshot.status.condition("Degraded") else ()
