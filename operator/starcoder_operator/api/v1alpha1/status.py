"""What the operator says about a run. Written by the operator alone, in one server-side apply."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field

from .base import ApiModel
from .goodput import Goodput, Recovery

State = Literal["Pending", "Starting", "Running", "Recovering", "Suspended", "Succeeded", "Failed"]
"""Pending: waits for acceptance or for room. Starting: Pods start, the process group forms. Running: iterations pass.
Recovering: an attempt ended by a failure, the next one forms. Suspended, Succeeded, Failed: no Pods."""

ConditionType = Literal["Accepted", "Scheduled", "Training", "CheckpointVerified", "Degraded", "Complete"]


class Condition(ApiModel):
    """As metav1.Condition."""

    type: ConditionType
    """Accepted: the spec is valid and what it names exists. Scheduled: every Pod has a node. Training: iterations pass.
    CheckpointVerified: a verified checkpoint exists and the last attempt to write one went well. Degraded: the last
    attempt that ran had fewer Pods than workers.replicas. Complete: the last iteration is trained and its checkpoint
    verified."""
    status: Literal["True", "False", "Unknown"]
    """True, False or Unknown."""
    reason: str
    """One word in CamelCase, for programs."""
    message: str = ""
    """What was found, what was expected, what to do; for people."""
    last_transition_time: str
    """When status changed, RFC 3339."""
    observed_generation: int | None = None
    """metadata.generation that this is about."""


class Restarts(ApiModel):
    """Attempts that ended by a failure."""

    total: int = 0
    """Over the run's life."""
    by_cause: dict[str, int] = Field(default={})
    """Cause to number."""


class WorkersStatus(ApiModel):
    """Pods."""

    ready: int = 0
    """Pods whose agent answers, up to desired; what is beyond stands by."""
    desired: int = 0
    """Pods that are to train, workers.replicas."""
    summary: str = "0/0"
    """ready/desired."""
    spares: int = 0
    """Pods beside them that stand by and whose agent answers."""

    training: int = 0
    """Pods that take part in the attempt that runs, or ran last."""

    @classmethod
    def of(cls, answering: int, desired: int, training: int = 0) -> Self:
        ready = min(answering, desired)
        summary = f"{ready}/{desired}"
        return cls(ready=ready, desired=desired, summary=summary, spares=answering - ready, training=training)


class LayoutStatus(ApiModel):
    """Degrees of parallelism of the present attempt."""

    tensor: int
    """GPUs that share each layer's matrices."""
    pipeline: int
    """Stages of layers."""
    data: int
    """Copies of the model that work on different samples."""
    summary: str
    """For example TP4 x PP4 x DP32."""

    @classmethod
    def of(cls, tensor: int, pipeline: int, data: int) -> Self:
        return cls(tensor=tensor, pipeline=pipeline, data=data, summary=f"TP{tensor} x PP{pipeline} x DP{data}")


class CheckpointStatus(ApiModel):
    """Newest verified checkpoint."""

    iteration: int
    """Iterations it holds."""
    uri: str
    """Its folder."""
    digest: str
    """sha256:… of its manifest.json."""
    committed_at: str
    """When it was verified and listed in HEAD.json, RFC 3339."""


class LastFailure(ApiModel):
    """Why the attempt before ended."""

    cause: str
    """One word in CamelCase; see docs/failure-modes.md."""
    node: str | None = None
    """Where it happened, if it was one node."""
    pod: str | None = None
    """Pod that failed first."""
    member: int | None = None
    """Its member's index."""
    exit_code: int | None = None
    """Of the worker process; negative: killed by that signal."""
    iteration: int | None = None
    """Iterations done before it. None: before the first of the attempt, or not known."""
    fingerprint: str | None = None
    """Of an exception of the code's own: the same for the same error at the same place. One that comes again at the
    same iteration on other nodes is a UserError."""
    nodes: tuple[str, ...] = ()
    """Where the same was seen, up to eight."""
    message: str = ""
    """What was seen."""
    at: str
    """When the operator saw it, RFC 3339."""


class NodeFailure(ApiModel):
    """A failure that speaks against a node."""

    node: str
    cause: str
    """One word in CamelCase; see docs/failure-modes.md."""
    at: str
    """When the operator saw it, RFC 3339."""


class AvoidedNode(ApiModel):
    """A node that this run's Pods keep away from."""

    node: str
    failures: int
    """Of this run, there."""
    reason: str
    """What they were."""
    since: str
    """RFC 3339."""
    until: str
    """When it is used again, RFC 3339; earlier where the run finds no place without it."""


