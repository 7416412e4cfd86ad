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
"""For workers to write their stacks. Nobody is killed before, so that all agents of a gang that hangs have looked at
their workers by the time that the first of them breaks everybody's connections."""
STACKS_BYTES = 64 << 10
"""Of each worker; the first say more than the last."""


class Lookout:
    """One look at a time; a later one replaces it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, proc: Path = Path("/proc")) -> None:
        self._clock = clock
        self._proc = proc
        self._asked: Look | None = None
        self._answer_at = 0.0
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
        self._stacks = dict.fromkeys(processes, b"")
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

    def answer(self, processes: Mapping[int, int]) -> Seen | None:
        """Once it is due."""
        if self._asked is None or self._clock() < self._answer_at:
            return None
        workers = tuple(self._sight(rank, pid) for rank, pid in sorted(processes.items()))
        seen = Seen(self._asked.attempt, workers, self._asked.stacks)
        self.forget()
        return seen

    def forget(self) -> None:
        """The workers are gone, or all is answered."""
        self._asked, self._stacks, self._collectives = None, {}, {}

    def _sight(self, rank: int, pid: int) -> Sight:
        found = proc_state(pid, self._proc)
        stacks = self._stacks.get(rank, b"").decode(errors="replace")
        return Sight(rank, pid, found.state, found.waits_in, stacks, self._collectives.get(rank))
