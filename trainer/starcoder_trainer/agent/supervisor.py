"""Carries out what the machine decides, and brings it what came of it.

Knows no Kubernetes: assignments come in, reports go out; a Pod's agent and a local run differ only in who is at the
other end.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starcoder_trainer.agent import machine, messages, preflight
from starcoder_trainer.agent.channel import Channel, NotConnected
from starcoder_trainer.agent.committer import Committer
from starcoder_trainer.agent.ledger import CheckpointLost, Ledger
from starcoder_trainer.agent.metrics import Metrics
from starcoder_trainer.agent.observer import Observer
from starcoder_trainer.agent.upload import Uploader, Uploads, delete_leftovers
from starcoder_trainer.contract.assignment import Assignment
from starcoder_trainer.contract.config import StorageConfig, TrainingConfig
from starcoder_trainer.contract.report import Failure, Report
from starcoder_trainer.contract.worker import (
    Exited,
    Leave,
    Message,
    Quit,
    Ready,
    Saved,
    Seen,
    Start,
    Started,
    Step,
    Stop,
    Stopped,
    Terminating,
)
from starcoder_trainer.storage.store import ObjectStore, StorageError

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
RETRY_SECONDS = 3.0
"""Between two tries of a preparation that something outside hinders."""
UNREAD = ("Storage", "DataStall")
"""Failures after which the leader looks at the data again: it may have been deleted, and saying so costs no attempt."""


@dataclass(frozen=True)
class Surroundings:
    """What a supervisor needs of the world."""

    open_store: Callable[[str, StorageConfig], ObjectStore]
    check_data: preflight.CheckData
    worker_socket: Path
    member: int
    report: Callable[[Report], None]
    """Called on each change."""
    metrics: Metrics
    retry_seconds: float = RETRY_SECONDS


class _Over(Exception):
    """Ends the services with the supervisor."""


class Supervisor:
    def __init__(
        self, me: messages.Identity, around: Surroundings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._me = me
        self._around = around
        self._clock = clock
        self._machine = machine.Machine(me, clock())
        self._events: asyncio.Queue[messages.Event] = asyncio.Queue()
        self._channel = Channel(around.worker_socket, self._on_message, self._on_lost)
        self._config: TrainingConfig | None = None
        self._stores: dict[tuple[str, StorageConfig], ObjectStore] = {}
        self._ledger_of: tuple[ObjectStore, int, Ledger] | None = None
        """The ledger, its store and how many checkpoints it keeps: what a mended spec may change."""
        self._listener: tuple[int, socket.socket] | None = None
        """(attempt, socket that was offered for it)"""
        self._preparing: asyncio.Task[None] | None = None
        self._checked: TrainingConfig | None = None
        """Whose data was found whole."""
        self._world_size = 1
        self._uploader = Uploader(around.member, self._checkpoints, self.post, self._on_uploaded, clock)
        self._committer = Committer(self._ledger, lambda: self._checkpoints().uri, self.post, clock)
        self._observer = Observer(
            me, around.member, lambda: self._machine.watched, self._channel.send, self._checkpoints, self.post, clock
        )
        self._reported: Report | None = None
        self._newest = 0
        """Highest attempt that was assigned."""
        self._ranks: set[int] = set()
        """That workers of this Pod have had."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def report(self) -> Report:
        return self._machine.report

    @property
    def silent(self) -> bool:
        return self._machine.silent

    def post(self, event: messages.Event) -> None:
        """From any thread."""
        assert self._loop is not None, "run() has not begun"
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def assign(self, assignment: Assignment, config: dict[str, Any]) -> None:
        self.post(messages.Assigned(self._clock(), assignment, config))

    def supersede(self) -> None:
        self.post(messages.Superseded(self._clock()))

    def terminate(self) -> None:
        self.post(messages.Terminated(self._clock()))

    async def run(self) -> None:
        """Until the machine exits, which it does after `terminate`."""
        self._loop = asyncio.get_running_loop()
        self._publish()
        try:
            async with asyncio.TaskGroup() as self._tasks:
                for service in (
                    self._channel.run(),
                    self._uploader.run(),
                    self._committer.run(),
                    self._observer.run(),
                    self._tick(),
                ):
                    self._tasks.create_task(service)
                while await self._handle(await self._events.get()):
                    pass
                raise _Over
        except* _Over:
            pass
        finally:
            self._close_listener()

    async def _handle(self, event: messages.Event) -> bool:
        """Whether to go on."""
        if isinstance(event, messages.Assigned) and event.assignment.run_uid == self._me.run_uid:
            self._config = TrainingConfig.from_dict(event.config)
            self._world_size = event.assignment.layout.world_size
            self._newest = max(self._newest, event.assignment.attempt)
        actions = self._machine.handle(event)
        self._publish()
        for action in actions:
            log.info("%s", _named(action))
            if isinstance(action, messages.Exit):
                return False
            await self._carry_out(action)
        return True

    async def _carry_out(self, action: messages.Action) -> None:
        match action:
            case messages.StartWorkers(start, as_leader):
                await self._make_room(start)
                await self._send(start, self._take_listener(start.attempt) if as_leader else None)
            case messages.StopWorkers(attempt):
                await self._send(Stop(attempt), None)
            case messages.LeaveWorkers(attempt):
                await self._send(Leave(attempt), None)
            case messages.Interrogate():
                assert self._tasks is not None
                self._tasks.create_task(self._observer.interrogate(action))
            case messages.QuitWorkers():
                await self._send(Quit(), None)
            case messages.Prepare(attempt, config):
                if self._preparing:
                    self._preparing.cancel()
                self._committer.forget_before(attempt)
                assert self._tasks is not None
                self._preparing = self._tasks.create_task(self._prepare(attempt, TrainingConfig.from_dict(config)))
            case messages.Upload():
                self._uploader.add(action)
            case messages.Commit():
                self._committer.add(action)
            case messages.Exit():
                pass

    async def _make_room(self, start: Start) -> None:
        """Half-written steps of workers that were killed go; what is being uploaded stays, as does what these start
        from."""
        await self._uploader.begins(start.attempt, start.checkpoint)
        self._committer.forget_before(start.attempt)
        source = start.checkpoint
        self._ranks |= set(start.ranks)

        def keep(attempt: int, step: int) -> bool:
            is_source = source is not None and (attempt, step) == (source.attempt, source.step)
            return is_source or self._uploader.busy_with(attempt)

        await asyncio.to_thread(delete_leftovers, Path(start.scratch), self._ranks, keep)

    async def _send(self, message: Message, listener: socket.socket | None) -> None:
        try:
            await self._channel.send(message, listener)
        except NotConnected as e:
            # That the server went is told by the channel as an event of its own.
            log.warning("%s", e)
        finally:
            if listener is not None:
                listener.close()

    async def _prepare(self, attempt: int, config: TrainingConfig) -> None:
        """Tries until it succeeds, is fenced, or a higher attempt is formed, which another may lead."""

        told = False

        def answered() -> None:
            nonlocal told
            if not told:  # once: where reads fail again and again, what is told does not change to and fro
                self.post(messages.PrepareHindered(self._clock(), attempt, None))
            told = True

        while self._newest <= attempt:
            try:
                if self._checked != config:
                    await asyncio.to_thread(preflight.check, config, self._open, self._around.check_data)
                    self._checked = config
                    if self._newest > attempt:  # what follows would be another's to adopt
                        return
                ledger, store = self._ledger(), self._checkpoints()
                place = await asyncio.to_thread(
                    preflight.claim, attempt, config, ledger, store.uri, self._me.address, answered=answered
                )
            except preflight.Hindered as e:
                log.warning("%s: %s", e.problem.reason, e.problem.message)
                self.post(messages.PrepareHindered(self._clock(), attempt, e.problem))
            except preflight.FencedByHead as e:
                log.warning("attempt %d: %s", attempt, e)
                self.post(messages.FencedOut(self._clock(), attempt, e.by))
                return
            else:
                self._close_listener()
                self._listener = (attempt, place.listener)
                self.post(messages.Prepared(self._clock(), attempt, place.offer, place.verified))
                await self._sweep(ledger, attempt)
                return
            await asyncio.sleep(self._around.retry_seconds)

    async def _sweep(self, ledger: Ledger, attempt: int) -> None:
        try:
            if swept := await asyncio.to_thread(ledger.sweep, attempt):
                log.info("deleted %d unfinished checkpoints of older attempts", swept)
        except (StorageError, CheckpointLost) as e:
            log.warning("not swept: %s", e)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.post(messages.Ticked(self._clock()))

    def _on_message(self, message: Message) -> None:
        now = self._clock()
        match message:
            case Ready():
                self.post(messages.WorkersReady(now))
            case Started():
                self._around.metrics.started(message)
                self.post(messages.WorkerStarted(now, message))
            case Step():
                self._around.metrics.stepped(message, self._world_size)
                self.post(messages.WorkerStepped(now, message))
            case Saved():
                self._around.metrics.saved(message)
                self.post(messages.WorkerSaved(now, message))
            case Exited():
                log.log(logging.WARNING if message.exit_code else logging.INFO, "%s", message)
                self.post(messages.WorkerExited(now, message))
            case Seen():
                self._observer.seen(message)
            case Stopped():
                self.post(messages.WorkersStopped(now))
            case Terminating():
                self.post(messages.WorkersTerminated(now))
            case _:
                log.error("ignored: the fork server sent %s", type(message).__name__)

    def _on_lost(self, why: str) -> None:
        message = (
            f"the fork server of Pod {self._me.pod} went away ({why}), expected it to live as long as the Pod; see "
            f"`kubectl logs {self._me.pod} -c worker --previous`"
        )
        self.post(messages.WorkersLost(self._clock(), Failure("ContainerCrashed", message)))

    def _on_uploaded(self, uploads: Uploads) -> None:
        self._around.metrics.uploaded(uploads.seconds, uploads.size_bytes)

    def _publish(self) -> None:
        report = self._machine.report
        if report != self._reported:
            self._reported = report
            if report.failure is not None and report.failure.cause in UNREAD:
                self._checked = None
            self._around.metrics.reported(report)
            self._around.report(report)

    def _open(self, uri: str) -> ObjectStore:
        assert self._config is not None
        key = uri, self._config.storage
        if key not in self._stores:
            self._stores[key] = self._around.open_store(*key)
        return self._stores[key]

    def _checkpoints(self) -> ObjectStore:
        assert self._config is not None
        return self._open(self._config.checkpoint.uri)

    def _ledger(self) -> Ledger:
        assert self._config is not None
        store, keep_last = self._checkpoints(), self._config.checkpoint.keep_last
        if self._ledger_of is None or self._ledger_of[:2] != (store, keep_last):
            self._ledger_of = store, keep_last, Ledger(store, self._config.run, self._me.boot_id, keep_last)
        return self._ledger_of[2]

    def _take_listener(self, attempt: int) -> socket.socket | None:
        if self._listener is None or self._listener[0] != attempt:
            log.error("attempt %d: its port is not held any more", attempt)
            return None
        (_, listener), self._listener = self._listener, None
        return listener

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener[1].close()
            self._listener = None


def _named(action: messages.Action) -> str:
    """For the log: no configuration, no stacks."""
    match action:
        case messages.StartWorkers(start):
            return f"start ranks {start.ranks}"
        case messages.Interrogate(overdue):
            return f"no progress: {overdue}"
    return str(action)
