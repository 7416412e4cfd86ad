"""Probes and metrics over HTTP: `/healthz`, `/readyz`, `/metrics`. Served by followers too."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from aiohttp import web

from .adapters.clock import Clock
from .adapters.metrics import Metrics

log = logging.getLogger(__name__)

Check = Callable[[], str | None]
"""None: fine; else what is wrong, as a sentence."""


class HealthServer:
    """Answers 200 or 503 with the sentence of each check that fails.

    A stalled event loop can't answer at all: the probe's time-out is its alarm.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._alive: list[Check] = []
        self._ready: list[Check] = []
        self._runner: web.AppRunner | None = None
        self.port = 0

    def alive_if(self, check: Check) -> None:
        """One that fails means only a restart can help."""
        self._alive.append(check)

    def ready_if(self, check: Check) -> None:
        self._ready.append(check)

    async def start(self, host: str, port: int) -> None:
        """Listen; `self.port` is the port taken. Raises OSError where it can't."""
        app = web.Application()
        app.router.add_get("/healthz", lambda _: self._answer(self._alive))
        app.router.add_get("/readyz", lambda _: self._answer(self._ready))
        app.router.add_get("/metrics", self._scrape)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        self.port = self._runner.addresses[0][1]
        log.info("health and metrics served", extra={"port": self.port})

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _answer(self, checks: list[Check]) -> web.Response:
        wrong = [sentence for check in checks if (sentence := check()) is not None]
        return web.Response(status=503 if wrong else 200, text="\n".join(wrong or ["ok"]) + "\n")

    async def _scrape(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.render(), headers={"Content-Type": "text/plain; version=0.0.4"})


class Activity:
    """When the watches last gave a sign of life: an event or a connection made again."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last: float | None = None

    def note(self) -> None:
        self._last = self._clock.monotonic()

    def silence(self, limit: float) -> str | None:
        """What is wrong where there was no sign within `limit` seconds, or none ever."""
        if self._last is None:
            return "the watches are not connected yet"
        silent = self._clock.monotonic() - self._last
        return f"no event and no reconnect of the watches for {silent:.0f} s" if silent > limit else None


async def notice_pauses(
    clock: Clock, on_pause: Callable[[float], None], *, tick: float = 1.0, most: float = 5.0
) -> None:
    """Calls `on_pause(seconds)` after this process did not run for more than `most` seconds (a stopped process, a
    stalled loop): what it has not seen meanwhile is unknown, not old. Runs until cancelled."""
    last = clock.monotonic()
    while True:
        await asyncio.sleep(tick)
        now = clock.monotonic()
        if now - last > most:
            on_pause(now - last)
        last = now
