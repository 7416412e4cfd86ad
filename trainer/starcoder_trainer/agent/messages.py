"""What an agent's state machine is told and what it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starcoder_trainer.agent import stall
from starcoder_trainer.contract.assignment import Assignment, Offer
from starcoder_trainer.contract.report import Failure, Problem, Verified
from starcoder_trainer.contract.stamp import Stamp
from starcoder_trainer.contract.worker import Exited, Saved, Sight, Start, Started, Step

GRACE_SECONDS = 300.0
"""terminationGracePeriodSeconds of a Pod whose spec does not say."""


@dataclass(frozen=True)
class Identity:
    """Who this agent is, and where its workers meet the others."""

    run_uid: str
    boot_id: str
    pod: str
    incarnation: int
    node: str
    address: str
    """IP of the Pod."""
    scratch: str
    grace_seconds: float = GRACE_SECONDS
    """From SIGTERM to SIGKILL."""
    stamps: str = ""
    """Folder for the workers' stamps, in memory; empty: workers are not watched."""


# Events. `now` is in seconds of any clock that only goes forward.


@dataclass(frozen=True)
class Assigned:
    """The assignment as the API server has it now."""

    now: float
    assignment: Assignment
    config: dict[str, Any]
    """`TrainingConfig.to_dict()`."""


@dataclass(frozen=True)
class WorkersReady:
    """The fork server is connected and has preloaded; it has no workers."""

    now: float


@dataclass(frozen=True)
class WorkersLost:
    """The fork server is gone and its workers with it."""

    now: float
    failure: Failure


@dataclass(frozen=True)
class WorkerStarted:
    now: float
    message: Started


@dataclass(frozen=True)
class WorkerStepped:
    now: float
    message: Step


@dataclass(frozen=True)
class WorkerSaved:
    now: float
    message: Saved


@dataclass(frozen=True)
class WorkerExited:
    now: float
    message: Exited


@dataclass(frozen=True)
class WorkersStopped:
    """No worker runs; the answer to `StopWorkers`."""

    now: float


@dataclass(frozen=True)
class Observed:
    """A look at the workers: the stamps of those that could be read."""

    now: float
    stamps: Mapping[int, Stamp]
    answered: bool
    """The fork server has answered since the look before."""


@dataclass(frozen=True)
class Testified:
    """The answer to `Interrogate`."""

    now: float
    attempt: int
    workers: tuple[Sight, ...] | None
    """None: the fork server did not answer."""
    where: str
    """Where stacks are to be found, as the end of a sentence."""


@dataclass(frozen=True)
class Prepared:
    """Leader: HEAD is claimed for `attempt`, the port is bound."""

    now: float
    attempt: int
    offer: Offer
    verified: Verified | None


@dataclass(frozen=True)
class PrepareHindered:
    """Leader: something outside must be mended first; it is tried again without being asked."""

    now: float
    attempt: int
    problem: Problem | None
    """None: it is mended, and the rest goes on."""


@dataclass(frozen=True)
class FencedOut:
    """Leader: HEAD belongs to attempt `by`."""

    now: float
    attempt: int
    by: int


@dataclass(frozen=True)
class ShardUploaded:
    """All local ranks' files of a step and their shard manifest are in the store."""

    now: float
    attempt: int
    step: int


@dataclass(frozen=True)
class UploadAbandoned:
    """A step will never be uploaded: newer ones took its place, or a later attempt has begun."""

    now: float
    attempt: int
    step: int


@dataclass(frozen=True)
class StorageTrouble:
    """Uploading or committing meets a problem (and goes on trying), or met one and is well again (None)."""

    now: float
    problem: Problem | None


@dataclass(frozen=True)
class CheckpointVerified:
    """Leader: HEAD lists a new step."""

    now: float
    attempt: int
    verified: Verified


@dataclass(frozen=True)
class CheckpointRefused:
    """Leader: a step will never be committed, since what was uploaded is not what was saved."""

    now: float
    attempt: int
    step: int
    message: str


@dataclass(frozen=True)
class Superseded:
    """A later Pod of the same member has answered."""

    now: float


@dataclass(frozen=True)
class WorkersTerminated:
    """SIGTERM came to the worker container: the Pod is to end. That container ends with its workers, and only then does
    the kubelet tell the agent's."""

    now: float


@dataclass(frozen=True)
class Terminated:
    """SIGTERM."""

    now: float


@dataclass(frozen=True)
class Ticked:
    now: float


Event = (
    Assigned
    | WorkersReady
    | WorkersLost
    | WorkerStarted
    | WorkerStepped
    | WorkerSaved
    | WorkerExited
    | WorkersStopped
    | Observed
    | Testified
    | Prepared
    | PrepareHindered
    | FencedOut
    | ShardUploaded
    | UploadAbandoned
    | StorageTrouble
    | CheckpointVerified
    | CheckpointRefused
    | Superseded
    | WorkersTerminated
    | Terminated
    | Ticked
)

# Actions.


@dataclass(frozen=True)
class StartWorkers:
    start: Start
    as_leader: bool
    """Hand over the listening socket that was bound for this attempt."""


@dataclass(frozen=True)
class StopWorkers:
    attempt: int


@dataclass(frozen=True)
class LeaveWorkers:
    """Have the workers save at the end of this iteration and end well; so will those of all other members."""

    attempt: int


@dataclass(frozen=True)
class Interrogate:
    """The workers hang: have each say what it can (stacks, last collective), and keep it. Answered by `Testified`."""

    overdue: stall.Overdue
    stamps: Mapping[int, Stamp]


@dataclass(frozen=True)
class QuitWorkers:
    """End the worker container with exit code 0."""


@dataclass(frozen=True)
class Prepare:
    """Leader: check, claim HEAD, choose a checkpoint, bind the port; an older preparation is abandoned."""

    attempt: int
    config: dict[str, Any]


@dataclass(frozen=True)
class Upload:
    attempt: int
    step: int
    world_size: int
    saved: tuple[Saved, ...]
    """Of all local ranks."""

    @property
    def last(self) -> bool:
        """Nothing is trained after it."""
        return any(saved.last for saved in self.saved)


@dataclass(frozen=True)
class Commit:
    """Leader: wait for the other members' shards of this step, verify, list it in HEAD."""

    attempt: int
    step: int
    members: int
    """Shards to wait for."""


@dataclass(frozen=True)
class Exit:
    """End the agent with exit code 0."""


Action = StartWorkers | StopWorkers | LeaveWorkers | Interrogate | QuitWorkers | Prepare | Upload | Commit | Exit
