"""Why attempts end: the closed list of causes, who is charged, and how each is recognised.

The order of `CAUSES` is precedence. One event shows on many members at once (a lost node breaks every collective), so
the attempt's cause is the first in the table that any member shows: what explains the others comes before them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from starcoder_operator.api.v1alpha1 import LastFailure, Restarts, StarCoderRunStatus

from .members import LossKind, MemberView


class Cause(StrEnum):
    NODE_LOST = "NodeLost"
    DISRUPTED = "Disrupted"
    POD_DELETED = "PodDeleted"
    POD_FAILED = "PodFailed"
    OUT_OF_MEMORY = "OutOfMemory"
    USER_ERROR = "UserError"
    CRASH = "Crash"
    CONTAINER_CRASHED = "ContainerCrashed"
    AGENT_RESTARTED = "AgentRestarted"
    STORAGE = "Storage"
    AGENT_UNRESPONSIVE = "AgentUnresponsive"
    FENCED = "Fenced"
    FORMATION_TIMEOUT = "FormationTimeout"
    PEER = "Peer"


class Charge(StrEnum):
    NOBODY = "nobody"
    """The infrastructure's doing: the run may be restarted for it without end."""
    RUN = "run"
    """Counts against failurePolicy.maxRestartsWithoutProgress; refunded when a newer checkpoint is verified."""


class Response(StrEnum):
    RESTART = "restart"
    """Survivors keep their Pods and start their workers again; lost Pods are replaced under new names."""
    FAIL = "fail"
    """Another try would meet the same: the run is Failed at once."""


@dataclass(frozen=True)
class Rule:
    recognised: str
    charge: Charge
    response: Response = Response.RESTART


CAUSES: dict[Cause, Rule] = {
    Cause.NODE_LOST: Rule(
        "Node is NotReady, gone, has a NoExecute taint not tolerated, or is Unknown and its agent silent", Charge.NOBODY
    ),
    Cause.DISRUPTED: Rule("Pod has condition DisruptionTarget: preempted, evicted, node shut down", Charge.NOBODY),
    Cause.POD_DELETED: Rule("Pod is being deleted or is gone", Charge.NOBODY),
    Cause.POD_FAILED: Rule("Pod's phase is Failed: its node gave it up (restartPolicy is OnFailure)", Charge.NOBODY),
    Cause.OUT_OF_MEMORY: Rule("agent reports OutOfMemory, or the worker container was OOMKilled", Charge.RUN),
    Cause.USER_ERROR: Rule("agent reports UserError: configuration, data or import error", Charge.RUN, Response.FAIL),
    Cause.CRASH: Rule("agent reports Crash: a worker raised or was killed by a signal", Charge.RUN),
    Cause.CONTAINER_CRASHED: Rule("the worker container ended while its attempt was running", Charge.RUN),
    Cause.AGENT_RESTARTED: Rule("the boot id in the Lease is not the one in the assignment", Charge.RUN),
    Cause.STORAGE: Rule("agent reports Storage: S3 gave up after retries", Charge.NOBODY),
    Cause.AGENT_UNRESPONSIVE: Rule("the Lease is stale while another member's is fresh", Charge.NOBODY),
    Cause.FENCED: Rule("HEAD in S3 belongs to a higher attempt", Charge.NOBODY),
    Cause.FORMATION_TIMEOUT: Rule("agent reports FormationTimeout: the process group did not form", Charge.RUN),
    Cause.PEER: Rule("workers lost their connection to others, and no other cause showed in time", Charge.RUN),
}

PRECEDENCE = {cause: i for i, cause in enumerate(CAUSES)}

_LOSSES = {
    LossKind.NODE: Cause.NODE_LOST,
    LossKind.DISRUPTED: Cause.DISRUPTED,
    LossKind.DELETED: Cause.POD_DELETED,
    LossKind.FAILED: Cause.POD_FAILED,
    LossKind.FINISHED: Cause.CONTAINER_CRASHED,
    LossKind.SILENT: Cause.AGENT_UNRESPONSIVE,
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

    @property
    def rule(self) -> Rule:
        return CAUSES[self.cause]

    def as_status(self, now: str) -> LastFailure:
        return LastFailure(
            cause=self.cause,
            node=self.node or None,
            pod=self.pod or None,
            exit_code=self.exit_code,
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
    """The one that explains the others; of equals the lowest member's."""
    return min(failures, key=lambda f: (PRECEDENCE[f.cause], f.member), default=None)


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

    def sign(cause: Cause, message: str, exit_code: int | None = None) -> Failure:
        return Failure(cause, member.index, member.pod_name, member.node, message, exit_code)

    if own and report is not None and report.fenced_by is not None and report.fenced_by > attempt:
        return sign(Cause.FENCED, f"HEAD in S3 belongs to attempt {report.fenced_by}, this is {attempt}")
    if own and report is not None and report.state == "failed":
        said = report.failure
        if said is None:
            return sign(Cause.CRASH, "the agent reports its workers as failed and gives no cause")
        where = "" if said.rank is None else f"rank {said.rank}: "
        return sign(Cause(said.cause), where + said.message, said.exit_code)
    worker = member.worker
    if worker is not None and not worker.ready and worker.exit_code is not None:
        if worker.terminated_reason == "OOMKilled":
            return sign(Cause.OUT_OF_MEMORY, "the worker container was OOMKilled; raise its memory", worker.exit_code)
        why = worker.terminated_reason or worker.waiting_reason or "no reason given"
        return sign(
            Cause.CONTAINER_CRASHED, f"the worker container ended with exit code {worker.exit_code} ({why})",
            worker.exit_code,
        )  # fmt: skip
    if member.report is not None and member.report.boot_id != boot_id:
        agent = member.agent
        why = agent.terminated_reason if agent else ""
        return sign(Cause.AGENT_RESTARTED, "the agent's container was started again" + (f" ({why})" if why else ""))
    return lost(member)


def charged(status: StarCoderRunStatus, failure: Failure, now: str) -> StarCoderRunStatus:
    """The status with this failure counted, once."""
    return status.model_copy(update={
        "restarts": _counted(status.restarts, failure.cause, 1),
        "restarts_without_progress": status.restarts_without_progress + (failure.rule.charge is Charge.RUN),
        "last_failure": failure.as_status(now),
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
