"""`starcoder-operator`: puts the parts together and runs them until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from typing import Any

import aiohttp
from kubernetes.aio.client import Configuration
from pydantic import ValidationError

from . import handlers
from .act import Actor
from .adapters import connection, logs, preflight
from .adapters.clock import SystemClock
from .adapters.events import Events
from .adapters.kinds import NODES
from .adapters.kube import Kube
from .adapters.memory import Memory
from .adapters.metrics import Metrics, operator_version
from .adapters.nodes import NodeCache, RunKey
from .adapters.sightings import Sightings
from .domain.hearing import Limits
from .health import Activity, HealthServer, notice_pauses
from .leader import Election, Elector, LeadershipLost
from .observe import Observer
from .reconcile import STATES, Reconciler
from .settings import Settings, parse
from .workqueue import WorkQueue

log = logging.getLogger("starcoder_operator")

LISTED_LAG = 5.0
"""Seconds after which the last Node of a list has gone through kopf's queues, with plenty to spare."""


class Operator:
    """All parts of one process. `run` returns its exit code."""

    def __init__(self, settings: Settings, configuration: Configuration) -> None:
        self._settings = settings
        self._configuration = configuration
        self._stop = asyncio.Event()
        self._obstacles: list[str] = ["starting"]
        self._leading = False
        self.metrics = Metrics()
        self.health = HealthServer(self.metrics)
        clock = SystemClock()
        self._activity = Activity(clock)
        self._sightings = Sightings(clock, silent=settings.heartbeat_stale)
        self._nodes = NodeCache(settings.device_fault_conditions)
        self._nodes_told: asyncio.TimerHandle | None = None
        memory = self._memory = Memory()
        # renewals must neither queue behind other calls nor hang
        self._election_kube = Kube(configuration, count=self._count, timeout=settings.lease_renew_deadline / 3)
        election = Election(
            name=settings.lease_name,
            namespace=settings.lease_namespace or connection.own_namespace(),
            identity=settings.identity,
            duration=settings.lease_duration,
            renew_deadline=settings.lease_renew_deadline,
            retry_period=settings.lease_retry_period,
        )
        self._elector = Elector(self._election_kube, election, clock)
        self._kube = Kube(
            configuration,
            count=self._count,
            on_outage=self._sightings.blind,
            may_write=self._elector.leads if settings.leader_election else lambda: True,
            concurrency=settings.api_concurrency,
            timeout=settings.api_timeout,
        )
        reconcile = Reconciler(
            observe=Observer(self._kube, clock, self._sightings, self._nodes, memory),
            act=Actor(
                kube=self._kube,
                events=Events(self._kube, settings.identity),
                clock=clock,
                memory=memory,
                settings=settings,
                metrics=self.metrics,
            ),
            memory=memory,
            metrics=self.metrics,
            limits=Limits.of(settings.rhythm, settings.heartbeat_stale),
        )
        self._queue: WorkQueue[RunKey] = WorkQueue(reconcile, workers=settings.workers, on_failure=reconcile.failed)
        self.metrics.watch_queue(lambda: self._queue.depth, lambda: self._queue.oldest)
        self.metrics.watch_runs(STATES, memory.runs_in)
        self._clock = clock
        self.health.alive_if(self._stuck)
        self.health.ready_if(self._unready)

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        await self.health.start(self._settings.host, self._settings.port)
        pauses = asyncio.create_task(notice_pauses(self._clock, self._paused))
        try:
            log.info("starcoder-operator %s", operator_version(), extra={"identity": self._settings.identity})
            await self._unless_stopped(preflight.wait_until_clear(self._kube, self._settings.namespaces, self._tell))
            if self._settings.leader_election:
                await self._unless_stopped(self._elector.acquire())
            return 0 if self._stop.is_set() else await self._lead()
        finally:
            pauses.cancel()
            await self._elector.release()
            await self.health.stop()
            await self._kube.close()
            await self._election_kube.close()

    async def _lead(self) -> int:
        log.info("leading", extra={"identity": self._settings.identity})
        self._leading = True
        self.metrics.leading.set(1)
        edge = handlers.Edge(
            enqueue=self._queue.add, note=self._activity.note, sightings=self._sightings, nodes=self._nodes
        )
        keep = asyncio.create_task(self._keep(), name="keep-leading")
        self._queue.start()
        registry = handlers.registry(edge, self._session)
        try:
            await handlers.watch(registry, namespaces=self._settings.namespaces, stop=self._stop)
            log.info("stopping")
            return 0
        except Exception:
            log.exception("the watches ended by an error; the process ends, to be started again")
            return 1
        finally:
            await self._queue.stop(self._settings.shutdown_grace)
            keep.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keep

    async def _keep(self) -> None:
        if not self._settings.leader_election:
            await asyncio.Event().wait()
        try:
            await self._elector.keep()
        except LeadershipLost as e:
            # Another replica acts from now on. Passes under way must not go on for the seconds a tidy end takes.
            log.critical("leadership lost: %s; the process ends", e)
            for handler in logging.getLogger().handlers:
                handler.flush()
            os._exit(1)

    async def _unless_stopped(self, waiting: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(waiting)
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            for each in (task, stop):
                each.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await each

    async def _session(self) -> tuple[str, aiohttp.ClientSession]:
        trace = handlers.traces(
            note=self._activity.note, count=self._count, on_outage=self._sightings.blind,
            on_list=self._listed_anew, on_listed=self._listed,
        )  # fmt: skip
        return self._configuration.host, await connection.watch_session(self._configuration, [trace])

    def _count(self, verb: str, code: int) -> None:
        self.metrics.api_calls.labels(verb, str(code)).inc()

    def _listed_anew(self, plural: str) -> None:
        if plural == NODES.plural:
            self._nodes.forget_nodes()
            self._await_nodes(False)
        for key in self._memory:
            self._queue.add(key)

    def _listed(self, plural: str) -> None:
        if plural == NODES.plural:
            self._await_nodes(True)

    def _await_nodes(self, come: bool) -> None:
        """Only the newest list counts: one that a later has followed is not all."""
        if self._nodes_told is not None:
            self._nodes_told.cancel()
        later = asyncio.get_running_loop().call_later
        self._nodes_told = later(LISTED_LAG, self._nodes.all_listed) if come else None

    def _paused(self, seconds: float) -> None:
        log.warning("this process stood still for %.0f s; silence in that time counts for nothing", seconds)
        self._sightings.blind()

    def _tell(self, obstacles: list[str]) -> None:
        self._obstacles = obstacles

    def _stuck(self) -> str | None:
        oldest = self._queue.oldest
        if oldest <= self._settings.stuck_after:
            return None
        return f"a run has been waiting for a pass, or in one, for {oldest:.0f} s"

    def _unready(self) -> str | None:
        if self._obstacles:
            return "; ".join(self._obstacles)
        if self._leading:
            return self._activity.silence(self._settings.watch_silence)
        contact = self._elector.last_contact
        if contact is None:
            return "the API server has not answered yet"
        silent = self._clock.monotonic() - contact
        limit = 2 * self._settings.lease_duration
        return f"the API server has not answered for {silent:.0f} s" if silent > limit else None


async def _main(settings: Settings) -> int:
    return await Operator(settings, await connection.load(settings.kubeconfig)).run()


def main() -> None:
    try:
        settings = parse()
    except ValidationError as e:
        wrong = "\n".join(f"  {'.'.join(map(str, x['loc']))}: found {x['input']!r}: {x['msg']}" for x in e.errors())
        sys.exit(f"starcoder-operator: settings that can't be used:\n{wrong}")
    logs.configure(settings.log_level, settings.log_format)
    try:
        sys.exit(asyncio.run(_main(settings)))
    except (connection.NoConnection, ValueError) as e:
        sys.exit(f"starcoder-operator: {e}")
    except OSError as e:
        sys.exit(f"starcoder-operator: can't listen on {settings.host}:{settings.port}: {e}")


if __name__ == "__main__":
    main()
