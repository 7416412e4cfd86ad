"""In whatever order assignments, workers, storage and Pods behave: one attempt at a time, never a lower one."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from starcoder_trainer.agent import machine
from starcoder_trainer.agent import messages as m
from starcoder_trainer.contract.assignment import Assignment, CheckpointRef, Layout, Member, Offer
from starcoder_trainer.contract.report import Failure, Problem, Report, Verified
from starcoder_trainer.contract.worker import Exited, Saved, Started
from tests.support.training import training_config

ITERATIONS = 20
CONFIG = training_config(iterations=ITERATIONS).to_dict()
RANKS = (0, 1)


class AgentMachine(RuleBasedStateMachine):
    """A fork server that is slow and mortal, an operator that writes anything, a store that answers when it likes."""

    @initialize(
        leads=st.booleans(), ending=st.sampled_from(["none", "none", "stop", "superseded", "terminated", "terminated"])
    )
    def start(self, leads, ending):
        self.ending = ending
        """What may end this agent's days; one of them an example, or most examples would be over early."""
        self.place = 0 if leads else 1
        self.agent = machine.Machine(m.Identity("uid-1", "mine", "demo-w0-0", 0, "n1", "10.0.0.9", "/scratch"), 0.0)
        self.now = 0.0
        self.newest = {}  # attempt -> step that its workers saved last
        self.connected = False
        self.alive: set[int] = set()
        """Local ranks that run, in the fork server."""
        self.alive_attempt = 0
        self.stop_asked = False
        self.asked: set[int] = set()
        self.last_started = 0
        self.highest_listed = 0
        self.uploads: list[tuple[int, int]] = []
        self.commits: list[tuple[int, int]] = []
        self.quit = self.over = False
        self.superseded = self.told = self.terminated = False

    def tell(self, kind, *args):
        self.now += 1
        for action in self.agent.handle(kind(self.now, *args)):
            self.carry_out(action)

    def carry_out(self, action):
        match action:
            case m.StartWorkers(start):
                assert self.connected, "started without a fork server"
                assert not self.alive, f"started {start.attempt} while {self.alive_attempt} runs"
                assert not self.stop_asked, "started before the workers before were reaped"
                assert start.attempt > self.last_started, "started an attempt twice or backwards"
                assert start.attempt == self.highest_listed, "started a lower attempt than seen"
                assert not any((self.superseded, self.told, self.terminated, self.quit))
                self.alive, self.alive_attempt, self.last_started = set(start.ranks), start.attempt, start.attempt
            case m.StopWorkers():
                self.stop_asked = self.connected
            case m.LeaveWorkers(attempt):
                assert self.alive
                assert attempt == self.alive_attempt
                assert attempt not in self.asked, "asked twice"
                self.asked.add(attempt)
            case m.QuitWorkers():
                assert not self.quit
                self.quit, self.connected, self.alive, self.stop_asked = True, False, set(), False
            case m.Upload(attempt, step):
                self.uploads.append((attempt, step))
            case m.Commit(attempt, step):
                assert self.place == 0, "a follower commits"
                self.commits.append((attempt, step))
            case m.Exit():
                assert self.terminated
                assert not self.alive, "exited while workers run"
                assert not self.uploads, "exited before its shards were uploaded"
                self.over = True

    @precondition(lambda self: not self.over)
    @rule(
        step=st.sampled_from([0, 0, 1, -1, 2]),
        phase=st.sampled_from(["hold", "hold", "run", "run", "drain"]),
        listed=st.sampled_from([True, True, True, False]),
    )
    def operator_writes(self, step, phase, listed):
        attempt = max(1, self.highest_listed + step)
        mine, other = Member(0, "mine" if listed else "someone"), Member(1, "another")
        members = (mine, other) if self.place == 0 else (other, mine)
        offer = Offer("10.0.0.1", 1, CheckpointRef(1, 10, "d")) if phase == "run" else None
        self.highest_listed = max(self.highest_listed, attempt)
        self.tell(m.Assigned, Assignment("uid-1", attempt, phase, members, 2, Layout(1, 1, 4), offer), CONFIG)

    @precondition(lambda self: not self.over and not self.connected and not self.quit)
    @rule()
    def fork_server_comes(self):
        self.connected, self.stop_asked = True, False
        self.tell(m.WorkersReady)

    @precondition(lambda self: not self.over and self.connected)
    @rule()
    def fork_server_dies(self):
        self.connected, self.alive, self.stop_asked = False, set(), False
        self.tell(m.WorkersLost, Failure("Crash", "gone"))

    @precondition(lambda self: not self.over and self.stop_asked)
    @rule()
    def workers_are_reaped(self):
        self.alive, self.stop_asked = set(), False
        self.tell(m.WorkersStopped)

    @precondition(lambda self: not self.over and self.alive)
    @rule(data=st.data())
    def worker_starts(self, data):
        self.tell(m.WorkerStarted, Started(self.alive_attempt, data.draw(st.sampled_from(sorted(self.alive))), 0))

    @precondition(lambda self: not self.over and self.alive)
    @rule(data=st.data(), code=st.sampled_from([0, 0, 70, 75, -9]))
    def worker_ends(self, data, code):
        rank = data.draw(st.sampled_from(sorted(self.alive)))
        self.alive.discard(rank)
        cause = {0: None, 75: "Peer"}.get(code, "Crash")
        self.tell(m.WorkerExited, Exited(self.alive_attempt, rank, code, Failure(cause, "x") if cause else None))

    @precondition(lambda self: not self.over and self.alive)
    @rule()
    def all_workers_end_well(self):
        for rank in sorted(self.alive):
            self.alive.discard(rank)
            self.tell(m.WorkerExited, Exited(self.alive_attempt, rank, 0, None))

    def comes_later(self, step):
        """Iterations of an attempt only go up."""
        if step <= self.newest.get(self.alive_attempt, 0):
            return False
        self.newest[self.alive_attempt] = step
        return True

    @precondition(lambda self: not self.over and self.alive)
    @rule(step=st.sampled_from([11, 12]))
    def workers_leave(self, step):
        """They or another member's were asked to."""
        if not self.comes_later(step):
            return
        for rank in sorted(self.alive):
            self.tell(m.WorkerSaved, Saved(self.alive_attempt, rank, step, "/x", 0.1, 1))
        for rank in sorted(self.alive):
            self.alive.discard(rank)
            self.tell(m.WorkerExited, Exited(self.alive_attempt, rank, 0, None, step))

    @precondition(lambda self: not self.over and self.alive)
    @rule(step=st.sampled_from([10, ITERATIONS]))
    def workers_save(self, step):
        if not self.comes_later(step):
            return
        for rank in sorted(self.alive):
            self.tell(m.WorkerSaved, Saved(self.alive_attempt, rank, step, "/x", 0.1, 1))

    @precondition(lambda self: not self.over and self.uploads)
    @rule()
    def upload_ends(self):
        self.tell(m.ShardUploaded, *self.uploads.pop(0))

    @precondition(lambda self: not self.over and self.commits)
    @rule(refused=st.booleans())
    def commit_ends(self, refused):
        attempt, step = self.commits.pop(0)
        if refused:
            self.tell(m.CheckpointRefused, attempt, step, "cut")
        else:
            self.tell(m.CheckpointVerified, attempt, Verified(CheckpointRef(attempt, step, "d"), "u", "t", 1))

    @precondition(lambda self: not self.over)
    @rule(attempt=st.integers(1, 6), hindered=st.booleans())
    def preparation_answers(self, attempt, hindered):
        if hindered:
            self.tell(m.PrepareHindered, attempt, Problem("DataNotFound", "x"))
        else:
            self.tell(m.Prepared, attempt, Offer("10.0.0.9", 7, None), None)

    @precondition(lambda self: not self.over and self.ending == "superseded" and not self.superseded)
    @rule()
    def superseded_by_a_later_pod(self):
        self.superseded = True
        self.tell(m.Superseded)

    @precondition(lambda self: not self.over and self.ending == "terminated" and self.connected and not self.told)
    @rule()
    def worker_container_gets_sigterm(self):
        self.told = True
        self.tell(m.WorkersTerminated)

    @precondition(lambda self: not self.over and self.ending == "terminated" and not self.terminated)
    @rule()
    def sigterm(self):
        self.terminated = True
        self.tell(m.Terminated)

    @precondition(lambda self: not self.over and self.ending == "stop" and not self.quit)
    @rule()
    def operator_stops(self):
        self.operator_writes(0, "stop", True)

    @rule()
    def time_passes(self):
        if not self.over:
            self.tell(m.Ticked)

    @invariant()
    def idle_means_that_no_worker_runs(self):
        if self.agent.report.state == "idle":
            assert not self.alive

    @invariant()
    def training_is_said_only_of_workers_that_run_or_ended_well(self):
        report = self.agent.report
        if report.state in ("starting", "training") and self.alive:
            assert report.attempt == self.alive_attempt

    @invariant()
    def a_leader_is_done_only_with_the_last_checkpoint_verified(self):
        report = self.agent.report
        if self.place == 0 and report.state == "done":
            assert report.verified is not None
            assert report.verified.checkpoint.step >= ITERATIONS

    @invariant()
    def who_has_left_has_its_checkpoint_uploaded_and_the_leader_has_it_in_head(self):
        report = self.agent.report
        if report.state == "left":
            assert not self.alive
            assert report.attempt not in {attempt for attempt, _ in self.uploads}
            if self.place == 0 and report.verified is not None:
                assert report.verified.checkpoint.step >= report.progress.iteration

    @invariant()
    def failed_names_a_failure_and_every_report_survives_the_wire(self):
        report = self.agent.report
        assert (report.state == "failed") <= (report.failure is not None)
        assert Report.from_json(report.to_json()) == report


AgentMachine.TestCase.settings = settings(max_examples=400, stateful_step_count=40, deadline=None)
TestAgentMachine = AgentMachine.TestCase
