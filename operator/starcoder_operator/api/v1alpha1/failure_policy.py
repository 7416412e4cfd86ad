"""When a run is tried again, how soon and where, and when it is given up."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .base import ApiModel, Duration


class Backoff(ApiModel):
    """Wait before an attempt, from the second charged failure, failed read of data or cut of the network, without a
    newer verified checkpoint on: the first is answered at once. It doubles with each, and of it between half and all is
    waited, drawn by the run's uid."""

    initial: Duration = Duration("10s")
    """The first wait. 0s: never wait."""
    max: Duration = Duration("5m")
    """The longest."""


class NodeAvoidance(ApiModel):
    """Nodes on which this run failed twice within an hour, or on which a Pod of it did not come up for 15 minutes
    though others did elsewhere, are not used by its Pods for a while."""

    ttl: Duration = Duration("6h")
    """How long such a node is avoided. 0s: none ever is."""


class Hang(ApiModel):
    """Shortest times without progress after which an attempt is taken to hang and is restarted. What nearly all
    iterations of the attempt took, 8 times, is allowed in any case."""

    iteration: Duration = Duration("2m")
    """From one iteration to the next."""
    first_iteration: Duration = Duration("15m")
    """From the process group's formation to the end of the first iteration: building, loading, compiling, opening the
    data. Also for each of the next two."""
    checkpoint: Duration = Duration("10m")
    """From one iteration to the next with a checkpoint between them."""


class FailurePolicy(ApiModel):
    """When to give up, and what is done until then."""

    max_restarts_without_progress: Annotated[int, Field(ge=0, le=10000)] = 3
    """Failures charged to the run since its last newer verified checkpoint; one more and the run is Failed. Failures
    of nodes are never charged."""
    backoff: Backoff = Backoff()
    node_avoidance: NodeAvoidance = NodeAvoidance()
    hang: Hang = Hang()
