"""Why attempts end: the closed list of causes, who is charged, and how each is recognised.

The order of `CAUSES` is precedence. One event shows on many members at once (a lost node breaks every collective), so
the attempt's cause is the first in the table that any member shows: what explains the others comes before them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from starcoder_operator.api.v1alpha1 import LastFailure, Restarts, StarCoderRunStatus

from .members import LossKind, MemberView


class Cause(StrEnum):
    NODE_LOST = "NodeLost"
    DEVICE_UNHEALTHY = "DeviceUnhealthy"
    DISRUPTED = "Disrupted"
    POD_DELETED = "PodDeleted"
    POD_FAILED = "PodFailed"
    NODE_RESTARTED = "NodeRestarted"
    OUT_OF_MEMORY = "OutOfMemory"
    USER_ERROR = "UserError"
    DEVICE_ERROR = "DeviceError"
    CRASH = "Crash"
    CONTAINER_CRASHED = "ContainerCrashed"
    AGENT_RESTARTED = "AgentRestarted"
    STORAGE = "Storage"
    DATA_STALL = "DataStall"
    AGENT_UNRESPONSIVE = "AgentUnresponsive"
    FENCED = "Fenced"
    HANG = "Hang"
    NETWORK_CUT = "NetworkCut"
    FORMATION_TIMEOUT = "FormationTimeout"
    PEER = "Peer"


class Charge(StrEnum):
    NOBODY = "nobody"
    """The infrastructure's doing: the run may be restarted for it without end."""
    RUN = "run"
    """Counts against failurePolicy.maxRestartsWithoutProgress; refunded when a newer checkpoint is verified."""


class Response(StrEnum):
    RESTART = "restart in place"
    """The member keeps its Pod and starts its workers again, as all survivors do."""
    REPLACE = "replace the Pod"
    """Under a new name, elsewhere; a spare takes the place at once, and where no Pod finds room in time the run shrinks
    (spec.elasticity)."""
    FAIL = "fail"
    """Another try would meet the same: the run is Failed at once."""


@dataclass(frozen=True)
class Rule:
    recognised: str
    charge: Charge
    response: Response
    blames_node: bool = False
    """Such failures are counted by node; one that has failed a run twice within an hour is avoided (`avoidance`)."""


CAUSES: dict[Cause, Rule] = {
    Cause.NODE_LOST: Rule(
        "Node is NotReady, gone, has a NoExecute taint not tolerated, or is Unknown and its agent silent",
        Charge.NOBODY, Response.REPLACE, blames_node=True,
    ),
    Cause.DEVICE_UNHEALTHY: Rule(
        "Node has a condition of the operator's list of device faults (setting device-fault-conditions)",
        Charge.NOBODY, Response.REPLACE, blames_node=True,
    ),
    Cause.DISRUPTED: Rule(
        "Pod has condition DisruptionTarget: preempted, evicted, node shut down", Charge.NOBODY, Response.REPLACE
    ),
    Cause.POD_DELETED: Rule("Pod is being deleted or is gone", Charge.NOBODY, Response.REPLACE),
    Cause.POD_FAILED: Rule(
        "Pod's phase is Failed: its node gave it up (restartPolicy is OnFailure)",
        Charge.NOBODY, Response.REPLACE, blames_node=True,
    ),
    Cause.NODE_RESTARTED: Rule(
        "the kubelet does not know how the Pod's containers ended (exit code 255, reason Unknown): they went with "
        "their node or its container runtime, which are back",
        Charge.NOBODY, Response.RESTART, blames_node=True,
    ),
    Cause.OUT_OF_MEMORY: Rule(
        "agent reports OutOfMemory, or the worker container was OOMKilled", Charge.RUN, Response.RESTART
    ),
    Cause.USER_ERROR: Rule(
        "agent reports UserError: configuration, data or import error; or an exception of the code came twice at the "
        "same iteration on different nodes",
        Charge.RUN, Response.FAIL,
    ),
    Cause.DEVICE_ERROR: Rule(
        "agent reports DeviceError: an error of CUDA, NCCL or the device under it",
        Charge.RUN, Response.RESTART, blames_node=True,
    ),
    Cause.CRASH: Rule("agent reports Crash: a worker raised or was killed by a signal", Charge.RUN, Response.RESTART),
    Cause.CONTAINER_CRASHED: Rule(
        "the worker container ended while its attempt was running", Charge.RUN, Response.RESTART
    ),
    Cause.AGENT_RESTARTED: Rule(
        "the boot id in the Lease is not that in the assignment, or the kubelet says that the agent's container ended",
        Charge.RUN, Response.RESTART,
    ),
    Cause.STORAGE: Rule("agent reports Storage: S3 gave up after retries", Charge.NOBODY, Response.RESTART),
    Cause.DATA_STALL: Rule(
        "agent reports DataStall: no progress, and a rank waits for data or a checkpoint",
        Charge.NOBODY, Response.RESTART,
    ),
    Cause.AGENT_UNRESPONSIVE: Rule(
        "the agent misses its heartbeats while others are heard", Charge.NOBODY, Response.REPLACE, blames_node=True
    ),
    Cause.FENCED: Rule("HEAD in S3 belongs to a higher attempt", Charge.NOBODY, Response.RESTART),
    Cause.HANG: Rule(
        "agent reports Hang: no progress for longer than this attempt's own iterations and failurePolicy.hang allow",
        Charge.RUN,  # code that hangs at the same place again would do so for ever
        Response.RESTART, blames_node=True,
    ),
    Cause.NETWORK_CUT: Rule(
        "workers lost their connection to others or did not meet, and agents that renew their Leases don't hear each "
        "other",
        Charge.NOBODY, Response.RESTART, blames_node=True,
    ),
    Cause.FORMATION_TIMEOUT: Rule(
        "agent reports FormationTimeout: the process group did not form", Charge.RUN, Response.RESTART
    ),
    Cause.PEER: Rule(
        "workers lost their connection to others, and no other cause showed in time", Charge.RUN, Response.RESTART
    ),
}  # fmt: skip
"""How each cause is recognised, who is charged, what is done with the member it shows on."""

