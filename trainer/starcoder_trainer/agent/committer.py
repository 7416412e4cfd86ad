"""Leader: waits until every member's shard of a step is there, and has the ledger list the step."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from starcoder_trainer.agent.ledger import CheckpointLost, Committed, Fenced, Ledger, Superseded, reference
from starcoder_trainer.agent.messages import (
    CheckpointRefused,
    CheckpointVerified,
    Commit,
    Event,
    FencedOut,
    StorageTrouble,
)
from starcoder_trainer.agent.problems import problem, storage_problem
from starcoder_trainer.agent.verify import Corrupt, Incomplete
from starcoder_trainer.contract.ledger import Entry, checkpoint_prefix
from starcoder_trainer.contract.report import Verified
from starcoder_trainer.storage.store import StorageError

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 15.0


def verified(entry: Entry, uri: str) -> Verified:
    """`uri`: of the store that holds HEAD."""
    folder = checkpoint_prefix(entry.attempt, entry.step)
    return Verified(reference(entry), f"{uri}/{folder}", entry.committed_at, entry.size_bytes)


class Committer:
    """Steps wait here until they are whole. The newest is asked first: once it is listed, older ones are history."""

    def __init__(
        self,
        ledger: Callable[[], Ledger],
        uri: Callable[[], str],
        post: Callable[[Event], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._uri = uri
        self._post = post
        self._clock = clock
        self._waiting: dict[tuple[int, int], Commit] = {}
        self._wake = asyncio.Event()
        self._troubled = False

    def add(self, job: Commit) -> None:
        self._waiting[job.attempt, job.step] = job
        self._wake.set()

    def forget_before(self, attempt: int) -> None:
        """Attempts below are over; the ledger would refuse their steps."""
        self._waiting = {key: job for key, job in self._waiting.items() if key[0] >= attempt}
        if not self._waiting:
            self._is_well()

    async def run(self) -> None:
        """Until cancelled."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            await self._wake.wait()
            if not self._waiting:
                pause = FIRST_PAUSE_SECONDS
                self._is_well()
                self._wake.clear()
                continue
            try:
                for key in sorted(self._waiting, reverse=True):
                    if key in self._waiting:
                        await self._try(self._waiting[key])
            except (StorageError, CheckpointLost) as e:
                log.warning("commit: %s", e)
                self._troubled = True
                what = storage_problem(e) if isinstance(e, StorageError) else problem("CheckpointLost", str(e))
                self._post(StorageTrouble(self._clock(), what))
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                continue
            pause = FIRST_PAUSE_SECONDS
            self._is_well()
            await asyncio.sleep(POLL_SECONDS)

    def _is_well(self) -> None:
        """Nothing is tried in vain: all went well, or nothing is left to try. An attempt does not form over a trouble
        that nobody will find mended."""
        if self._troubled:
            self._troubled = False
            self._post(StorageTrouble(self._clock(), None))

    async def _try(self, job: Commit) -> None:
        ledger = self._ledger()
        if await asyncio.to_thread(ledger.shards, job.attempt, job.step) < job.members:
            return
        try:
            outcome = await asyncio.to_thread(ledger.enlist, job.attempt, job.step)
        except Incomplete as e:
            log.info("not yet: %s", e)
            return
        except Superseded as e:
            log.info("%s", e)
            self._waiting.pop((job.attempt, job.step), None)
            return
        except Corrupt as e:
            log.error("step %d is refused: %s", job.step, e)
            self._waiting.pop((job.attempt, job.step), None)
            self._post(CheckpointRefused(self._clock(), job.attempt, job.step, str(e)))
            return
        match outcome:
            case Committed(entry, dropped):
                log.info("committed step %d of attempt %d", job.step, job.attempt)
                self._waiting = {k: j for k, j in self._waiting.items() if k[0] != job.attempt or k[1] > job.step}
                self._post(CheckpointVerified(self._clock(), job.attempt, verified(entry, self._uri())))
                await asyncio.to_thread(ledger.discard, dropped)
            case Fenced(by):
                self.forget_before(job.attempt + 1)  # a later one's steps are its own affair
                log.warning("fenced by attempt %d", by)
                self._post(FencedOut(self._clock(), job.attempt, by))
