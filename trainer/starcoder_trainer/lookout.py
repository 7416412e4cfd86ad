"""The fork server's look at its workers: the kernel's word about each, and what those that can answer say."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from starcoder_trainer.contract.worker import Collective, Look, Seen, Sight

from .proc_state import proc_state
from .witness import COLLECTIVE, STACKS

STACKS_SECONDS = 2.0
"""For workers to write their stacks. They are not killed before, so that most agents of a gang that hangs have looked
at their workers by the time that the first of them breaks everybody's connections. What workers that end or are
stopped meanwhile have said counts all the same."""
STACKS_BYTES = 64 << 10
"""Of each worker; the first say more than the last."""


class Lookout:
    """One look at a time; a later one replaces it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, proc: Path = Path("/proc")) -> None:
        self._clock = clock
        self._proc = proc
        self._asked: Look | None = None
        self._answer_at = 0.0
        self._asked_of: dict[int, int] = {}
        """Rank to process, as it was then."""
        self._stacks: dict[int, bytes] = {}
        self._collectives: dict[int, Collective] = {}

    def ask(self, look: Look, processes: Mapping[int, int]) -> None:
        """`processes`: rank to process."""
        if self._asked is not None and self._asked.stacks:
            return  # its answer says all that this one asks
        self._asked, self._answer_at = look, self._clock()
        if not look.stacks:
            return
        self._answer_at += STACKS_SECONDS
        self._asked_of, self._stacks = dict(processes), dict.fromkeys(processes, b"")
        self._collectives = {}
        for pid in processes.values():
            found = proc_state(pid, self._proc)
            for number in (STACKS, COLLECTIVE):
                if found.answers(number):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)

    def printed(self, rank: int, line: bytes) -> None:
        """A worker has written a line to its output; while it is asked for its stacks, that is what it writes."""
        if rank in self._stacks and len(self._stacks[rank]) < STACKS_BYTES:
            self._stacks[rank] += line + b"\n"

    def collective(self, said: Collective) -> None:
        self._collectives[said.rank] = said

    def patience(self) -> float | None:
        """Seconds until there is something to answer; None where nothing was asked."""
        return None if self._asked is None else max(0.0, self._answer_at - self._clock())

    def answer(self, processes: Mapping[int, int], *, at_once: bool = False) -> Seen | None:
        """Once it is due, or all that there is by now, where that is more than nothing.

        Args:
            processes: those that live, rank to process. Of others that were asked for their stacks it is told what they
                have said, and that they ended.
            at_once: they are about to be killed.
        """
        asked = self._asked
        if asked is None or (self._clock() < self._answer_at and not (at_once and asked.stacks)):
            return None
        all_asked = self._asked_of | dict(processes)
        workers = tuple(self._sight(rank, pid, rank in processes) for rank, pid in sorted(all_asked.items()))
        seen = Seen(asked.attempt, workers, asked.stacks)
        self.forget()
        return seen

    def forget(self) -> None:
        """The workers are gone, or all is answered."""
        self._asked, self._asked_of, self._stacks, self._collectives = None, {}, {}, {}

    def _sight(self, rank: int, pid: int, lives: bool) -> Sight:
        stacks, collective = self._stacks.get(rank, b"").decode(errors="replace"), self._collectives.get(rank)
        if not lives:  # its number may be another's by now
            return Sight(rank, pid, "", "", stacks, collective)
        found = proc_state(pid, self._proc)
        return Sight(rank, pid, found.state, found.waits_in, stacks, collective)
