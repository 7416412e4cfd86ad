"""The verdict over a soak: what was lost, what was equal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from .losses import Told
from .trunk import Trunk
from .undisturbed import Undisturbed

TOLERANCE = 1e-4
"""Of a loss (fp32, dropout 0) that another layout trained from the same state: rounding, within NEAR iterations."""
NEAR = 100
UNACCOUNTED = 0.01


@dataclass(frozen=True)
class Verdict:
    lost: int
    """Times that the newest verified checkpoint went back, and checkpoints that HEAD lists at the end and are not
    whole."""
    restarts_at_zero: int
    """Attempts that began at iteration 0 though a checkpoint was verified."""
    different: tuple[str, ...]
    """Losses that are not those of the undisturbed run, with both."""
    compared: int
    """Losses of iterations that count, each equal to the last digit where it is not in `different`."""
    abandoned: int
    """Losses compared of iterations that were done again later."""
    beside: int
    """Losses compared across changes of layout."""
    unaccounted: float
    """Share of the run's life that is in no bucket of status.goodput, or in two."""

    @property
    def good(self) -> bool:
        lost = self.lost or self.restarts_at_zero or self.different or self.unaccounted > UNACCOUNTED
        return not lost and self.compared > 0


def judge(
    trunk: Trunk,
    verified: Sequence[int],
    attempts: Mapping[int, Told],
    undisturbed: Undisturbed,
    *,
    damaged: int = 0,
    unaccounted: float = 0.0,
) -> Verdict:
    """
    Args:
        verified: iterations of HEAD's newest entry, in the order in which they were seen.
        attempts: what each attempt's workers told.
        undisturbed: the same run, in the layouts of `trunk`.
        damaged: checkpoints that HEAD lists at the end and are not whole.
    """
    lost = damaged + sum(later < earlier for earlier, later in pairwise(verified))
    at_zero = sum(told.start == 0 for told in attempts.values()) - 1 if any(verified) else 0
    different, compared, abandoned = list[str](), 0, 0
    for attempt, told in sorted(attempts.items()):
        for iteration, said in sorted(told.losses.items()):
            expected = undisturbed.losses.get(iteration)
            if expected is None:
                continue
            counts = trunk.trained_by(iteration) == attempt
            base = trunk.left_at(attempt, told.start, iteration)
            exact = counts or trunk.is_all(told.layout, base, iteration)
            if not exact and iteration - base > NEAR:
                continue
            compared, abandoned = compared + counts, abandoned + (not counts)
            if not all(_equal(each, expected, exact=exact) for each in said):
                different.append(f"{iteration}, attempt {attempt}: {', '.join(sorted(said))} instead of {expected}")
    for iteration, loss in sorted(undisturbed.beside.items()):
        if not _equal(loss, undisturbed.losses[iteration], exact=False):
            different.append(
                f"{iteration}, after a change of layout: {undisturbed.losses[iteration]}, before it {loss}"
            )
    return Verdict(lost, max(0, at_zero), tuple(different), compared, abandoned, len(undisturbed.beside), unaccounted)


def unaccounted(run: dict[str, Any], now: datetime) -> float:
    """Share of a run's life up to now that the buckets leave out or count twice."""
    lived = (now - datetime.fromisoformat(run["metadata"]["creationTimestamp"])).total_seconds()
    return abs(lived - float(sum(run["status"]["goodput"]["buckets"].values()))) / lived


def _equal(said: str, expected: str, *, exact: bool) -> bool:
    return said == expected if exact else math.isclose(float(said), float(expected), rel_tol=0, abs_tol=TOLERANCE)
