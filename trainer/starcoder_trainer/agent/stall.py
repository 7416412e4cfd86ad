"""Whether the workers of an attempt hang, and which of them is to blame. Pure: time and what is seen come in.

How long an interval of work may take is the workers' own reckoning (starcoder_trainer.pace), in their stamps; here it
is only counted how long nothing came of it. Only time in which somebody looked counts: where the whole machine stood
still, or this agent got no processor, nothing is known of the workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from starcoder_trainer.contract.config import HangConfig
from starcoder_trainer.contract.report import Failure
from starcoder_trainer.contract.stamp import Stamp
from starcoder_trainer.contract.worker import Sight

LOOK_SECONDS = 1.0
"""Between two looks."""
MOST_COUNTED = 3.0
"""Seconds that one look may add: a look that comes later than that came late, not the workers."""
STORAGE_PHASES = ("load", "open", "data")
PHASES = (
    "form", "build", "load", "open", "stop_flag", "checkpoint", "leave", "data", "forward_backward", "optimizer"
)  # fmt: skip
"""In the order of an interval, which ends with an iteration."""
STOPPED, DEVICE, OUTSIDE, UNKNOWN, WAITING = range(5)
"""How surely a rank is the one that keeps the others waiting: it is stopped; it waits for a device or a disk; it is in
no collective; it does not say; it is in a collective, as all but the guilty are."""
MESSAGE_CHARACTERS = 900


@dataclass(frozen=True)
class Overdue:
    """Nothing has come of the attempt's work for longer than that may take."""

    attempt: int
    seconds: float
    allowed: float
    silent: bool = False
    """The fork server does not answer; the workers may go on."""


class Watch:
    """Over the workers of one attempt of one Pod. Another attempt has another watch, and so a clean slate."""

    def __init__(self, attempt: int, ranks: Iterable[int], floors: HangConfig, now: float) -> None:
        self.attempt = attempt
        self.stamps: dict[int, Stamp] = {}
        """The newest of each rank."""
        self._floors = floors
        self._waited = dict.fromkeys(ranks, 0.0)
        """Rank to seconds in which it was seen in its interval."""
        self._unanswered = 0.0
        self._looked = now

    def look(
        self, now: float, stamps: Mapping[int, Stamp], answered: bool, ended: Iterable[int] = ()
    ) -> Overdue | None:
        """What the looks so far amount to.

        Args:
            stamps: of each rank that could be read; those of other attempts are ignored.
            answered: the fork server has answered since the look before.
            ended: ranks that need no watching any more.
        """
        passed, self._looked = min(now - self._looked, MOST_COUNTED), now
        ended = set(ended)
        self._unanswered = 0.0 if answered else self._unanswered + passed
        found: list[Overdue] = []
        if self._unanswered > self._floors.iteration:
            found.append(Overdue(self.attempt, self._unanswered, self._floors.iteration, silent=True))
        for rank in self._waited.keys() - ended:
            stamp, before = stamps.get(rank), self.stamps.get(rank)
            if stamp is not None and stamp.attempt == self.attempt:
                self.stamps[rank] = stamp
                if before is None or before.interval != stamp.interval:
                    self._waited[rank] = 0.0
                    continue
            self._waited[rank] += passed
            known = self.stamps.get(rank)
            allowed = known.allowed if known else self._floors.first_iteration
            if self._waited[rank] > allowed:
                found.append(Overdue(self.attempt, self._waited[rank], allowed))
        return max(found, key=lambda o: (not o.silent, o.seconds), default=None)


def explain(overdue: Overdue, stamps: Mapping[int, Stamp], seen: tuple[Sight, ...] | None, where: str) -> Failure:
    """Which of the Pod's ranks is to blame, and how surely.

    Args:
        stamps: the newest of each rank, as the watch knows them.
        seen: what the fork server saw of its workers; None where it did not answer.
        where: where stacks are to be found, as the end of a sentence.
    """
    if seen is None:
        what = "its fork server did not answer" if overdue.silent else "no progress, and no answer of its fork server,"
        message = (
            f"{what} for {overdue.seconds:.0f} s where {overdue.allowed:.0f} s are allowed: the container is stopped, "
            "frozen or gets no processor; look at the node"
        )
        return Failure("Hang", message, suspicion=(STOPPED,))
    sights = {sight.rank: sight for sight in seen}
    ranks = sorted(sights.keys() | stamps.keys())
    suspect = min(ranks, key=lambda rank: _suspicion(stamps.get(rank), sights.get(rank)), default=None)
    if suspect is None:
        return Failure(
            "Hang", f"no worker is left after {overdue.seconds:.0f} s without progress", suspicion=(STOPPED,)
        )
    stamp, sight = stamps.get(suspect), sights.get(suspect)
    suspicion = _suspicion(stamp, sight)
    stalled = suspicion[0] != STOPPED and stamp is not None and stamp.phase in STORAGE_PHASES
    message = (
        f"no progress for {overdue.seconds:.0f} s where {overdue.allowed:.0f} s are allowed; "
        f"{_sentence(stamp, sight)}; {where}"
    )
    return Failure(
        "DataStall" if stalled else "Hang",
        message[:MESSAGE_CHARACTERS],
        rank=suspect,
        iteration=stamp.iteration if stamp else None,
        suspicion=suspicion,
    )


def _suspicion(stamp: Stamp | None, sight: Sight | None) -> tuple[int, ...]:
    """Smaller is more suspicious: the kind of evidence, then how far the rank has come."""
    iteration = stamp.iteration if stamp else 0
    phase = PHASES.index(stamp.phase) if stamp and stamp.phase in PHASES else 0
    return _evidence(stamp, sight), iteration, phase


def _evidence(stamp: Stamp | None, sight: Sight | None) -> int:
    if sight is None or not sight.state:
        return WAITING  # it has ended since, because others did
    if sight.state == "T":
        return STOPPED
    if stamp is not None and stamp.phase in STORAGE_PHASES:
        return DEVICE
    if sight.state == "D":
        return DEVICE
    if sight.collective is None:
        return UNKNOWN
    return WAITING if sight.collective.under_way else OUTSIDE


def _sentence(stamp: Stamp | None, sight: Sight | None) -> str:
    words = ["it"]
    if stamp is None:
        words.append("has not begun")
    else:
        words.append(f"is in phase {stamp.phase} after iteration {stamp.iteration}")
    if sight is not None:
        if not sight.state:
            words.append("and has ended since, as others did")
        if sight.state == "T":
            words.append("and is stopped by a signal (process state T)")
        elif sight.state:
            inside = f" in {sight.waits_in}" if sight.waits_in else ""
            words.append(f"(process state {sight.state}{inside})")
        if sight.collective is not None:
            words.append(f"and {sight.collective.what}")
    return " ".join(words)


def account(overdue: Overdue, stamps: Mapping[int, Stamp], seen: tuple[Sight, ...]) -> str:
    """All that is known, as text for the store."""
    lines = [f"no progress for {overdue.seconds:.0f} s where {overdue.allowed:.0f} s are allowed"]
    for sight in seen:
        lines += [
            "",
            f"rank {sight.rank}, process {sight.pid}: {_sentence(stamps.get(sight.rank), sight)}",
            sight.stacks or "no stacks: it did not answer the signal in time\n",
        ]
    return "\n".join(lines)
