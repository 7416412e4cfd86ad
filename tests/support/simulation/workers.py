"""Fork servers and workers: processes that only count iterations, in process groups that break as real ones do.

A worker that ends resets its connections, so its peers fail at once; one whose machine loses power or network does
not, and its peers hang until they are killed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from starcoder_trainer.agent.channel import NotConnected
from starcoder_trainer.contract import exits
from starcoder_trainer.contract.config import TrainingConfig
from starcoder_trainer.contract.ledger import RankManifest
from starcoder_trainer.contract.report import Cause, Failure
from starcoder_trainer.contract.worker import (
    Exited,
    Leave,
    Message,
    Quit,
    Ready,
    Saved,
    Start,
    Started,
    Step,
    Stop,
    Stopped,
    Terminating,
)

if TYPE_CHECKING:
    from .machines import Sandbox
    from .world import Simulation

PRELOAD, FORK, REAP, RESET, FORM = 1.0, 0.05, 0.1, 0.05, 0.1
FORMATION = 60.0
"""Seconds until workers give up meeting the others; 120 in a Pod."""
ITERATION = 0.6


@dataclass
class Worker:
    start: Start
    rank: int
    server: ForkServer
    alive: bool = True


class ForkServer:
    """The worker container's process, from its start until it ends; one agent at a time is connected."""

    def __init__(self, sim: Simulation, box: Sandbox) -> None:
        self.sim, self.box = sim, box
        self.alive = True
        self.preloaded = self.asked_to_end = False
        self.channel: Channel | None = None
        self.workers: dict[int, Worker] = {}
        sim.loop.call_later(PRELOAD, self._preloaded)

    def _preloaded(self) -> None:
        self.preloaded = self.alive

    def tell(self, message: Message) -> None:
        if self.channel is not None:
            self.channel.on_message(message)

    def obey(self, message: Message) -> None:
        match message:
            case Start():
                self._start(message)
            case Leave(attempt):
                for worker in self.workers.values():
                    if worker.start.attempt == attempt:
                        self.sim.groups.ask_to_leave(worker)
            case Stop(attempt):
                self.kill_workers()
                self.sim.loop.call_later(REAP, self.tell, Stopped(attempt))
            case Quit():
                self.end(0)

    def kill_workers(self) -> None:
        for worker in self.workers.values():
            worker.alive = False
        self.workers.clear()
        self.sim.loop.call_later(REAP, self._end_when_asked)

    def agent_gone(self) -> None:
        self.channel = None
        self.kill_workers()

    def terminate(self) -> None:
        """SIGTERM: workers go on until the agent says otherwise."""
        self.asked_to_end = True
        self.tell(Terminating())
        self._end_when_asked()

    def _end_when_asked(self) -> None:
        if self.asked_to_end and (self.channel is None or not self.workers):
            self.end(0)

    def end(self, code: int) -> None:
        """The process ends, and its workers with it."""
        if not self.alive:
            return
        self.vanish()
        self.box.worker_container_ended(code)

    def vanish(self) -> None:
        """With its machine."""
        self.alive = self.preloaded = False
        self.kill_workers()
        channel, self.channel = self.channel, None
        if channel is not None:
            channel.closed.set()

    def fails(self, worker: Worker, code: int, cause: Cause, message: str) -> None:
        """A worker ends by itself."""
        if worker.alive:
            worker.alive = False
            del self.workers[worker.rank]
            self.tell(Exited(worker.start.attempt, worker.rank, code, Failure(cause, message, code, worker.rank)))
            self._end_when_asked()

    def ends_well(self, worker: Worker, left_at: int | None) -> None:
        worker.alive = False
        self.workers.pop(worker.rank, None)
        self.tell(Exited(worker.start.attempt, worker.rank, exits.OK, None, left_at))
        self._end_when_asked()

    def _start(self, start: Start) -> None:
        self.sim.checks.workers_start(self.box, start, [w.start.attempt for w in self.workers.values()])
        for rank in start.ranks:
            worker = self.workers[rank] = Worker(start, rank, self)
            self.sim.loop.call_later(FORK, self.sim.groups.join, worker)


class Channel:
    """In place of `agent.channel.Channel`: a connection to the fork server beside the agent."""

    def __init__(self, path: Path, on_message: Callable[[Message], None], on_lost: Callable[[str], None]) -> None:
        # The simulation hands the sandbox over where a Pod has the path of a socket in it.
        self._box: Sandbox = path  # type: ignore[assignment]
        self.on_message = on_message
        self._on_lost = on_lost
        self.closed = asyncio.Event()
        self._server: ForkServer | None = None

    async def run(self) -> None:
        try:
            while True:
                # as the shipped channel does
                while (server := self._box.server) is None or not server.preloaded:  # noqa: ASYNC110
                    await asyncio.sleep(0.25)
                server.channel, self._server = self, server
                self.closed.clear()
                self.on_message(Ready(1, PRELOAD))
                await self.closed.wait()
                self._server = None
                self._on_lost("closed by the fork server")
        finally:
            if self._server is not None and self._server.channel is self:
                self._server.agent_gone()

    async def send(self, message: Message, listener: object | None = None) -> None:
        if self._server is None:
            raise NotConnected(f"not connected, can't send {type(message).__name__}")
        self._server.obey(message)


