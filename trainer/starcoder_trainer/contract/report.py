"""What an agent answers, as JSON in an annotation of its member's Lease."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .assignment import CheckpointRef, Endpoint, Offer
from .codec import Document

State = Literal["idle", "starting", "training", "draining", "left", "failed", "done"]
"""idle: no worker runs, the fork server is warm. draining: workers were asked to leave, or have left and their
checkpoint is still being uploaded or committed. left: the workers ended before the last iteration because one of the
gang was asked to leave; their checkpoint is uploaded and, on the leader, in HEAD. done: the last iteration is trained,
everything is uploaded and, on the leader, the last checkpoint is in HEAD."""

Cause = Literal[
    "UserError",
    "Crash",
    "DeviceError",
    "OutOfMemory",
    "ContainerCrashed",
    "Storage",
    "DataStall",
    "Hang",
    "Peer",
    "FormationTimeout",
    "AgentRestarted",
]
"""Why workers ended, as the agent saw it. DeviceError: CUDA, NCCL or the GPU under them. Peer: this rank ended because
another's connection broke, so the cause is elsewhere. DataStall, Hang: no progress for longer than the attempt allows,
because a rank waits for the store, or for another reason."""

ProblemReason = Literal[
    "CredentialsMissing",
    "StorageAccessDenied",
    "BucketNotFound",
    "StorageUnreachable",
    "DataNotFound",
    "DataInvalid",
    "TokenizerMismatch",
    "CheckpointForeign",
    "CheckpointLost",
    "WorkerNotReady",
    "WorkersStuck",
    "GraceExceeded",
]
"""What keeps an idle agent from going on. It tries again until the cause is mended; no attempt is used up.
GraceExceeded alone is about the past: the Pod had to end before its checkpoint was whole."""


@dataclass(frozen=True)
class Failure:
    """Why this member's workers of `Report.attempt` ended."""

    cause: Cause
    message: str
    """Last line of the exception or the signal's name; no secret, at most 1,000 characters."""
    exit_code: int | None = None
    """Negative: killed by that signal."""
    rank: int | None = None
    iteration: int | None = None
    """Iterations done when it happened; None before the first."""
    fingerprint: str = ""
    """Of an exception that the code itself raised (not the device, the network or storage): 16 hex digits, the same for
    the same error at the same place. Empty: a signal, or not the code's."""
    suspicion: tuple[int, ...] = ()
    """How surely this member is the one that keeps the others waiting: of failures of one cause in one attempt the
    smallest explains the others. Starts with 0 where nothing but this member can be the cause."""


@dataclass(frozen=True)
class Problem:
    reason: ProblemReason
    message: str
    """What was found, what was expected, what to do."""


@dataclass(frozen=True)
class Verified:
    """Newest checkpoint in HEAD, as the leader committed or found it."""

    checkpoint: CheckpointRef
    uri: str
    committed_at: str
    """RFC 3339, UTC, by the clock of the committer."""
    size_bytes: int = 0


@dataclass(frozen=True)
class Spent:
    """Seconds of the present attempt by what they went into, by this agent's own clock. Together: from the moment that
    its workers were asked for to the end of the last logged iteration, or of the attempt once that is done."""

    forming: float = 0.0
    """Workers started and the process group formed."""
    loading: float = 0.0
    """The model was built, the checkpoint loaded, the data opened."""
    data: float = 0.0
    """Iterations waited for samples, as this Pod's first rank did."""
    checkpoint: float = 0.0
    """Iterations stood still for checkpoints; at the end, until the last one was verified."""
    compute: float = 0.0
    """All else of the iterations."""
    first_iteration: float | None = None
    """How much of the last three the first iteration took; None until it is done."""

    @property
    def total(self) -> float:
        return self.forming + self.loading + self.data + self.checkpoint + self.compute


@dataclass(frozen=True)
class Progress:
    iteration: int = 0
    """Iterations done."""
    consumed_samples: int = 0
    consumed_tokens: int = 0
    loss: float | None = None
    """Mean over unmasked tokens of the last logged iteration."""
    tokens_per_second: float = 0.0
    """Of the whole gang."""
    spent: Spent | None = None
    """None until the workers of the attempt train."""


@dataclass(frozen=True)
class Report(Document):
    boot_id: str
    """New at each start of the agent's container."""
    pod: str
    incarnation: int
    node: str
    attempt: int
    """Attempt that `state` is about: the highest seen that lists this agent; 0 before the first. An agent that later
    ones do not list stands by: idle, and the last attempt that it was in."""
    state: State
    progress: Progress | None = None
    offer: Offer | None = None
    """Leader in phase hold."""
    verified: Verified | None = None
    """Leader."""
    failure: Failure | None = None
    problem: Problem | None = None
    fenced_by: int | None = None
    """HEAD belongs to this higher attempt; the operator must go beyond it."""
    listens: Endpoint | None = None
    """Where this agent takes heartbeats."""
    relayed_by: str = ""
    """Boot id of the relay that hears this agent: as long as that one renews its Lease and does not suspect this
    member, this Lease is not renewed. Empty: it is."""
    suspects: tuple[int, ...] = ()
    """Members that missed several beats in a row: on the relay those it hears no more, elsewhere the relay itself."""
