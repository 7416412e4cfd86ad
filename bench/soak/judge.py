"""The verdict over a soak: what was lost, what was equal."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from starcoder_trainer.contract.assignment import Layout

TOLERANCE = 1e-4
"""Of the loss (fp32, dropout 0) of an iteration that was done again, maybe in another layout: rounding, over the few
iterations since a checkpoint."""

UNACCOUNTED = 0.01


@dataclass
class History:
    """What was seen while the run was disturbed."""

    faults: list[str] = field(default_factory=list)
    verified: list[int] = field(default_factory=list)
    """Iterations of HEAD's newest entry, in the order in which they were seen."""
    committed: dict[int, int] = field(default_factory=dict)
    """Attempt by iteration of all checkpoints that HEAD listed."""
    layouts: dict[int, Layout] = field(default_factory=dict)
    """By attempt, as its checkpoints say."""


@dataclass(frozen=True)
class Verdict:
    lost: int
    """Times that the newest verified checkpoint went back."""
    restarts_at_zero: int
    """Times that workers began at iteration 0 though a checkpoint was verified."""
    different: tuple[str, ...]
    """Iterations whose loss is not that of the undisturbed run, with both."""
    compared: int
    """Iterations whose loss both told."""
    unaccounted: float
    """Share of the run's life that is in no bucket of status.goodput, or in two."""

    @property
    def good(self) -> bool:
        lost = self.lost or self.restarts_at_zero or self.different or self.unaccounted > UNACCOUNTED
        return not lost and self.compared > 0


def judge(
    history: History,
    starts: list[int],
    disturbed: dict[int, set[str]],
    calm: dict[int, str],
    *,
    workers: int,
    unaccounted: float = 0.0,
) -> Verdict:
    """
    Args:
        starts: iterations at which workers began.
        disturbed: loss by iteration, all values told.
        calm: of a run that nobody disturbed, in the same layout at each iteration.
        workers: of one attempt; so many starts at 0 are the first attempt's.
    """
    lost = sum(later < earlier for earlier, later in zip(history.verified, history.verified[1:], strict=False))
    at_zero = max(0, sum(s == 0 for s in starts) - workers) if any(history.verified) else 0
    different = tuple(
        f"{i}: {', '.join(sorted(said))} instead of {calm[i]}"
        for i, said in sorted(disturbed.items())
        if i in calm and not _equal(said, calm[i])
    )
    return Verdict(lost, at_zero, different, len(disturbed.keys() & calm.keys()), unaccounted)


def unaccounted(run: dict[str, Any], now: datetime) -> float:
    """Share of a run's life up to now that the buckets leave out or count twice."""
    lived = (now - datetime.fromisoformat(run["metadata"]["creationTimestamp"])).total_seconds()
    return abs(lived - float(sum(run["status"]["goodput"]["buckets"].values()))) / lived


def _equal(said: set[str], expected: str) -> bool:
    """One that was told is equal to the last digit: what training went on from. The others were done again."""
    return expected in said and all(
        math.isclose(float(other), float(expected), rel_tol=0, abs_tol=TOLERANCE) for other in said
    )