@dataclass
class _Group:
    world_size: int
    ranks: dict[int, Worker] = field(default_factory=dict)
    iteration: int = 0
    ticking: bool = False
    leaving: bool = False
    """One of its workers was asked to leave: the flag that the ranks reduce with each iteration."""


class Groups:
    """The process groups of all attempts."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self._groups: dict[tuple[int, str, int], _Group] = {}

    def join(self, worker: Worker) -> None:
        if not worker.alive:
            return
        start = worker.start
        # Workers meet at an address and port: those of another attempt or leader never see each other.
        key = (start.attempt, start.master_address, start.master_port)
        group = self._groups.setdefault(key, _Group(start.layout.world_size))
        group.ranks[worker.rank] = worker
        self._sim.loop.call_later(FORMATION, self._give_up, group, worker)
        if len(group.ranks) == group.world_size and not group.ticking:
            group.ticking = True
            self._sim.loop.call_later(FORM, self._form, group)

    def ask_to_leave(self, worker: Worker) -> None:
        for group in self._groups.values():
            if group.ranks.get(worker.rank) is worker:
                group.leaving = True

    def _give_up(self, group: _Group, worker: Worker) -> None:
        if worker.alive and group.iteration == 0 and not group.ticking:
            message = f"found {len(group.ranks)} of {group.world_size} ranks"
            worker.server.fails(worker, exits.FORMATION, "FormationTimeout", message)

    def _form(self, group: _Group) -> None:
        if self._lost_somebody(group):
            return
        if not self._connected(group):
            self._sim.loop.call_later(ITERATION, self._form, group)
            return
        first = group.ranks[0].start
        group.iteration = first.checkpoint.step if first.checkpoint else 0
        for worker in list(group.ranks.values()):
            if not self._sim.checks.can_load(worker.start):
                worker.server.fails(worker, exits.STORAGE, "Storage", "the checkpoint can't be read")
                continue
            worker.server.tell(Started(worker.start.attempt, worker.rank, group.iteration))
        self._sim.loop.call_later(ITERATION, self._iterate, group)

    def _iterate(self, group: _Group) -> None:
        if self._lost_somebody(group):
            return
        if not self._connected(group):
            # as long as nobody ends, packets come through in the end
            self._sim.loop.call_later(ITERATION, self._iterate, group)
            return
        workers = list(group.ranks.values())
        config = TrainingConfig.from_dict(workers[0].start.config)
        last, every = config.training.iterations, config.checkpoint.every_iterations
        group.iteration = min(group.iteration + 1, last)
        for worker in workers:
            if worker.rank == min(worker.start.ranks):
                tokens = group.iteration * 100
                worker.server.tell(
                    Step(worker.start.attempt, worker.rank, group.iteration, 0, tokens, 2.5, 0.1, 1.0, 1e3, {})
                )
        leaving = group.leaving  # as of now: messages below may change it
        ends = leaving or group.iteration == last
        if ends or group.iteration % every == 0:
            for worker in workers:
                self._save(worker, group.iteration, last=ends)
        if not ends:
            self._sim.loop.call_later(ITERATION, self._iterate, group)
            return
        for worker in workers:
            worker.server.ends_well(worker, group.iteration if group.iteration < last else None)

    def _save(self, worker: Worker, step: int, *, last: bool) -> None:
        attempt, rank = worker.start.attempt, worker.rank
        folder = Path(worker.start.scratch) / "checkpoints" / f"a{attempt}" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{rank:05d}.bin"
        (folder / name).write_bytes(f"{attempt}/{step}/{rank}".encode())
        manifest = RankManifest(attempt, step, rank, (name,), (), {"step": str(step)})
        (folder / f"rank-{rank:05d}.json").write_text(manifest.to_json())
        worker.server.tell(Saved(attempt, rank, step, str(folder), 0.01, 10, last))

    def _lost_somebody(self, group: _Group) -> bool:
        """One has ended: who can hear of it fails, who can't hangs and is asked again."""
        gone = [w for w in group.ranks.values() if not w.alive]
        left = [w for w in group.ranks.values() if w.alive]
        if not gone:
            return False
        for worker in left:
            here = worker.server.box.machine
            if any(here.hears(w.server.box.machine) for w in gone):
                self._sim.loop.call_later(
                    RESET, worker.server.fails, worker, exits.PEER_LOST, "Peer", "Connection closed by peer"
                )
        if left:
            self._sim.loop.call_later(ITERATION, self._lost_somebody, group)
        return True

    def _connected(self, group: _Group) -> bool:
        machines = [w.server.box.machine for w in group.ranks.values()]
        return all(a.hears(b) for a in machines for b in machines)
