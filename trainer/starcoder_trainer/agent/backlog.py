"""Which step is uploaded next, and which gives way where checkpoints come faster than they are uploaded.

A checkpoint counts when every member has uploaded its part, and members differ in speed. Each choosing for itself, say
always the newest step, they would seldom choose the same: of eight members whose uploads take two to three intervals,
none in thousands. So a step is worth the more the more often two divides it, by which every second checkpoint is worth
more than those between, every fourth more than those, whatever the interval is. What the slowest member finds time for
all others have uploaded too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from starcoder_trainer.agent.messages import Upload
from starcoder_trainer.storage.store import ObjectStore

MOST_WAITING = 2
"""Steps beside the one being uploaded. With fewer, one that all are to upload could be given up."""


@dataclass(frozen=True)
class Waiting:
    job: Upload
    store: ObjectStore
    """Of the configuration that it was saved under: a later one may name another."""


class Backlog:
    def __init__(self) -> None:
        self._waiting: list[Waiting] = []

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def has(self, attempt: int) -> bool:
        """A step of that attempt waits."""
        return any(w.job.attempt == attempt for w in self._waiting)

    def add(self, new: Waiting) -> tuple[Waiting, ...]:
        """Returns what gives way for it, itself perhaps."""
        self._waiting = sorted((*self._waiting, new), key=_worth)
        too_many = max(0, len(self._waiting) - MOST_WAITING)
        given_up, self._waiting = tuple(self._waiting[:too_many]), self._waiting[too_many:]
        return given_up

    def take(self) -> tuple[Waiting, tuple[Waiting, ...]]:
        """What is to be uploaded next, and the older ones of its attempt, which are of no use beside it. IndexError
        where nothing waits."""
        taken = self._waiting.pop()
        job = taken.job
        return taken, self.drop(lambda other: other.attempt == job.attempt and other.step < job.step)

    def drop(self, which: Callable[[Upload], bool]) -> tuple[Waiting, ...]:
        """Returns those that went."""
        gone = tuple(w for w in self._waiting if which(w.job))
        self._waiting = [w for w in self._waiting if w not in gone]
        return gone


def _worth(waiting: Waiting) -> tuple[int, bool, int, int]:
    """Members save the same steps of an attempt, and its last one is not given up whatever its number."""
    job = waiting.job
    times_two_divides = (job.step & -job.step).bit_length()
    return job.attempt, job.last, times_two_divides, job.step
