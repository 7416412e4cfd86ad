"""Members that are slower than checkpoints come still upload some of them all."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from starcoder_trainer.agent.backlog import Backlog, Waiting
from starcoder_trainer.agent.messages import Upload
from starcoder_trainer.contract.worker import Saved
from tests.support.checkpoints import MemoryStore

STORE = MemoryStore()


def waiting(step: int, *, attempt: int = 1, last: bool = False) -> Waiting:
    return Waiting(Upload(attempt, step, 1, (Saved(attempt, 0, step, "/x", 0.1, 1, last),)), STORE)


def uploaded(intervals: float, saves: int, every: int, rng: random.Random) -> set[int]:
    """Checkpoints, counted from 1, that a member uploads, each in so many intervals or a fifth more or less."""
    backlog, busy, free, done = Backlog(), False, 0.0, set[int]()
    for number in range(1, saves + 1):
        while busy and free <= number:
            busy = bool(backlog)
            if busy:
                done.add(backlog.take()[0].job.step // every)
                free += intervals * rng.uniform(0.8, 1.2)
        backlog.add(waiting(number * every))
        if not busy:
            busy, free = True, number + intervals * rng.uniform(0.8, 1.2)
            done.add(backlog.take()[0].job.step // every)
    return done


@pytest.mark.parametrize("every", [1, 40, 1000])
@pytest.mark.parametrize(("fastest", "slowest"), [(0.2, 0.8), (0.5, 1.5), (2.2, 3.3), (1.0, 6.5)])
def test_members_of_different_speed_upload_some_steps_alike(fastest: float, slowest: float, every: int) -> None:
    rng, saves = random.Random(f"{fastest} {every}"), 400
    speeds = [fastest, slowest, *(rng.uniform(fastest, slowest) for _ in range(30))]
    common = set.intersection(*(uploaded(speed, saves, every, rng) for speed in speeds))
    steps = sorted({0, *common, saves})
    gap = max(after - before for before, after in itertools.pairwise(steps))
    assert gap <= 2 * 2 ** max(0, math.ceil(math.log2(1.2 * slowest)))


def test_the_last_step_gives_way_to_none_and_is_uploaded_first() -> None:
    backlog = Backlog()
    for step in (32, 64):
        assert backlog.add(waiting(step)) == ()
    assert backlog.add(waiting(65, last=True)) == (waiting(32),)
    assert backlog.take() == (waiting(65, last=True), (waiting(64),)), "older ones are of no use beside it"
    assert not backlog


def test_a_later_attempt_comes_first() -> None:
    backlog = Backlog()
    for one in (waiting(64), waiting(65, attempt=2), waiting(66, attempt=2)):
        given_up = backlog.add(one)
    assert given_up == (waiting(64),)
    assert backlog.take() == (waiting(66, attempt=2), (waiting(65, attempt=2),))
