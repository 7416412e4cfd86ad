"""An operator's process: the shipped observer, planner, actor, queue, edge and elector, as `__main__.Operator` joins
them.

Simulated are its ends: the client (`clients.OperatorClient`) and the watches, which kopf holds in a real one.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from starcoder_operator.act import Actor
from starcoder_operator.adapters.errors import KubeError
from starcoder_operator.adapters.events import Events
from starcoder_operator.adapters.kinds import CONFIG_MAPS, LEASES, NODES, POD_GROUPS, PODS, RUNS, Kind, Manifest
from starcoder_operator.adapters.memory import Memory
from starcoder_operator.adapters.metrics import Metrics
from starcoder_operator.adapters.nodes import NodeCache, RunKey
from starcoder_operator.adapters.sightings import Sightings
from starcoder_operator.domain.hearing import Limits
from starcoder_operator.handlers import Edge
from starcoder_operator.leader import Election, Elector, LeadershipLost
from starcoder_operator.observe import Observer
from starcoder_operator.reconcile import Reconciler
from starcoder_operator.settings import Settings
from starcoder_operator.workqueue import WorkQueue
from starcoder_trainer.contract.names import LABEL_RUN

from .api_server import Change
from .clients import OperatorClient
from .virtual_time import Process

if TYPE_CHECKING:
    from .world import Simulation

WATCHED = (RUNS, PODS, LEASES, CONFIG_MAPS, POD_GROUPS, NODES)
LABELLED = (PODS, LEASES, CONFIG_MAPS, POD_GROUPS)
LAG = 0.01
LISTED = 5.0
"""As `__main__.LISTED_LAG`."""
BOOT = 0.5
SETTINGS = Settings(_cli_parse_args=[], trainer_image="trainer:1")  # type: ignore[call-arg]


@functools.cache
def _metrics() -> Metrics:
    """A registry is dear to make and its figures are not looked at here."""
    return Metrics()


class _Clock:
    """Of one operator's machine; its wall clock may jump."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim

    def monotonic(self) -> float:
        return self._sim.loop.time()

    def now(self) -> str:
        return self._sim.timestamp(self._sim.wall_clock_off)