OF_PEERS = frozenset({Cause.PEER, Cause.FORMATION_TIMEOUT})
"""A member that is lost explains them."""
PRECEDENCE = {cause: i for i, cause in enumerate(CAUSES)}

_MET_BY_OTHERS = frozenset({Cause.HANG, Cause.DEVICE_ERROR})

_LOSSES = {
    LossKind.NODE: Cause.NODE_LOST,
    LossKind.DEVICE: Cause.DEVICE_UNHEALTHY,
    LossKind.DISRUPTED: Cause.DISRUPTED,
    LossKind.DELETED: Cause.POD_DELETED,
    LossKind.FAILED: Cause.POD_FAILED,
    LossKind.FINISHED: Cause.CONTAINER_CRASHED,
    LossKind.SILENT: Cause.AGENT_UNRESPONSIVE,
    LossKind.STUCK: Cause.HANG,
}


@dataclass(frozen=True)
class Failure:
    """One member's sign that its attempt has ended."""

    cause: Cause
    member: int
    pod: str
    node: str
    message: str
    exit_code: int | None = None
    iteration: int | None = None
    """Iterations done before it; None: before the first of its attempt, or not known."""
    fingerprint: str = ""
    """Of an exception of the code's own (`contract.report.Failure.fingerprint`)."""
    suspicion: tuple[int, ...] = ()
    """As the agent says: of one cause the smallest explains the others."""

    @property
    def may_have_another_cause(self) -> bool:
        """Another member's failure may explain it, or the kubelet may say why a container ended; both may still be on
        their way."""
        unexplained = self.cause is Cause.CONTAINER_CRASHED and self.exit_code is None
        return self.cause in OF_PEERS or unexplained or (self.cause is Cause.HANG and self.suspicion[:1] != (0,))

    @property
    def rule(self) -> Rule:
        return CAUSES[self.cause]

    def as_status(self, now: str, nodes: tuple[str, ...] = ()) -> LastFailure:
        """`nodes`: where the same was seen, this member's included."""
        return LastFailure(
            cause=self.cause,
            node=self.node or None,
            pod=self.pod or None,
            member=self.member,
            exit_code=self.exit_code,
            iteration=self.iteration,
            fingerprint=self.fingerprint or None,
            nodes=nodes or ((self.node,) if self.node else ()),
            message=self.message,
            at=now,
        )


def find(members: Iterable[MemberView], attempt: int, boot_ids: dict[int, str]) -> tuple[Failure, ...]:
    """Signs of failure of a running attempt, in member order.

    Args:
        attempt: the attempt that runs.
        boot_ids: member to the agent that the assignment lists.
    """
    found = (_of_member(m, attempt, boot_ids.get(m.index, "")) for m in members)
    return tuple(f for f in found if f is not None)


def primary(failures: Iterable[Failure]) -> Failure | None:
    """The one that explains the others: by cause, then by suspicion; of equals the lowest member's."""
    return min(failures, key=lambda f: (PRECEDENCE[f.cause], f.suspicion, f.member), default=None)


def origins(found: Failure, signs: Iterable[Failure]) -> tuple[Failure, ...]:
    """Failures that are nobody's consequence: `found`, and the losses beside it.

    Args:
        found: the `primary` one.
        signs: the others. A rank that stands still has all others hang with it, whatever it waits for, and the error
            of one device is met by those that communicate with it: of such signs only the primary one counts.
    """
    return found, *(s for s in signs if s.cause not in _MET_BY_OTHERS)


def lost(member: MemberView) -> Failure | None:
    """The member's Pod can't go on, whatever its attempt."""
    if member.loss is None:
        return None
    cause = _LOSSES[member.loss.kind]
    return Failure(cause, member.index, member.pod_name, member.loss.node, member.loss.message)


