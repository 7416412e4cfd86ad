"""With how many of its Pods a run trains, and what stands by for those that are lost."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .base import ApiModel, Duration


class GrowBack(ApiModel):
    """How a run that trains with fewer Pods comes back to all of them."""

    interval: Duration = Duration("30m")
    """Shortest time between two growths, and from a shrink to the first; each takes a checkpoint and a restart. 0s: as
    soon as there is room."""


class Elasticity(ApiModel):
    """What happens when Pods are lost and find no place: data parallelism shrinks to what is left, the global batch and
    its samples stay the same, and it grows again when there is room."""

    min_replicas: Annotated[int, Field(ge=1, le=10000)] | None = None
    """Pods that the run trains with at least; with fewer it waits as a gang. Default: workers.replicas, so it never
    shrinks."""
    spares: Annotated[int, Field(ge=0, le=1000)] = 0
    """Pods beside workers.replicas that stand by with their agents and GPUs and take a lost one's place at once."""
    patience: Duration = Duration("60s")
    """How long lost Pods are waited for before the run goes on without them."""
    grow_back: GrowBack = GrowBack()
