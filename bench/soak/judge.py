"""The verdict over a soak: what was lost, what was equal."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

TOLERANCE = 1e-4
"""Of a loss (fp32, dropout 0) where the layout changed on the way; without that it is equal bitwise."""


@dataclass
class History:
    """What was seen while the run was disturbed."""

    faults: list[str] = field(default_factory=list)
    verified: list[int] = field(default_factory=list)
    """Iterations of HEAD's newest entry, in the order in which they were seen."""
    layouts: set[str] = field(default_factory=set)
    charged: int = 0
    """Most of `status.restartsWithoutProgress` seen."""


@dataclass(frozen=True)
class Verdict:
    lost: int
    """Times that the newest verified checkpoint went back."""
    restarts_at_zero: int
    """Times that workers began at iteration 0 though a checkpoint was verified."""
    different: tuple[str, ...]
    """Iterations whose loss is not that of the undisturbed run, with both."""
    compared: int

    @property
    def good(self) -> bool:
        return not self.lost and not self.restarts_at_zero and not self.different and self.compared > 0


def judge(
    history: History, starts: list[int], disturbed: dict[int, set[str]], calm: dict[int, set[str]], pods: int
) -> Verdict:
    """
    Args:
        starts: iterations at which workers began.
        disturbed: loss by iteration, all values told.
        calm: the same of a run that nobody disturbed.
        pods: Pods that told of a start of one attempt; that many starts at 0 are the first attempt's.
    """
    lost = sum(later < earlier for earlier, later in zip(history.verified, history.verified[1:], strict=False))
    at_zero = max(0, sum(s == 0 for s in starts) - pods) if any(history.verified) else 0
    exact = len(history.layouts) <= 1
    different = tuple(
        f"{i}: {', '.join(sorted(said))} instead of {', '.join(sorted(calm[i]))}"
        for i, said in sorted(disturbed.items())
        if i in calm and not _equal(said, calm[i], exact=exact)
    )
    return Verdict(lost, at_zero, different, len(disturbed.keys() & calm.keys()))


def _equal(said: set[str], expected: set[str], *, exact: bool) -> bool:
    if exact:
        return said == expected
    values = [float(v) for v in said | expected]
    return all(math.isclose(a, values[0], rel_tol=0, abs_tol=TOLERANCE) for a in values)
