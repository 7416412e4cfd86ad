"""How long work may take: learned from the attempt's own, never below the floors, and stamped for the agent."""

from __future__ import annotations

from pathlib import Path

import pytest

from starcoder_trainer.contract.config import HangConfig
from starcoder_trainer.contract.stamp import Stamp, StampFile, read_stamp, stamp_path
from starcoder_trainer.pace import LEARNT, TIMES, Limits, Pace

FLOORS = HangConfig(iteration=10.0, first_iteration=100.0, checkpoint=50.0)


def learned(*seconds: float) -> Limits:
    limits = Limits(FLOORS)
    limits.took("first", 90.0)
    for each in seconds:
        limits.took("iteration", each)
    return limits


def test_nothing_learned_allows_the_first_iteration_its_floor() -> None:
    assert Limits(FLOORS).allowed("first") == 100.0


def test_the_iterations_after_the_first_are_given_as_long_until_some_are_known() -> None:
    assert learned(*[1.0] * (LEARNT - 2)).allowed("iteration") == 100.0
    assert learned(*[1.0] * (LEARNT - 1)).allowed("iteration") == 10.0


def test_fast_iterations_are_held_to_the_floor_and_slow_ones_to_a_multiple_of_their_own() -> None:
    assert learned(*[0.1] * 20).allowed("iteration") == 10.0
    assert learned(*[30.0] * 20).allowed("iteration") == TIMES * 30.0


def test_one_slow_iteration_among_many_does_not_raise_the_limit() -> None:
    assert learned(*[2.0] * 99, 80.0).allowed("iteration") == TIMES * 2.0


def test_what_the_first_iteration_took_is_no_measure_of_the_others() -> None:
    assert learned(*[2.0] * 5).allowed("iteration") == TIMES * 2.0


def test_a_checkpoint_has_a_floor_of_its_own_and_learns_from_checkpoints() -> None:
    limits = learned(*[1.0] * 20)
    assert limits.allowed("checkpoint") == 50.0
    limits.took("checkpoint", 40.0)
    assert limits.allowed("checkpoint") == TIMES * 40.0
    assert limits.allowed("iteration") == 10.0


def test_iterations_that_are_slower_than_the_checkpoints_floor_are_allowed_with_one_too() -> None:
    assert learned(*[30.0] * 20).allowed("checkpoint") == TIMES * 30.0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_stamp_says_phase_iteration_and_what_the_interval_may_take() -> None:
    stamps: list[Stamp] = []
    clock = Clock()
    pace = Pace(3, FLOORS, stamps.append, clock)
    pace.enter("form")
    pace.formed(20)
    pace.enter("load")
    for iteration in range(21, 25):
        pace.enter("data")
        pace.enter("forward_backward")
        clock.now += 2.0
        pace.done(iteration)
    pace.enter("checkpoint")
    pace.enter("data")
    assert stamps[0] == Stamp(3, 0, 0, "form", 100.0)
    assert stamps[1] == Stamp(3, 1, 20, "load", 100.0)
    assert stamps[2] == Stamp(3, 1, 20, "data", 100.0), "the first iteration is one interval with what comes before it"
    assert stamps[-3] == Stamp(3, 4, 23, "forward_backward", TIMES * 2.0)
    assert stamps[-2] == Stamp(3, 5, 24, "checkpoint", 50.0)
    assert stamps[-1] == Stamp(3, 5, 24, "data", 50.0), "the iteration after a checkpoint waits for the slowest writer"


def test_a_stamp_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "stamps"
    file = StampFile(folder, 3)
    for stamp in (Stamp(1, 0, 0, "form", 900.0), Stamp(2, 7, 41, "forward_backward", 16.5)):
        file.write(stamp)
        assert read_stamp(folder, 3) == stamp
    assert read_stamp(folder, 4) is None


def test_a_half_written_stamp_is_none(tmp_path: Path) -> None:
    StampFile(tmp_path, 0).write(Stamp(1, 2, 3, "data", 4.0))
    path = stamp_path(tmp_path, 0)
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :])
        assert read_stamp(tmp_path, 0) is None, f"byte {i} was changed"
    path.write_bytes(whole[:20])
    assert read_stamp(tmp_path, 0) is None


@pytest.mark.parametrize("phase", ["first", "x" * 40])
def test_a_phase_of_any_length_is_no_error(tmp_path: Path, phase: str) -> None:
    StampFile(tmp_path, 0).write(Stamp(1, 2, 3, phase, 4.0))
    assert read_stamp(tmp_path, 0) == Stamp(1, 2, 3, phase[:24], 4.0)