def _of_member(member: MemberView, attempt: int, boot_id: str) -> Failure | None:
    report = member.lease.report if member.lease else None
    own = report is not None and report.boot_id == boot_id and report.attempt == attempt
    if own and report is not None and report.state == "done":
        return None
    if member.loss is not None and member.loss.kind is not LossKind.SILENT:
        return lost(member)

    def sign(cause: Cause, message: str, exit_code: int | None = None, **more: Any) -> Failure:
        return Failure(cause, member.index, member.pod_name, member.node, message, exit_code, **more)

    if own and report is not None and report.fenced_by is not None and report.fenced_by > attempt:
        return sign(Cause.FENCED, f"HEAD in S3 belongs to attempt {report.fenced_by}, this is {attempt}")
    if own and report is not None and report.state == "failed":
        said = report.failure
        if said is None:
            return sign(Cause.CRASH, "the agent reports its workers as failed and gives no cause")
        if Cause(said.cause) is Cause.CONTAINER_CRASHED and (ended := _of_container(member)) is not None:
            return sign(*ended)
        where = "" if said.rank is None else f"rank {said.rank}: "
        return sign(
            Cause(said.cause), where + said.message, said.exit_code,
            iteration=said.iteration, fingerprint=said.fingerprint, suspicion=said.suspicion,
        )  # fmt: skip
    worker = member.worker
    ended = None if worker is None or worker.ready or member.heard_since else _of_container(member)
    if ended is not None:
        return sign(*ended)
    is_another = member.report is not None and member.report.boot_id != boot_id
    if (is_another or member.agent_is_down) and (went := with_its_node(member)):
        return went
    if is_another:
        agent = member.agent
        why = agent.terminated_reason if agent else ""
        return sign(Cause.AGENT_RESTARTED, "the agent's container was started again" + (f" ({why})" if why else ""))
    if member.agent_is_down and member.agent is not None:
        code = member.agent.exit_code
        return sign(Cause.AGENT_RESTARTED, f"the agent's container ended with exit code {code}, and starts again", code)
    return lost(member)


def with_its_node(member: MemberView) -> Failure | None:
    """The agent's container was lost with its node or the container runtime, the last time that it ended."""
    agent = member.agent
    if agent is None or not agent.went_with_its_node:
        return None
    return Failure(
        Cause.NODE_RESTARTED, member.index, member.pod_name, member.node, _went(member), agent.exit_code
    )  # fmt: skip


def _went(member: MemberView) -> str:
    return f"the containers of Pod {member.pod_name} went with node {member.node} or its runtime, which has restarted"


def _of_container(member: MemberView) -> tuple[Cause, str, int] | None:
    """What the kubelet says of the end of the worker container; None while it says nothing."""
    worker = member.worker
    if worker is None or worker.exit_code is None:
        return None
    if worker.terminated_reason == "OOMKilled":
        return Cause.OUT_OF_MEMORY, "the worker container was OOMKilled; raise its memory", worker.exit_code
    if worker.went_with_its_node:
        return Cause.NODE_RESTARTED, _went(member), worker.exit_code
    why = worker.terminated_reason or worker.waiting_reason or "no reason given"
    message = f"the worker container ended with exit code {worker.exit_code} ({why})"
    return Cause.CONTAINER_CRASHED, message, worker.exit_code


def rule_of(cause: str) -> Rule | None:
    """Of a cause as a status has it; None for one that another version of the operator knew."""
    return CAUSES[Cause(cause)] if cause in set(Cause) else None


def was_charged(last: LastFailure) -> bool:
    """To the run."""
    rule = rule_of(last.cause)
    return rule is not None and rule.charge is Charge.RUN


def charged(status: StarCoderRunStatus, failure: Failure, now: str, nodes: tuple[str, ...] = ()) -> StarCoderRunStatus:
    """The status with this failure counted, once. `nodes`: where the same was seen."""
    return status.model_copy(update={
        "restarts": _counted(status.restarts, failure.cause, 1),
        "restarts_without_progress": status.restarts_without_progress + (failure.rule.charge is Charge.RUN),
        "last_failure": failure.as_status(now, nodes),
    })  # fmt: skip


def reattributed(status: StarCoderRunStatus, failure: Failure) -> StarCoderRunStatus:
    """The status with its last failure put down to the cause that was found since; the count stays the same."""
    last = status.last_failure
    assert last is not None
    before = CAUSES[Cause(last.cause)]
    refund = (before.charge is Charge.RUN) - (failure.rule.charge is Charge.RUN)
    restarts = _counted(_counted(status.restarts, last.cause, -1), failure.cause, 1)
    return status.model_copy(update={
        "restarts": restarts.model_copy(update={"total": status.restarts.total}),
        "restarts_without_progress": max(0, status.restarts_without_progress - refund),
        "last_failure": failure.as_status(last.at),
    })  # fmt: skip


def refunded(status: StarCoderRunStatus) -> StarCoderRunStatus:
    """The status after progress: nothing is charged any more."""
    return status.model_copy(update={"restarts_without_progress": 0})


def _counted(restarts: Restarts, cause: str, by: int) -> Restarts:
    counts = dict(restarts.by_cause)
    counts[cause] = counts.get(cause, 0) + by
    return Restarts(total=restarts.total + by, by_cause={k: v for k, v in counts.items() if v > 0})
