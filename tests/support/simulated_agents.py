"""Agents of simulated Pods: the shipped state machine of each, with workers, store and time that are only numbers.

Workers of an attempt train when all its ranks were started; they lose each other when one of them goes.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any

from starcoder_operator.domain.timestamps import after
from starcoder_trainer.agent import machine
from starcoder_trainer.agent import messages as m
from starcoder_trainer.agent.heartbeats import Heartbeats
from starcoder_trainer.contract.assignment import Assignment, CheckpointRef, Endpoint, Offer
from starcoder_trainer.contract.config import TrainingConfig
from starcoder_trainer.contract.heartbeat import USUAL
from starcoder_trainer.contract.report import Cause, Failure, Problem, Report, Verified
from starcoder_trainer.contract.worker import Exited, Saved, Started, Step

EPOCH = "2026-01-01T00:00:00Z"
SAVE_EVERY = 10
STEP = 5
"""Iterations that pass between two looks."""


@dataclass
class Store:
    """HEAD, and what may hinder a leader from claiming it."""

    attempt: int = 0
    entries: list[CheckpointRef] = field(default_factory=list)
    problem: Problem | None = None
    away_from: set[str] = field(default_factory=set)
    """Nodes that don't reach it."""
    committed_at: str = EPOCH
    commits: list[tuple[int, int]] = field(default_factory=list)
    """(attempt, step) in the order in which they were listed."""

    def verified(self) -> Verified | None:
        if not self.entries:
            return None
        newest = self.entries[-1]
        return Verified(newest, f"s3://b/a{newest.attempt}/step-{newest.step:08d}", self.committed_at, 1)


@dataclass
class Group:
    """The process groups of all attempts: which members' workers stand in which attempt."""

    started: dict[int, set[int]] = field(default_factory=dict)
    broken: set[int] = field(default_factory=set)
    """Attempts that lost a worker: the others notice at their next step."""
    reached: dict[int, dict[int, int]] = field(default_factory=dict)
    """Attempt -> member -> iterations done."""
    asked: set[int] = field(default_factory=set)
    """Attempts of which a member was asked to leave: the flag that the ranks reduce."""
    leaves_at: dict[int, int] = field(default_factory=dict)
    """Attempt -> iteration after which all leave."""

    stuck: set[int] = field(default_factory=set)
    """Attempts of which a member's workers come to the end of no iteration, and so nobody's."""

    def leave_at(self, attempt: int) -> int | None:
        if attempt in self.asked and attempt not in self.leaves_at:
            self.leaves_at[attempt] = max(self.reached.get(attempt, {}).values(), default=0)
        return self.leaves_at.get(attempt)


