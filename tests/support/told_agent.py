"""A machine that is told things in the words of tests, as the agent of one of two members with two ranks each."""

from starcoder_trainer.agent import machine
from starcoder_trainer.agent import messages as m
from starcoder_trainer.contract.assignment import Assignment, CheckpointRef, Layout, Member, Offer
from starcoder_trainer.contract.report import Failure, Verified
from starcoder_trainer.contract.worker import Exited, Saved, Started
from tests.support.training import training_config

CONFIG = training_config(iterations=20).to_dict()
OFFER = Offer("10.0.0.1", 4000, CheckpointRef(1, 10, "sha256:aa"))
RANKS = {0: (0, 1), 1: (2, 3)}


def verified(step):
    return Verified(CheckpointRef(1, step, "sha256:aa"), "s3://b/x", "2026-01-01T00:00:00Z", 9)


class Agent:
    """A machine of member `place`, told things in the words of the tests; `did` is what it asked for last."""

    def __init__(self, place=0, grace=300.0):
        self.place = place
        self.boot = f"boot-{place}"
        me = m.Identity("uid-1", self.boot, f"demo-w{place}-0", 0, "n1", "10.0.0.9", "/scratch", grace, "/run/stamps")
        self.machine = machine.Machine(me, now=0)
        self.now = 0.0
        self.did: tuple[m.Action, ...] = ()

    def tell(self, kind, *args, **more):
        self.did = self.machine.handle(kind(self.now, *args, **more))
        return self

    def assigned(self, attempt, phase, listed=True, run_uid="uid-1"):
        members = tuple(Member(i, f"boot-{i}" if listed else "other") for i in range(2))
        offer = OFFER if phase == "run" else None
        assignment = Assignment(run_uid, attempt, phase, members, 2, Layout(2, 1, 2), offer)
        return self.tell(m.Assigned, assignment, CONFIG)

    def ready(self):
        return self.tell(m.WorkersReady)

    def running(self, attempt):
        self.ready().assigned(attempt, "hold").assigned(attempt, "run")
        return self

    def training(self, attempt):
        self.running(attempt)
        for rank in RANKS[self.place]:
            self.tell(m.WorkerStarted, Started(attempt, rank, 10))
        return self

    def exited(self, attempt, rank, code=0, cause=None, left_at=None):
        failure = Failure(cause, f"{cause}!", code, rank) if cause else None
        return self.tell(m.WorkerExited, Exited(attempt, rank, code, failure, left_at))

    def left(self, attempt, step):
        """Its workers save that iteration and end, since one of the gang was asked to leave."""
        self.saved(attempt, step)
        for rank in RANKS[self.place]:
            self.exited(attempt, rank, left_at=step)
        return self

    def saved(self, attempt, step):
        for rank in RANKS[self.place]:
            self.tell(m.WorkerSaved, Saved(attempt, rank, step, f"/scratch/{rank}", 0.1, 8))
        return self

    @property
    def said(self):
        return self.machine.report


def kinds(actions):
    return [type(a) for a in actions]
