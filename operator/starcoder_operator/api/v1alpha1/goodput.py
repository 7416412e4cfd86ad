"""Where a run's time went, and what its last recoveries took."""

from __future__ import annotations

from typing import Literal, get_args

from .base import ApiModel

Bucket = Literal[
    "queued", "starting", "training", "retraining", "checkpointStall", "detecting", "placing", "forming", "loading",
    "dataWait", "suspended", "degraded",
]  # fmt: skip
"""As `Buckets` names them."""

BUCKETS: tuple[Bucket, ...] = get_args(Bucket)


class Buckets(ApiModel):
    """Seconds of the run's life, each in exactly one bucket; they add up to asOf - since."""

    queued: float = 0.0
    """Waiting for acceptance or for room, outside of a recovery."""
    starting: float = 0.0
    """Pods have nodes and get ready: images, containers, agents; and between two planned attempts."""
    training: float = 0.0
    """Iterations that were never done before: what the run is for."""
    retraining: float = 0.0
    """Iterations that were done before and lost with an attempt."""
    checkpoint_stall: float = 0.0
    """Iterations stood still for a checkpoint, or the end waited for the last one."""
    detecting: float = 0.0
    """From a fault, as best known, until survivors were told to stop."""
    placing: float = 0.0
    """From there until every member of the next attempt was there and it might begin: lost Pods replaced, back-off
    waited out, what hindered the leader mended."""
    forming: float = 0.0
    """Survivors stop their workers, the leader claims HEAD, workers start, the process group forms."""
    loading: float = 0.0
    """Workers build the model, load the checkpoint, open the data."""
    data_wait: float = 0.0
    """Iterations waited for samples, as rank 0 did."""
    suspended: float = 0.0
    """By spec.suspend."""
    degraded: float = 0.0
    """Of each training second with fewer data-parallel copies than the spec has: the share that they are missing."""


class Reported(ApiModel):
    """Where the leader's report of an attempt stood at asOf, in seconds of its own clock; the account goes on there."""

    attempt: int
    """Attempt it was about."""
    iteration: int
    """Iterations done."""
    forming: float = 0.0
    """Seconds."""
    loading: float = 0.0
    """Seconds."""
    data: float = 0.0
    """Seconds."""
    checkpoint: float = 0.0
    """Seconds."""
    compute: float = 0.0
    """Seconds."""


class Goodput(ApiModel):
    """Where the run's time went."""

    ratio: float | None = None
    """training / all seconds but suspended ones."""
    buckets: Buckets = Buckets()
    bucket: Bucket | None = None
    """What seconds after asOf go into, unless reports say better; absent when the run is over."""
    since: str
    """Begin of the account: the run's creation, RFC 3339."""
    as_of: str
    """To when it goes, RFC 3339; while an attempt trains, to the last iteration that was heard of."""
    reached: int = 0
    """Iterations done at most: up to here they are done again."""
    reported: Reported | None = None


Stage = Literal["placing", "forming", "firstStep"]


class StageSeconds(ApiModel):
    """Seconds by stage, in their order."""

    detecting: float | None = None
    """From the fault, as best known, until survivors were told to stop."""
    placing: float | None = None
    """Until every member of the next attempt was there and it might begin; absent where nothing was waited for."""
    forming: float | None = None
    """Until the process group had formed: old workers stopped, HEAD claimed, new ones started."""
    loading: float | None = None
    """Until workers were ready: model built, checkpoint loaded, data opened."""
    first_step: float | None = None
    """Until the first iteration was done."""


class Recovery(ApiModel):
    """What came after an attempt that ended by a failure."""

    cause: str
    """As in lastFailure."""
    node: str | None = None
    """As in lastFailure."""
    pod: str | None = None
    """As in lastFailure."""
    member: int | None = None
    """Index of the member that failed first."""
    at: str
    """When the fault happened, as best known: seen by the operator's clock, RFC 3339."""
    from_attempt: int
    """Attempt that ended."""
    to_attempt: int
    """Attempt that went on, or is to."""
    iteration: int
    """Iterations done when it ended, as far as was heard."""
    resumed_at: int | None = None
    """Iteration of the checkpoint that the next attempt went on from."""
    iterations_lost: int | None = None
    """iteration - resumedAt: to be done again."""
    seconds: StageSeconds = StageSeconds()
    total: float | None = None
    """Seconds from the fault to the first iteration after it; absent until then, and where something else came
    between: another failure, a suspension, the end."""
    stage: Stage | None = None
    """What it is at; absent when it is over."""
