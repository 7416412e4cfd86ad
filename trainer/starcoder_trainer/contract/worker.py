"""Messages between agent and fork server: one JSON object a line over a Unix stream socket.

The fork server listens on `names.WORKER_SOCKET`; one agent is connected at a time, and when it goes the server
stops all workers, so that no worker ever runs unsupervised. Each message is `{"type": <class name>, ...fields}`.
`Start` of the leader carries the listening socket of the TCPStore as ancillary data (SCM_RIGHTS).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, get_args

from .assignment import CheckpointRef, Layout
from .codec import ContractError, Document
from .report import Failure


@dataclass(frozen=True)
class Start(Document):
    """Agent -> server: fork one worker for each rank."""

    attempt: int
    ranks: tuple[int, ...]
    layout: Layout
    master_address: str
    master_port: int
    checkpoint: CheckpointRef | None
    config: dict[str, Any]
    """`TrainingConfig.to_dict()`."""
    scratch: str
    """Folder for local checkpoints and the data cache."""
    interface_address: str
    """Own Pod IP: the network interface of collectives is the one that has it."""
    stamps: str = ""
    """Folder in which each worker keeps its stamp (contract/stamp.py); empty: none."""


@dataclass(frozen=True)
class Stop(Document):
    """Agent -> server: SIGKILL every worker's session, reap, answer `Stopped`."""

    attempt: int


@dataclass(frozen=True)
class Leave(Document):
    """Agent -> server -> its workers: save at the end of this iteration, with all ranks of the gang, and end well."""

    attempt: int


@dataclass(frozen=True)
class Look(Document):
    """Agent -> server: tell how the workers' processes are. Without `stacks` the answer comes at once."""

    attempt: int
    stacks: bool = False
    """Have each worker that can answer write the stacks of its threads, to the container's log and into the answer."""


@dataclass(frozen=True)
class Quit(Document):
    """Agent -> server: stop workers and exit with code 0 (the container is then done)."""


@dataclass(frozen=True)
class Ready(Document):
    """Server -> agent, once preloaded (again for each agent that connects)."""

    pid: int
    preload_seconds: float


@dataclass(frozen=True)
class Terminating(Document):
    """Server -> agent: SIGTERM came to the worker container, which the kubelet ends before the agent's. Workers go on
    until `Stop` or `Quit`."""


@dataclass(frozen=True)
class Started(Document):
    """Worker of `rank` formed its process group and loaded; training begins."""

    attempt: int
    rank: int
    iteration: int
    attention: str = ""
    """Kernel in use, e.g. `flash-attn-3` or `sdpa`."""
    loading_seconds: float = 0.0
    """From the process group's formation: building the model, loading the checkpoint, opening the data."""


@dataclass(frozen=True)
class Step(Document):
    """Rank of this Pod with the lowest number, after each logged iteration. Seconds by phase."""

    attempt: int
    rank: int
    iteration: int
    consumed_samples: int
    consumed_tokens: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    seconds: dict[str, float]
    """data, forward_backward, optimizer, total."""
    model_flops_utilisation: float | None = None
    """Share of the device's peak, where the device is known."""
    data_seconds: float = 0.0
    """Of all iterations since `Started`, waiting for samples."""
    checkpoint_seconds: float = 0.0
    """Since `Started`, iterations standing still for checkpoints."""


@dataclass(frozen=True)
class Saved(Document):
    """Worker: its local part of a checkpoint is on disk, rank manifest included."""

    attempt: int
    rank: int
    step: int
    directory: str
    seconds: float
    size_bytes: int
    last: bool = False
    """The worker ends after it."""


@dataclass(frozen=True)
class Collective(Document):
    """Worker, asked by a signal: the last collective that it entered."""

    attempt: int
    rank: int
    under_way: bool
    """It has not ended."""
    what: str
    """As a sentence about the rank, without its subject."""


@dataclass(frozen=True)
class Sight:
    """One worker as the server sees it from outside, and what it could still say."""

    rank: int
    pid: int
    state: str
    """The kernel's letter (`R` runs, `S` sleeps, `D` waits for a device or a disk, `T` is stopped); empty: it ended."""
    waits_in: str = ""
    """The kernel's function that it sleeps in, where that is told."""
    stacks: str = ""
    collective: Collective | None = None


@dataclass(frozen=True)
class Seen(Document):
    """Server -> agent, answer to `Look`."""

    attempt: int
    workers: tuple[Sight, ...]
    stacks: bool = False
    """As it was asked."""


@dataclass(frozen=True)
class Exited(Document):
    """Server: a worker ended and was reaped. `failure` is None where it ended well."""

    attempt: int
    rank: int
    exit_code: int
    failure: Failure | None = None
    left_at: int | None = None
    """It ended well before the last iteration, since one of the gang was asked to leave: iterations done, all of them
    in the checkpoint that it saved last."""


@dataclass(frozen=True)
class Stopped(Document):
    """Server: no worker runs."""

    attempt: int


Message = (
    Start
    | Stop
    | Leave
    | Look
    | Quit
    | Ready
    | Terminating
    | Started
    | Step
    | Saved
    | Collective
    | Seen
    | Exited
    | Stopped
)
_TYPES: dict[str, type[Message]] = {t.__name__: t for t in get_args(Message)}


def encode_line(message: Message) -> bytes:
    return (json.dumps({"type": type(message).__name__, **message.to_dict()}, separators=(",", ":")) + "\n").encode()


def decode_line(line: bytes) -> Message:
    """Raises ContractError for a line that is no known message."""
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ContractError(f"worker channel: not JSON ({e})") from e
    kind = _TYPES.get(str(value.get("type"))) if isinstance(value, dict) else None
    if kind is None:
        raise ContractError(f"worker channel: found {line[:80]!r}, expected one of {', '.join(_TYPES)}")
    return kind.from_dict(value)
