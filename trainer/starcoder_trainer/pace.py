"""How long a worker's next stretch of work may take, learned from what those before it took, in this attempt alone.

A stretch (interval) is one iteration with all that stands between it and the next, such as a checkpoint: iterations
end with a collective, so all ranks of the gang begin each interval at the same moment and learn the same seconds. That
is why they judge alike, and a rank that only waits for another is not taken for the one that hangs. The first interval
reaches from the process group's formation to the end of the first iteration; what is compiled or loaded falls into it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from starcoder_trainer.contract.config import HangConfig
from starcoder_trainer.contract.stamp import Stamp

TIMES = 8.0
"""An interval may take so many times what its like took before."""
QUANTILE = 0.95
"""Of the durations that are remembered: one that was slow by itself does not make the limit useless."""
REMEMBERED = 128
LEARNT = 3
"""Iterations after which the limit of the first is given up: until then kernels are still chosen, connections made."""

Kind = Literal["first", "iteration", "checkpoint"]


class Limits:
    """Pure."""

    def __init__(self, floors: HangConfig) -> None:
        self._floors = {
            "first": floors.first_iteration,
            "iteration": floors.iteration,
            "checkpoint": floors.checkpoint,
        }
        self._known: dict[Kind, deque[float]] = {}
        self._seen = 0

    def took(self, kind: Kind, seconds: float) -> None:
        """An interval has ended."""
        self._seen += 1
        if kind != "first":
            self._known.setdefault(kind, deque(maxlen=REMEMBERED)).append(seconds)

    def allowed(self, kind: Kind) -> float:
        """Seconds for the next interval of that kind."""
        limit = self._floors[kind]
        if self._seen < LEARNT:
            limit = max(limit, self._floors["first"])
        learned = self._known.get(kind) or self._known.get("iteration")
        return max(limit, TIMES * _quantile(learned)) if learned else limit


def _quantile(seconds: deque[float]) -> float:
    ordered = sorted(seconds)
    return ordered[math.ceil(QUANTILE * len(ordered)) - 1]


class Pace:
    """Stamps what one worker does."""

    def __init__(
        self,
        attempt: int,
        floors: HangConfig,
        write: Callable[[Stamp], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._attempt = attempt
        self._limits = Limits(floors)
        self._write = write
        self._clock = clock
        self._interval = 0
        self._since = clock()
        self._kind: Kind = "first"
        self._allowed = self._limits.allowed("first")
        self._iteration = 0

    def enter(self, phase: str) -> None:
        """What the worker does from now on."""
        if phase == "checkpoint" and self._kind == "iteration":
            self._kind = "checkpoint"
            self._allowed = self._limits.allowed("checkpoint")
        self._write(Stamp(self._attempt, self._interval, self._iteration, phase, self._allowed))

    def formed(self, iteration: int) -> None:
        """The process group stands: the interval of the first iteration begins."""
        self._begin("first", iteration)

    def done(self, iteration: int) -> None:
        """So many iterations are done."""
        self._limits.took(self._kind, self._clock() - self._since)
        self._begin("iteration", iteration)

    def _begin(self, kind: Kind, iteration: int) -> None:
        self._since = self._clock()
        self._interval += 1
        self._kind, self._iteration = kind, iteration
        self._allowed = self._limits.allowed(kind)
