"""An agent's process: the shipped supervisor, heartbeats, uploader, committer and ledger, as `agent.main.serve` joins
them.

Simulated are only its ends: the socket to the fork server, the API, S3, the port it listens on.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

from starcoder_operator.adapters.kinds import CONFIG_MAPS, Manifest
from starcoder_trainer.agent import ledger, preflight, supervisor, upload, verify
from starcoder_trainer.agent.heartbeats import Heartbeats, Standing
from starcoder_trainer.agent.kube import LeaseName, LeaseWriter
from starcoder_trainer.agent.messages import Identity
from starcoder_trainer.agent.supervisor import Supervisor, Surroundings
from starcoder_trainer.contract import names
from starcoder_trainer.contract.assignment import Assignment, Endpoint
from starcoder_trainer.contract.config import TrainingConfig
from starcoder_trainer.contract.heartbeat import USUAL
from starcoder_trainer.contract.report import Report

from .api_server import GRACE
from .clients import AgentClient
from .store import S3Client
from .virtual_time import Process, StepLock, VirtualLoop
from .workers import Channel

if TYPE_CHECKING:
    from .machines import Sandbox
    from .world import Simulation

GOODBYE = 2.0


class AgentProcess:
    """One start of a Pod's agent container."""

    def __init__(self, sim: Simulation, box: Sandbox, boot_id: str) -> None:
        self._sim, self._box, self.boot_id = sim, box, boot_id
        self.process = Process(f"agent of {box.name}", sim.crashed)
        self.machine = box.machine
        self._seen: Manifest | None = None
        me = Identity(
            box.run_uid,
            boot_id,
            box.name,
            box.incarnation,
            box.machine.name,
            box.machine.address,
            str(box.scratch),
            GRACE,
        )
        self.supervisor = Supervisor(
            me,
            Surroundings(
                open_store=lambda uri, storage: S3Client(sim.bucket, sim.network, sim.loop, box.name, boot_id),
                check_data=lambda config, open_store: None,
                worker_socket=box,  # type: ignore[arg-type]
                member=box.member,
                report=self._report,
                metrics=_NoMetrics(),  # type: ignore[arg-type]
            ),
            clock=sim.loop.time,
        )
        self.heartbeats = Heartbeats(
            member=box.member, incarnation=box.incarnation, boot_id=boot_id, rhythm=USUAL, now=sim.loop.time()
        )
        self._standing = Standing()
        self._listens = Endpoint(box.machine.address, 7070)
        self._writer = LeaseWriter(
            AgentClient(sim.api, sim.network, box.name, box.run, lambda: box.machine.reaches_api),  # type: ignore[arg-type]
            LeaseName(box.namespace, names.lease_name(box.run, box.member)),
            USUAL.renewal,
            renewed=lambda: self.heartbeats.renewed(sim.loop.time()),
            superseded=self.supervisor.supersede,
        )
        self._stop = asyncio.Event()
        self.process.spawn(self._serve())

    def terminate(self) -> None:
        """SIGTERM."""
        self._stop.set()

    @property
    def report(self) -> Report:
        return self.supervisor.report

    def assignment_changed(self, found: Manifest) -> None:
        """A watch event, or what a list showed."""
        if not self.process.alive or found is self._seen:
            return
        self._seen = found
        assignment, config = _read(found["data"][names.ASSIGNMENT_KEY], found["data"][names.CONFIG_KEY])
        if assignment.run_uid == self._box.run_uid:
            self.heartbeats.assigned(self._sim.loop.time(), assignment)
        self.supervisor.assign(assignment, config)

    def list_assignment(self) -> None:
        """A watch that begins, or begins anew."""
        if self.process.alive and self._box.machine.reaches_api and not self._sim.network.api_down:
            found = self._sim.api.find(CONFIG_MAPS, self._box.namespace, names.assignment_name(self._box.run))
            if found is not None:
                self.assignment_changed(found)

    def _report(self, _: Report | None = None) -> None:
        self._writer.report(self._standing.told(self.supervisor.report, self._listens))

    async def _beat(self) -> None:
        """In place of `HeartbeatService`: a beat is answered at once or never."""
        while True:
            relay = None if self.supervisor.silent else self.heartbeats.target
            other = self._sim.agent(relay.boot_id) if relay is not None else None
            now = self._sim.loop.time()
            if relay is not None and other is not None and self.machine.hears(other.machine):
                self.heartbeats.answered(now, other.heartbeats.take(now, self.heartbeats.beat(relay)))
            for boot_id in self.heartbeats.connected:
                peer = self._sim.agent(boot_id)
                if peer is None or not self.machine.hears(peer.machine):
                    self.heartbeats.broke(boot_id)
            standing = self.heartbeats.standing(now)
            if standing != self._standing:
                self._standing = standing
                self._report()
            await asyncio.sleep(USUAL.seconds)

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            supervising = tasks.create_task(self.supervisor.run())
            await asyncio.sleep(0)
            self.list_assignment()
            others = [tasks.create_task(each) for each in (self._writer.run(), self._beat(), self._terminate())]
            await asyncio.wait({supervising})
            for task in others:
                task.cancel()
        if not self.supervisor.silent:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(
                    self._writer.write(Standing().told(self.supervisor.report, self._listens)), GOODBYE
                )
        self.process.kill()
        self._box.agent_ended()

    async def _terminate(self) -> None:
        await self._stop.wait()
        self.supervisor.terminate()


def _read(assignment: str, config: str) -> tuple[Assignment, dict[str, Any]]:
    return Assignment.from_json(assignment), _config(config)


@functools.lru_cache(256)
def _config(text: str) -> dict[str, Any]:
    return TrainingConfig.from_json(text).to_dict()


class _NoMetrics:
    """A registry an agent is dear to make, and nobody scrapes it here."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _nothing


def _nothing(*_: object) -> None:
    pass


class _Serially:
    """In place of a thread pool, of which the order of calls would be the operating system's."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> _Serially:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, function: Any, items: Any) -> Iterator[Any]:
        return iter([function(item) for item in items])


class _Listener:
    def __init__(self, address: str, port: int) -> None:
        self._name = (address, port)

    def getsockname(self) -> tuple[str, int]:
        return self._name

    def close(self) -> None:
        pass


@contextmanager
def shipped_agents(loop: VirtualLoop) -> Iterator[None]:
    """Puts the simulation where the shipped agent meets the operating system: sockets, thread pools, sleeps."""
    ports = iter(range(10_000, 1_000_000))
    with ExitStack() as patches:

        def put(module: Any, name: str, value: Any) -> None:
            patches.enter_context(mock.patch.object(module, name, value))

        put(supervisor, "Channel", Channel)
        put(supervisor, "Ledger", functools.partial(ledger.Ledger, pause=loop.pause))
        put(ledger, "threading", SimpleNamespace(Lock=functools.partial(StepLock, loop)))
        put(preflight, "listen", lambda address: _Listener(address, next(ports)))
        put(upload, "ThreadPoolExecutor", _Serially)
        put(verify, "ThreadPoolExecutor", _Serially)
        yield