class Agent:
    """One start of a Pod's agent container, with the worker container beside it."""

    _boots = itertools.count()

    def __init__(
        self,
        *,
        run_uid: str,
        pod: str,
        member: int,
        incarnation: int,
        node: str,
        world: World,
        relays: bool = True,
        grace: float = m.GRACE_SECONDS,
    ) -> None:
        self.member, self.world = member, world
        self.boot_id = f"boot-{next(self._boots)}"
        me = m.Identity(run_uid, self.boot_id, pod, incarnation, node, f"10.0.0.{member}", "/scratch", grace)
        self.machine = machine.Machine(me, world.now)
        self.heartbeats = Heartbeats(
            member=member, incarnation=incarnation, boot_id=self.boot_id, rhythm=USUAL, now=world.now
        )
        self.relays = relays
        self.written: Report | None = None
        """What it last wrote into its Lease."""
        self.connected = False
        self.running: int | None = None
        """Attempt whose workers run here."""
        self.iteration = 0
        self.data_seconds = self.checkpoint_seconds = 0.0
        self.quit = self.exited = False
        self.told_to_end = False
        self.holds_up: set[str] = set()
        """What hangs in this Pod: `workers` come to the end of no iteration, `upload` never ends."""
        self.pending: list[m.Event] = []
        self.preparing: int | None = None
        self.iterations = 0
        self.read: tuple[Assignment, str] | None = None

    @property
    def report(self) -> Report:
        """As it stands in the Lease."""
        standing = self.heartbeats.standing(self.world.now)
        if not self.relays:
            return self.machine.report
        return standing.told(self.machine.report, Endpoint(self.machine.me.address, 7070))

    def tell(self, event: m.Event) -> None:
        for action in self.machine.handle(event):
            self._carry_out(action)

    def look(self, assignment: Assignment | None, config_json: str) -> None:
        """One round of everything: the assignment is read where the API answers, workers work, the store answers."""
        if self.exited:
            return
        now = self.world.now
        if assignment is not None and (assignment, config_json) != self.read:
            self.read = (assignment, config_json)
            config, self.iterations = _read(config_json)
            self.tell(m.Assigned(now, assignment, config))
            self.heartbeats.assigned(now, assignment)
        if not self.connected and not self.quit:
            self.connected = True
            self.tell(m.WorkersReady(now))
        self.tell(m.Ticked(now))
        events, self.pending = self.pending, []
        for event in events:
            self.tell(event)
        if self.preparing is not None:
            self._prepare(self.preparing)
        if self.running is not None and self.read is not None:
            known, _ = self.read
            self._work(self.running, len(known.members), known.gpus_per_member)

    def crash(
        self,
        cause: Cause = "Crash",
        message: str = "worker raised",
        fingerprint: str = "",
        suspicion: tuple[int, ...] = (),
    ) -> bool:
        """A worker of this Pod ends; whether there was one."""
        if self.running is None:
            return False
        attempt = self.running
        self._end_workers()
        rank = min(self.machine._workers.ranks) if self.machine._workers else 0
        failure = Failure(cause, message, 70, rank, self.iteration, fingerprint, suspicion)
        self.tell(m.WorkerExited(self.world.now, Exited(attempt, rank, 70, failure)))
        return True

    def vanish(self) -> None:
        """Killed with its workers; nobody is told."""
        self._end_workers()
        self.exited = True

    def _carry_out(self, action: m.Action) -> None:
        now = self.world.now
        match action:
            case m.StartWorkers(start):
                assert self.connected
                assert self.running is None
                self.running = start.attempt
                self.iteration = start.checkpoint.step if start.checkpoint else 0
                self.data_seconds = self.checkpoint_seconds = 0.0
                self.world.group.started.setdefault(start.attempt, set()).add(self.member)
                self.world.group.reached.setdefault(start.attempt, {})[self.member] = self.iteration
            case m.StopWorkers():
                self._end_workers()
                self.pending.append(m.WorkersStopped(now))
            case m.LeaveWorkers(attempt):
                assert self.running == attempt
                self.world.group.asked.add(attempt)
            case m.QuitWorkers():
                self._end_workers()
                self.quit, self.connected = True, False
            case m.Prepare(attempt):
                self.preparing = attempt
            case m.Upload() if "upload" in self.holds_up:
                pass
            case m.Upload(attempt, step):
                self.pending.append(m.ShardUploaded(now, attempt, step))
            case m.Commit(attempt, step):
                self._commit(attempt, step)
            case m.Exit():
                self.exited = True

    def _end_workers(self) -> None:
        if self.running is not None:
            self.world.group.broken.add(self.running)
            self.running = None

    def _prepare(self, attempt: int) -> None:
        store, now = self.world.store, self.world.now
        if self.machine.me.node in store.away_from:
            self.tell(m.PrepareHindered(now, attempt, Problem("StorageUnreachable", "no answer from the endpoint")))
        elif store.problem is not None:
            self.tell(m.PrepareHindered(now, attempt, store.problem))
        elif store.attempt >= attempt:
            self.preparing = None
            self.tell(m.FencedOut(now, attempt, store.attempt))
        else:
            self.preparing, store.attempt = None, attempt
            newest = store.entries[-1] if store.entries else None
            self.tell(m.Prepared(now, attempt, Offer(f"10.0.0.{self.member}", 7, newest), store.verified()))

    def _commit(self, attempt: int, step: int) -> None:
        store, now = self.world.store, self.world.now
        if store.attempt != attempt:
            self.pending.append(m.FencedOut(now, attempt, store.attempt))
            return
        store.entries.append(CheckpointRef(attempt, step, f"sha256:{attempt}-{step}"))
        store.commits.append((attempt, step))
        store.committed_at = after(EPOCH, now)
        verified = store.verified()
        assert verified is not None
        self.pending.append(m.CheckpointVerified(now, attempt, verified))

    def _work(self, attempt: int, members: int, gpus: int) -> None:
        now, group = self.world.now, self.world.group
        workers = self.machine._workers
        ranks = sorted(workers.ranks) if workers else []
        if attempt in group.broken:
            self.crash("Peer", "connection closed by peer")
            return
        if len(group.started.get(attempt, ())) < members:
            return
        if self.report.state == "starting":
            for rank in ranks:
                self.tell(m.WorkerStarted(now, Started(attempt, rank, self.iteration, "", self.world.loading)))
            return
        if "workers" in self.holds_up:
            group.stuck.add(attempt)
        if attempt in group.stuck:
            return
        at = group.leave_at(attempt)
        if at is not None and self.iteration >= at:
            self._leave(attempt, ranks, at)
            return
        self.iteration = min(self.iteration + STEP, self.iterations)
        group.reached.setdefault(attempt, {})[self.member] = self.iteration
        tokens = self.iteration * 100
        self.data_seconds += self.world.data_wait
        self.checkpoint_seconds += self.world.checkpoint_stall
        step = Step(
            attempt, ranks[0], self.iteration, 0, tokens, 2.5, 0.1, 1.0, 1000.0, {},
            data_seconds=self.data_seconds, checkpoint_seconds=self.checkpoint_seconds,
        )  # fmt: skip
        self.tell(m.WorkerStepped(now, step))
        if self.iteration % SAVE_EVERY == 0 or self.iteration == self.iterations:
            self._save(attempt, ranks)
        if self.iteration == self.iterations:
            self.running = None
            for rank in ranks:
                self.tell(m.WorkerExited(now, Exited(attempt, rank, 0, None)))

    def _save(self, attempt: int, ranks: list[int]) -> None:
        for rank in ranks:
            self.tell(m.WorkerSaved(self.world.now, Saved(attempt, rank, self.iteration, "/x", 0.1, 1)))

    def _leave(self, attempt: int, ranks: list[int], at: int) -> None:
        assert self.iteration == at, f"member {self.member} leaves after iteration {self.iteration}, others after {at}"
        if at % SAVE_EVERY:
            self._save(attempt, ranks)
        self.running = None
        for rank in ranks:
            self.tell(m.WorkerExited(self.world.now, Exited(attempt, rank, 0, None, at)))

    def terminate(self) -> None:
        """As the kubelet does it: the worker container is told first, the agent when that has ended."""
        if not self.told_to_end:
            self.told_to_end = True
            self.tell(m.WorkersTerminated(self.world.now))
        if self.running is None:
            self.tell(m.Terminated(self.world.now))


@functools.lru_cache
def _read(config_json: str) -> tuple[dict[str, Any], int]:
    """(configuration as an agent hands it on, iterations)"""
    config = TrainingConfig.from_json(config_json)
    return config.to_dict(), config.training.iterations


@dataclass
class World:
    """What all agents share."""

    now: float = 0.0
    store: Store = field(default_factory=Store)
    group: Group = field(default_factory=Group)
    loading: float = 0.0
    """Seconds that workers say they load."""
    data_wait: float = 0.0
    """Seconds of each look that iterations wait for samples."""
    checkpoint_stall: float = 0.0
    """The same, standing still for checkpoints."""