class Draining(ApiModel):
    """The gang leaves its attempt with a checkpoint; none of its iterations is lost."""

    since: str
    """When it was told to, RFC 3339."""
    cause: str | None = None
    """Why its attempt ends, one word in CamelCase; see docs/failure-modes.md. None: because that was planned."""
    pod: str | None = None
    """Pod that is on its way out."""
    node: str | None = None
    """Where that is."""
    message: str = ""
    """What was seen."""


class StarCoderRunStatus(ApiModel):
    """Is it fine? State and message say so, the rest says why."""

    state: State = "Pending"
    """Pending, Starting, Running, Recovering, Suspended, Succeeded or Failed."""
    reason: str | None = None
    """Reason of the condition that explains state, one word in CamelCase."""
    message: str = ""
    """What is going on and, where something is wrong, what to do."""
    observed_generation: int = 0
    """metadata.generation that this status is about."""
    conditions: tuple[Condition, ...] = Field(default=(), json_schema_extra={"x-kubernetes-list-map-keys": ["type"]})
    """Accepted, Scheduled, Training, CheckpointVerified, Degraded, Complete."""
    attempt: int = 0
    """Formations of the process group so far."""
    placement: int = 0
    """Times the whole gang was placed; the PodGroup's number."""
    incarnations: tuple[int, ...] = ()
    """Highest incarnation given to a Pod of each member, by member index; written before the Pod is created, so that
    no name is ever used twice. -1: none yet."""
    restarts: Restarts = Restarts()
    restarts_without_progress: int = 0
    """Failures charged since the last newer verified checkpoint."""
    workers: WorkersStatus = WorkersStatus()
    waiting_since: str | None = None
    """Since when Pods that were lost are waited for by enough others to train without them, RFC 3339;
    elasticity.patience counts from here."""
    awaiting_cause_since: str | None = None
    """Where a connection was lost, or a rank hangs: since when the cause is waited for, RFC 3339."""
    resized_at: str | None = None
    """Where fewer Pods than workers.replicas train: when the first attempt with as many began, RFC 3339;
    elasticity.growBack.interval counts from here."""
    layout: LayoutStatus | None = None
    iteration: int = 0
    """Iterations done."""
    iterations: int = 0
    """Iterations the run has in all."""
    progress: str | None = None
    """iteration of iterations, for example 42%."""
    consumed_tokens: int = 0
    """Tokens trained on, padding included."""
    loss: str | None = None
    """Mean loss a token of the last logged iteration, four decimals. Text, so that nan and inf can be said, which JSON
    numbers can't, and columns show every digit."""
    tokens_per_second: int | None = None
    """Of the whole gang, whole tokens: numbers with a fraction are shown as 1.2e+06 in columns."""
    tokens_per_second_per_gpu: int | None = Field(
        default=None, validation_alias="tokensPerSecondPerGPU", serialization_alias="tokensPerSecondPerGPU"
    )
    """Whole tokens."""
    eta: str | None = None
    """When the last iteration will be done at the present rate, RFC 3339."""
    checkpoint: CheckpointStatus | None = None
    last_failure: LastFailure | None = None
    draining: Draining | None = None
    """While the gang leaves its attempt."""
    goodput: Goodput | None = None
    """Where the run's time went."""
    recoveries: tuple[Recovery, ...] = ()
    """The last ten, oldest first."""
    node_failures: tuple[NodeFailure, ...] = ()
    """Of about the last hour, oldest first."""
    avoided_nodes: tuple[AvoidedNode, ...] = ()
    """Nodes on which the run failed twice within an hour."""
    started_at: str | None = None
    """First iteration of the first attempt, RFC 3339."""
    completed_at: str | None = None
    """When the run became Succeeded or Failed, RFC 3339."""

    def condition(self, type: ConditionType) -> Condition | None:
        """The condition of that type, None where it was never set."""
        return next((c for c in self.conditions if c.type == type), None)


def loss_text(loss: float) -> str:
    """As `status.loss` shows it: `1.2346`, `nan`, `inf`."""
    return f"{loss:.4f}" if math.isfinite(loss) else str(loss)


def progress_text(iteration: int, iterations: int) -> str:
    """As `status.progress` shows it, rounded down so that 100% means done."""
    return f"{100 * iteration // iterations}%"
