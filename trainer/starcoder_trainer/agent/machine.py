"""Decisions of an agent: events in, actions out. No I/O and no clock, so that a simulation can run whole gangs of it.

What it upholds: workers of at most one attempt at a time; an attempt is started at most once and never after a higher
one was seen; nothing starts before the workers before it are reaped. An agent that is told to end has its workers leave
with a checkpoint first, and ends when that is uploaded and, on the leader, committed, or its time is up.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from typing import Any

from starcoder_trainer.agent import problems, stall
from starcoder_trainer.agent.messages import (
    Action,
    Assigned,
    CheckpointRefused,
    CheckpointVerified,
    Commit,
    Event,
    Exit,
    FencedOut,
    Identity,
    Interrogate,
    LeaveWorkers,
    Observed,
    Prepare,
    Prepared,
    PrepareHindered,
    QuitWorkers,
    ShardUploaded,
    StartWorkers,
    StopWorkers,
    StorageTrouble,
    Superseded,
    Terminated,
    Testified,
    Ticked,
    UploadAbandoned,
    WorkerExited,
    WorkerSaved,
    WorkersLost,
    WorkersReady,
    WorkersStopped,
    WorkerStarted,
    WorkerStepped,
    WorkersTerminated,
)
from starcoder_trainer.agent.stopwatch import Stopwatch
from starcoder_trainer.agent.under_way import UnderWay
from starcoder_trainer.contract.assignment import Assignment, Offer
from starcoder_trainer.contract.config import HangConfig, TrainingConfig
from starcoder_trainer.contract.report import Failure, Problem, Progress, Report, State, Verified
from starcoder_trainer.contract.worker import Exited, Saved, Start, Started, Step

STUCK_SECONDS = 60.0
"""SIGKILL ends workers within 2 s; the memory of a large one may take longer to be given back."""
NOT_READY_SECONDS = 60.0
"""A fork server imports torch and megatron in 10 to 30 s; longer is told to the operator."""
GIVE_UP_SECONDS, GIVE_UP_SHARE = 10.0, 0.25
"""How long before the end of its grace period an agent gives up, so that it can still say so; of a short period no more
than that share."""


@dataclass
class _Workers:
    """Processes of one attempt, from the moment that they are asked for until they are known to be reaped."""

    attempt: int
    ranks: frozenset[int]
    world_size: int
    first: int
    """Iterations done by the attempts before."""
    started: frozenset[int] = frozenset()
    finished: frozenset[int] = frozenset()
    left_at: int | None = None
    leaving: bool = False
    """They were asked to."""
    stopping: bool = False
    stopping_since: float | None = None
    """When that was first looked at."""
    overdue: stall.Overdue | None = None
    """They hang, and are being asked why."""


class Machine:
    def __init__(self, me: Identity, now: float) -> None:
        self.me = me
        self._seen = 0
        self._assignment: Assignment | None = None
        self._config: dict[str, Any] = {}
        self._iterations = 0
        self._floors = HangConfig()
        self._attempt = 0
        self._state: State = "idle"
        self._ready = False
        self._waiting_since = now
        self._workers: _Workers | None = None
        self._last_started = 0
        self._prepared_for = 0
        self._answered_for = 0
        """Attempt of which a preparation has said how it goes."""
        self._all_finished = False
        """Every local rank of the attempt ended well."""
        self._left_at: int | None = None
        """Iterations done by workers that ended well before the last one."""
        self._checkpoints = UnderWay()
        self._offer: Offer | None = None
        self._verified: Verified | None = None
        self._failure: Failure | None = None
        self._problem: Problem | None = None
        """Of this Pod's own workers."""
        self._hindrance: Problem | None = None
        """What the leader's preparation waits for."""
        self._storage_problem: Problem | None = None
        self._fenced_by: int | None = None
        self._progress: Progress | None = None
        self._watch: stall.Watch | None = None
        self._stopwatch = Stopwatch(now)
        self._superseded = False
        self._terminated = False
        self._out_by: float | None = None
        """When the Pod is told to end: the time at which its agent gives up."""
        self._quit = False

    @property
    def report(self) -> Report:
        holding = self._offer is not None and self._prepared_for == self._attempt
        return Report(
            boot_id=self.me.boot_id,
            pod=self.me.pod,
            incarnation=self.me.incarnation,
            node=self.me.node,
            attempt=self._attempt,
            state=self._state,
            progress=self._progress,
            offer=self._offer if holding else None,
            verified=self._verified,
            failure=self._failure,
            problem=self._problem or self._hindrance or self._trouble,
            fenced_by=self._fenced_by,
        )

    @property
    def _trouble(self) -> Problem | None:
        """What uploads and commits meet. A leader that has asked S3 itself since its attempt is held knows better than
        what is left of the one before."""
        assignment = self._assignment
        knows = assignment is not None and assignment.phase == "hold" and assignment.attempt == self._answered_for
        return None if knows else self._storage_problem

    @property
    def watched(self) -> tuple[int, frozenset[int]] | None:
        """(attempt, ranks) of workers that run and are to be looked at."""
        workers = self._workers
        return None if workers is None or workers.stopping else (workers.attempt, workers.ranks)

    @property
    def silent(self) -> bool:
        """A later Pod answers for this member; writing its Lease would hide it."""
        return self._superseded

    def handle(self, event: Event) -> tuple[Action, ...]:
        """What to do now. Actions are carried out in order, their outcomes come back as events."""
        out: list[Action] = []
        state = self._state
        match event:
            case Assigned(assignment=assignment, config=config):
                self._assigned(assignment, config)
            case WorkersReady():
                self._ready, self._problem = True, None
            case WorkersLost(failure=failure):
                self._lost(failure, event.now)
            case WorkerStarted(message=message):
                self._worker_started(message, event.now)
            case WorkerStepped(message=message):
                self._worker_stepped(message, event.now)
            case WorkerSaved(message=message):
                out += self._worker_saved(message)
            case WorkerExited(message=message):
                self._worker_exited(message)
            case WorkersStopped() if self._workers and self._workers.stopping:
                self._stopped(self._workers)
            case Observed():
                out += self._observed(event)
            case Testified(attempt=attempt) if self._running(attempt):
                self._testified(event)
            case Prepared(attempt=attempt) if self._prepares(attempt):
                self._answered_for = attempt
                self._offer, self._verified, self._hindrance = event.offer, event.verified, None
            case PrepareHindered(attempt=attempt) if self._prepares(attempt):
                self._answered_for, self._hindrance = attempt, event.problem
            case FencedOut(attempt=attempt) if self._assignment and attempt == self._assignment.attempt:
                self._fenced(attempt, event.by)
            case ShardUploaded(attempt=attempt, step=step):
                self._checkpoints.uploaded(attempt, step)
                if self._leads(attempt):
                    assert self._assignment is not None
                    out.append(Commit(attempt, step, len(self._assignment.members)))
                else:
                    self._checkpoints.settled(attempt, step)
            case UploadAbandoned(attempt=attempt, step=step):
                self._checkpoints.given_up(attempt, step)
            case StorageTrouble(problem=problem):
                self._storage_problem = problem
            case CheckpointVerified(attempt=attempt, verified=verified):
                self._checkpoints.settled(attempt, verified.checkpoint.step)
                if self._leads(attempt):
                    self._verified = verified
            case CheckpointRefused(attempt=attempt, step=step, message=message):
                self._checkpoints.given_up(attempt, step)
                if self._running(attempt) or (attempt == self._attempt and self._all_finished):
                    self._refused(step, message)
            case Superseded():
                self._superseded = True
            case WorkersTerminated():
                self._told_to_end(event.now)
            case Terminated():
                self._terminated = True
                self._told_to_end(event.now)
            case Ticked():
                pass
        self._tell_long_wait(event.now)
        self._tell_stuck(event.now)
        self._finish()
        if self._state in ("done", "left") and self._state != state and self._progress:
            self._progress = replace(self._progress, spent=self._stopwatch.done(event.now))
        out += self._drive(event.now)
        return tuple(out)

    # Events

    def _assigned(self, assignment: Assignment, config: dict[str, Any]) -> None:
        if assignment.run_uid != self.me.run_uid or assignment.attempt < self._seen:
            return
        current = self._assignment
        if current and current.attempt == assignment.attempt and current.phase != "hold":
            otherwise = assignment.phase != "stop" and assignment.members != current.members
            if assignment.phase == "hold" or otherwise:
                return  # an attempt is formed once
        if assignment.attempt > self._seen:
            self._seen = assignment.attempt
            self._problem = self._problem if self._problem and self._problem.reason == "WorkerNotReady" else None
            self._hindrance, self._fenced_by = None, None
        self._assignment, self._config = assignment, config
        read = TrainingConfig.from_dict(config)
        self._iterations, self._floors = read.training.iterations, read.hang

    def _lost(self, failure: Failure, now: float) -> None:
        if self._ready:
            self._waiting_since = now
        self._ready = False
        workers, self._workers = self._workers, None
        if workers and not workers.stopping and not self._terminated:
            self._fail(failure)

    def _worker_started(self, message: Started, now: float) -> None:
        if not self._running(message.attempt):
            return
        assert self._workers is not None
        self._workers.started |= {message.rank}
        spent = self._stopwatch.started(now, message.loading_seconds)
        self._progress = replace(self._progress or Progress(), iteration=message.iteration, spent=spent)
        if self._workers.started >= self._workers.ranks and self._state == "starting":
            self._state = "training"

    def _worker_stepped(self, message: Step, now: float) -> None:
        if self._running(message.attempt):
            self._progress = Progress(
                iteration=message.iteration,
                consumed_samples=message.consumed_samples,
                consumed_tokens=message.consumed_tokens,
                loss=message.loss,
                tokens_per_second=message.tokens_per_second,
                spent=self._stopwatch.stepped(now, message.data_seconds, message.checkpoint_seconds),
            )

    def _worker_saved(self, message: Saved) -> list[Action]:
        if self._workers is None or self._workers.attempt != message.attempt:
            return []
        # Also while they are being stopped: what is on disk outlives its worker, and the next claimer adopts it.
        upload = self._checkpoints.saved(message, self._workers.ranks, self._workers.world_size)
        return [] if upload is None else [upload]

    def _worker_exited(self, message: Exited) -> None:
        workers = self._workers
        if workers is None or workers.attempt != message.attempt:
            return
        if message.exit_code == 0 and message.failure is None:
            if workers.stopping:
                return
            workers.finished |= {message.rank}
            if message.left_at is not None:
                workers.left_at = message.left_at
                self._state = "draining" if self._state == "training" else self._state
            if workers.finished >= workers.ranks:
                self._finished(workers.left_at)
            return
        if workers.overdue is not None and message.failure is not None and message.failure.cause == "Peer":
            return  # another Pod of the gang that hangs was faster; why it hangs here is known in a moment
        if workers.stopping and (self._state != "failed" or message.exit_code == -signal.SIGKILL):
            return  # killed because we asked for it
        self._fail(
            message.failure
            or Failure("Crash", f"worker ended with exit code {message.exit_code}", message.exit_code, message.rank)
        )

    def _finished(self, left_at: int | None) -> None:
        """Every local rank has ended well."""
        self._workers, self._all_finished, self._left_at = None, True, left_at
        if left_at is not None:
            self._progress = replace(self._progress or Progress(), iteration=left_at)

    def _observed(self, event: Observed) -> list[Action]:
        workers, watch = self._workers, self._watch
        if workers is None or watch is None or not self._running(watch.attempt):
            return []
        overdue = watch.look(event.now, event.stamps, event.answered, workers.finished)
        known, workers.overdue = workers.overdue, overdue
        if overdue is None or known is not None:
            return []
        return [Interrogate(overdue, dict(watch.stamps))]

    def _testified(self, event: Testified) -> None:
        assert self._workers is not None
        assert self._watch is not None
        if self._workers.overdue is not None:
            self._fail(stall.explain(self._workers.overdue, self._watch.stamps, event.workers, event.where))

    def _fenced(self, attempt: int, by: int) -> None:
        self._fenced_by = max(by, self._fenced_by or 0)
        self._checkpoints.fenced(attempt)
        found = f"HEAD in S3 belongs to attempt {by}, this is {attempt}"
        if by > attempt and self._running(attempt):
            # Another attempt has begun, and whoever ordered it does not reach this Pod. Nothing that is trained here
            # can be saved any more, and what is uploaded is swept by the attempt after that.
            self._fail(Failure("Peer", found))
        elif by < attempt and (self._running(attempt) or (attempt == self._attempt and self._all_finished)):
            put_back = f"{found}: it was put back by hand, and the next attempt goes on from what it lists"
            self._fail(Failure("Storage", put_back))

    def _refused(self, step: int, message: str) -> None:
        if step >= (self._iterations if self._left_at is None else self._left_at):
            self._fail(Failure("Storage", f"the last checkpoint is not what was saved: {message}", iteration=step))

    # What follows from them

    def _fail(self, failure: Failure) -> None:
        """The attempt is over here. A cause of its own replaces one that only says that a peer went away."""
        if self._state != "failed" or (self._failure and self._failure.cause == "Peer" and failure.cause != "Peer"):
            self._failure = failure
        self._state = "failed"
        self._all_finished = False

    def _finish(self) -> None:
        if not self._all_finished or self._state in ("done", "left"):
            return
        if self._checkpoints.has(self._attempt) or self._fenced_by is not None:
            return
        if self._assignment is None or self._assignment.attempt != self._attempt:
            return  # a later attempt is to be entered; who led this one does not commit for it any more
        if self._leads(self._attempt):
            step = self._verified.checkpoint.step if self._verified else 0
            expected = self._iterations if self._left_at is None else self._left_at
            if step < expected:
                self._fail(
                    Failure(
                        "Crash",
                        f"workers ended well, but the newest verified checkpoint is of iteration {step}, expected "
                        f"{expected}",
                    )
                )
                return
        self._state = "done" if self._left_at is None else "left"

    def _tell_long_wait(self, now: float) -> None:
        if self._ready or self._quit or self._out_by is not None or now - self._waiting_since < NOT_READY_SECONDS:
            return
        # A minute, two, four and so on: each change of the message is a write of every agent that waits.
        minutes = int((now - self._waiting_since) / NOT_READY_SECONDS)
        waited = int(NOT_READY_SECONDS) << (minutes.bit_length() - 1)
        self._problem = problems.worker_not_ready(self.me.pod, waited)

    def _tell_stuck(self, now: float) -> None:
        """Nothing is left to try from here: the Pod is to be replaced."""
        workers = self._workers
        if workers is None or not workers.stopping:
            if self._problem is not None and self._problem.reason == "WorkersStuck":
                self._problem = None
            return
        if workers.stopping_since is None:
            workers.stopping_since = now
        if now - workers.stopping_since >= STUCK_SECONDS:
            self._problem = problems.workers_stuck(self.me.pod, workers.attempt, STUCK_SECONDS)

    def _drive(self, now: float) -> list[Action]:
        workers, assignment = self._workers, self._assignment
        if self._superseded or self._out_by is not None:
            return self._end(now)
        if assignment is None or (self._quit and not self._ready):
            return []
        if assignment.phase == "stop" or self._quit:  # a fork server that was started meanwhile has not heard it
            if workers:
                self._state = "draining"
            self._quit, self._workers, self._ready = True, None, False
            return [QuitWorkers()]
        if workers and not workers.stopping and (workers.attempt < assignment.attempt or self._state == "failed"):
            return self._stop(workers)
        if assignment.phase == "drain" and workers and not workers.stopping:
            return self._leave(workers)
        place = assignment.place_of(self.me.boot_id)
        if place is None:
            self._stand_by(assignment)
            return []
        out: list[Action] = []
        if place == 0 and assignment.phase == "hold" and self._prepared_for < assignment.attempt:
            self._prepared_for, self._offer = assignment.attempt, None
            out.append(Prepare(assignment.attempt, self._config))
        if self._workers is None and self._ready:
            self._enter(assignment, place)
            if assignment.phase == "run" and assignment.offer and self._last_started < assignment.attempt:
                self._stopwatch.start(now)
                self._progress = replace(self._progress, spent=None) if self._progress else None
                out.append(self._start(assignment, assignment.offer, place, now))
        return out

    def _told_to_end(self, now: float) -> None:
        if self._out_by is None:
            grace = self.me.grace_seconds
            self._out_by = now + grace - min(GIVE_UP_SECONDS, grace * GIVE_UP_SHARE)

    def _end(self, now: float) -> list[Action]:
        """The Pod is to end, or is forgotten: nothing is started any more."""
        workers = self._workers
        late = self._superseded or (self._out_by is not None and now >= self._out_by)
        if workers is not None:
            if workers.stopping:
                return []
            current = self._assignment is not None and workers.attempt == self._assignment.attempt
            if current and self._state != "failed" and not late:
                return self._leave(workers)
            if late and not self._superseded:
                self._tell_too_late()
            return self._stop(workers)
        waits = self._checkpoints.has(self._attempt) if self._all_finished else self._checkpoints.uploads
        if waits and not late:
            return []
        if waits and not self._superseded:
            self._tell_too_late()
        return [Exit()] if self._terminated else []

    def _leave(self, workers: _Workers) -> list[Action]:
        if workers.leaving:
            return []
        workers.leaving = True
        before, self._state = self._state, "draining"
        if before == "starting":  # no iteration has passed that would be lost
            return self._stop(workers)
        return [LeaveWorkers(workers.attempt)]

    def _stop(self, workers: _Workers) -> list[Action]:
        workers.stopping = True
        return [StopWorkers(workers.attempt)]

    def _stand_by(self, assignment: Assignment) -> None:
        """An attempt goes on without this agent: once its own workers are reaped it is a spare, ready to be listed."""
        if self._workers is None and self._attempt < assignment.attempt:
            self._state, self._failure, self._all_finished, self._left_at = "idle", None, False, None

    def _stopped(self, workers: _Workers) -> None:
        self._workers = None
        if workers.leaving and not workers.started >= workers.ranks:
            self._finished(workers.first)

    def _tell_too_late(self) -> None:
        newest = self._verified.checkpoint.step if self._verified else None
        self._problem = problems.grace_exceeded(self.me.pod, self.me.grace_seconds, self._left_at, newest)

    def _enter(self, assignment: Assignment, place: int) -> None:
        """No worker runs and one can be forked: what is said from here on is about the assignment's attempt."""
        if self._attempt == assignment.attempt:
            return
        self._attempt, self._state = assignment.attempt, "idle"
        self._failure, self._all_finished, self._left_at = None, False, None
        if place != 0:
            self._verified = None

    def _start(self, assignment: Assignment, offer: Offer, place: int, now: float) -> StartWorkers:
        per_member = assignment.gpus_per_member
        ranks = tuple(range(place * per_member, (place + 1) * per_member))
        first = offer.checkpoint.step if offer.checkpoint else 0
        self._workers = _Workers(assignment.attempt, frozenset(ranks), assignment.layout.world_size, first)
        self._watch = stall.Watch(assignment.attempt, ranks, self._floors, now)
        self._last_started = assignment.attempt
        self._state = "starting"
        return StartWorkers(
            Start(
                attempt=assignment.attempt,
                ranks=ranks,
                layout=assignment.layout,
                master_address=offer.address,
                master_port=offer.port,
                checkpoint=offer.checkpoint,
                config=self._config,
                scratch=self.me.scratch,
                interface_address=self.me.address,
                stamps=self.me.stamps,
            ),
            as_leader=place == 0,
        )

    def _running(self, attempt: int) -> bool:
        return self._workers is not None and self._workers.attempt == attempt and not self._workers.stopping

    def _prepares(self, attempt: int) -> bool:
        """Its answer is waited for. An older look of the assignment, in which it does not lead yet, may come late."""
        current = self._assignment
        return current is not None and current.attempt == attempt == self._prepared_for

    def _leads(self, attempt: int) -> bool:
        assignment = self._assignment
        return assignment is not None and assignment.attempt == attempt and assignment.place_of(self.me.boot_id) == 0
