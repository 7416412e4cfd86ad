"""What the operator tells the agents of a run: who belongs to which attempt, and whether to hold or to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .codec import Document

Phase = Literal["hold", "run", "drain", "stop"]
"""hold: stop workers of older attempts and answer idle; the leader claims HEAD and offers. run: form and train.
drain: of the attempt that runs: the workers take a checkpoint at the end of this iteration and end; it is uploaded and
committed. stop: training is over or suspended; stop the workers and end the worker container with exit code 0."""


@dataclass(frozen=True)
class Member:
    """One Pod's place in an attempt. Order in `Assignment.members` is rank order."""

    index: int
    boot_id: str = ""
    """The agent this place is for; empty while the member's Pod is being replaced."""


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism of the attempt; world size = tensor x pipeline x data."""

    tensor: int
    pipeline: int
    data: int
    sequence: bool = False

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        return f"TP{self.tensor} x PP{self.pipeline} x DP{self.data}"


@dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint that HEAD lists."""

    attempt: int
    step: int
    digest: str
    """`sha256:<hex>` of its manifest.json."""


@dataclass(frozen=True)
class Offer:
    """What the leader found while holding: where the gang meets and where it starts."""

    address: str
    """IP of the leader's Pod."""
    port: int
    """Port on which the leader's agent already listens for the TCPStore."""
    checkpoint: CheckpointRef | None = None
    """None: HEAD is there and lists no checkpoint, so training starts at iteration 0."""


@dataclass(frozen=True)
class Endpoint:
    address: str
    port: int


@dataclass(frozen=True)
class Relay:
    """The agent that all others beat to instead of renewing their Leases: the leader's as soon as it answers."""

    member: int
    boot_id: str
    endpoint: Endpoint


@dataclass(frozen=True)
class Assignment(Document):
    run_uid: str
    attempt: int
    phase: Phase
    members: tuple[Member, ...]
    gpus_per_member: int
    layout: Layout
    offer: Offer | None = None
    """In phases `run` and `drain`, copied from the leader's report of the same attempt."""
    relay: Relay | None = None
    """None: every agent renews its own Lease."""

    @property
    def leader(self) -> Member:
        """Member that holds rank 0."""
        return self.members[0]

    def place_of(self, boot_id: str) -> int | None:
        """Position of this agent in rank order; None where it is not listed (it then keeps still)."""
        return next((i for i, m in enumerate(self.members) if m.boot_id and m.boot_id == boot_id), None)