class OperatorProcess:
    """One replica, from its start until it is killed or loses the lead."""

    def __init__(self, sim: Simulation, name: str, *, election: bool) -> None:
        self.sim, self.name = sim, name
        self.process = Process(name, sim.crashed)
        self.leads = False
        self.led_from = 0.0
        """Since when it leads or led [s]."""
        self._going = asyncio.Event()
        self._going.set()
        self._held_back: list[Callable[[], None]] = []
        clock, self._memory = _Clock(sim), Memory()
        self.sightings, self._nodes = Sightings(clock), NodeCache()
        self._elector = (
            Elector(
                self._client(),
                Election("starcoder-operator", "operators", name, duration=15, renew_deadline=10, retry_period=2),
                clock,
            )
            if election
            else None
        )
        client = self._client(may_write=self._elector.leads if self._elector else lambda: True)
        self._reconcile = Reconciler(
            observe=Observer(client, clock, self.sightings, self._nodes, self._memory),
            act=Actor(
                kube=client,
                events=Events(client, name),
                clock=clock,
                memory=self._memory,
                settings=SETTINGS,
                metrics=_metrics(),
            ),
            memory=self._memory,
            metrics=_metrics(),
            limits=Limits.of(SETTINGS.rhythm, SETTINGS.heartbeat_stale),
        )
        self._queue: WorkQueue[RunKey] = WorkQueue(
            self._pass, workers=2, on_failure=self._failed, chance=sim.network.rng.random
        )
        edge = Edge(enqueue=self._queue.add, note=lambda: None, sightings=self.sightings, nodes=self._nodes)
        tell = {RUNS: edge.on_run, PODS: edge.on_pod, LEASES: edge.on_lease, NODES: edge.on_node}
        self.watches = {kind: Watch(self, kind, tell.get(kind, edge.on_owned)) for kind in WATCHED}
        sim.api.watchers.append(self._on_change)
        self.process.spawn(self._run())

    def _client(self, may_write: Callable[[], bool] = lambda: True) -> Any:
        sim = self.sim
        return OperatorClient(sim.api, sim.network, self.name, self._call, self.sightings.blind, may_write)

    async def _run(self) -> None:
        await asyncio.sleep(BOOT)
        if self._elector is not None:
            await self._elector.acquire()
        self.sim.tell(f"{self.name} leads")
        self.leads, self.led_from = True, self.sim.loop.time()
        self._queue.start()
        for watch in self.watches.values():
            self.process.spawn(watch.run())
        if self._elector is None:
            return
        try:
            await self._elector.keep()
        except LeadershipLost as e:
            # a process that stood still goes on with what it was at until it comes to its own renewal
            await self._going.wait()
            await asyncio.sleep(LAG)
            self.sim.operator_ends(self, str(e))

    def dies(self) -> None:
        self.leads = False
        self.process.kill()
        if self._on_change in self.sim.api.watchers:
            self.sim.api.watchers.remove(self._on_change)

    def stands_still(self, seconds: float) -> None:
        """SIGSTOP, a stalled machine: what it was about to send it sends when it goes on."""
        self._going.clear()
        self.sim.loop.call_later(seconds, self._goes_on)

    def _goes_on(self) -> None:
        if self.process.alive:
            self._going.set()
            self.sightings.blind()  # as `notice_pauses` has it done
            held, self._held_back = self._held_back, []
            for tell in held:
                tell()

    def tells(self, tell: Callable[[], None]) -> None:
        """Code of the edge, now or when the process goes on."""
        if not self.process.alive:
            return
        if self._going.is_set():
            self.process.run(tell)
        else:
            self._held_back.append(tell)

    def listed_anew(self, kind: Kind) -> None:
        """As `__main__.Operator` does."""
        if kind is NODES:
            self._nodes.forget_nodes()
        for key in self._memory:
            self._queue.add(key)

    def listed(self, kind: Kind) -> None:
        if kind is NODES:
            self._nodes.all_listed()

    async def _pass(self, key: RunKey) -> float | None:
        self.sim.counts_pass()
        return await self._reconcile(key)

    def _failed(self, key: RunKey, error: Exception, delay: float) -> None:
        self._reconcile.failed(key, error, delay)
        if not isinstance(error, KubeError):
            self.sim.crashed(self.name, error)

    async def _call(self, what: str, send: Callable[[], Awaitable[Any]]) -> Any:
        cut = self.sim.cut_of(self, what)
        if cut == "before":
            await self._cut(f"before it could {what}")
        if (pause := self.sim.pause_before_call(self)) is not None:
            self.sim.tell(f"{self.name} stands still for {pause:.0f} s before it can {what}")
            self.stands_still(pause)
        await self._going.wait()
        answer = await send()
        if cut == "after":
            await self._cut(f"after it had sent: {what}")
        await self._going.wait()
        return answer

    async def _cut(self, where: str) -> None:
        self.sim.operator_is_cut(self, where)
        await asyncio.Event().wait()

    def _on_change(self, change: Change) -> None:
        watch = self.watches.get(change.kind)
        if watch is not None:
            watch.on_change(change)


class Watch:
    """One kind's watch of one operator: lists, then is told of changes, a little later and in order."""

    def __init__(self, operator: OperatorProcess, kind: Kind, tell: Callable[[str | None, Manifest], None]) -> None:
        self._operator, self._kind, self._tell = operator, kind, tell
        self._sim = operator.sim
        self._connected = False
        self._last = 0.0
        self.lag = LAG
        self.losing = self.doubling = 0
        """Events still to be lost, and to be told twice."""

    async def run(self) -> None:
        """Until the watch is broken."""
        while self._sim.network.api_down:
            self._operator.sightings.blind()
            await asyncio.sleep(1.0)
        self._operator.listed_anew(self._kind)
        await asyncio.sleep(LAG)
        self._connected = True
        for thing in self._sim.api.list(self._kind):
            if self._wants(thing):
                self._deliver(None, thing)
        self._sim.loop.call_later(LISTED, self._operator.listed, self._kind)

    def breaks(self, seconds: float) -> None:
        """Nothing is told until it lists anew."""
        self._connected = False
        self._sim.loop.call_later(seconds, self._again)

    def _again(self) -> None:
        if self._operator.process.alive and self._operator.leads and not self._connected:
            self._operator.process.spawn(self.run())

    def on_change(self, change: Change) -> None:
        if not self._connected or not self._wants(change.thing):
            return
        if self.losing:
            self.losing -= 1
            self._sim.tell(
                f"{self._operator.name} is not told of {change.kind.kind} {change.thing['metadata']['name']}"
            )
            return
        self._deliver(change.type, change.thing)
        if self.doubling:
            self.doubling -= 1
            self._sim.loop.call_later(1.0, self._deliver, change.type, change.thing)

    def _wants(self, thing: Manifest) -> bool:
        return self._kind not in LABELLED or LABEL_RUN in (thing["metadata"].get("labels") or {})

    def _deliver(self, kind: str | None, thing: Manifest) -> None:
        self._last = max(self._last, self._sim.loop.time() + self.lag)
        self._sim.loop.call_at(self._last, self._operator.tells, lambda: self._tell(kind, thing))
