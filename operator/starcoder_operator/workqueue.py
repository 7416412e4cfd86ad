"""Work queue of keys: level-triggered, so a key says only "look at this one again".

One pass a key at a time; adding a key that waits changes nothing, adding one that is being handled makes one more
pass after it. A pass that fails is repeated after an exponential back-off with jitter, one that succeeds says itself
when to look again. Time is the event loop's.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class Backoff:
    """Delay after the n-th failure in a row: first x 2^(n-1) s, at most `longest` s, less up to half by chance."""

    first: float = 0.25
    longest: float = 30.0

    def delay(self, failures: int, chance: float) -> float:
        """Seconds; `chance` in [0, 1)."""
        return min(self.longest, self.first * 2.0 ** min(failures - 1, 30)) * (1 - chance / 2)


class WorkQueue[K: Hashable]:
    """Keys in, passes out.

    Args:
        handle: one pass over a key. Returns the seconds after which to look again, None for only on `add`. An
            exception means failure; its attribute `retry_after` (seconds), if any, is the least delay.
        on_failure: told key, exception and the delay [s] until the next try.
    """

    def __init__(
        self,
        handle: Callable[[K], Awaitable[float | None]],
        *,
        workers: int,
        backoff: Backoff | None = None,
        on_failure: Callable[[K, Exception, float], None] = lambda key, error, delay: None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._handle = handle
        self._workers = workers
        self._backoff = backoff or Backoff()
        self._on_failure = on_failure
        self._chance = chance
        self._ready: asyncio.Queue[K | None] = asyncio.Queue()
        self._waiting: dict[K, float] = {}
        self._running: dict[K, float] = {}
        self._again: set[K] = set()
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._failures: dict[K, int] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    def add(self, key: K) -> None:
        """Look at `key` as soon as a worker is free."""
        if self._stopping or key in self._waiting:
            return
        if key in self._running:
            self._again.add(key)
            return
        self._drop_timer(key)
        self._waiting[key] = self._now()
        self._ready.put_nowait(key)

    def add_after(self, key: K, seconds: float) -> None:
        """Look at `key` after so many seconds, or earlier if it was to be looked at earlier."""
        if self._stopping or key in self._waiting or key in self._again:
            return
        when = self._now() + seconds
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= when:
                return
            timer.cancel()
        self._timers[key] = asyncio.get_running_loop().call_at(when, self._due, key)

    @property
    def depth(self) -> int:
        """Keys that wait for a worker."""
        return len(self._waiting)

    @property
    def oldest(self) -> float:
        """Seconds since the oldest key began to wait for a worker, or since the pass it is in began."""
        since = [*self._waiting.values(), *self._running.values()]
        return self._now() - min(since) if since else 0.0

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._work(), name=f"worker-{i}") for i in range(self._workers)]

    async def stop(self, grace: float) -> None:
        """Take no more keys; passes under way may end within `grace` seconds, then they are cut."""
        self._stopping = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        for _ in self._tasks:
            self._ready.put_nowait(None)
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=grace)
            for task in late:
                task.cancel()
            for task in late:
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _due(self, key: K) -> None:
        self._timers.pop(key, None)
        self.add(key)

    def _drop_timer(self, key: K) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()

    async def _work(self) -> None:
        while not self._stopping:
            key = await self._ready.get()
            if key is None or self._stopping:
                return
            del self._waiting[key]
            # This pass reads everything anew, so it stands for whatever was to come later.
            self._drop_timer(key)
            self._running[key] = self._now()
            try:
                later = await self._pass(key)
            finally:
                del self._running[key]
            if key in self._again:
                self._again.discard(key)
                self.add(key)
            elif later is not None:
                self.add_after(key, later)

    async def _pass(self, key: K) -> float | None:
        try:
            later = await self._handle(key)
        except Exception as e:
            failures = self._failures[key] = self._failures.get(key, 0) + 1
            asked = getattr(e, "retry_after", 0.0) or 0.0
            delay = max(asked, self._backoff.delay(failures, self._chance()))
            self._on_failure(key, e, delay)
            return delay
        self._failures.pop(key, None)
        return later
