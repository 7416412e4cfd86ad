"""When no progress is a hang, and who is to blame."""

from __future__ import annotations

import pytest

from starcoder_trainer.agent.stall import MOST_COUNTED, Overdue, Watch, account, explain
from starcoder_trainer.contract.config import HangConfig
from starcoder_trainer.contract.report import Failure
from starcoder_trainer.contract.stamp import Stamp
from starcoder_trainer.contract.worker import Collective, Sight

FLOORS = HangConfig(iteration=10.0, first_iteration=100.0, checkpoint=50.0)
HERE = "stacks are there"


class Looks:
    """A watch over ranks 0 and 1 of attempt 2, looked at each second."""

    def __init__(self) -> None:
        self.now = 0.0
        self.watch = Watch(2, (0, 1), FLOORS, self.now)
        self.stamps: dict[int, Stamp] = {}
        self.answers = True

    def stamped(self, rank: int, interval: int, phase: str = "forward_backward", allowed: float = 10.0) -> None:
        self.stamps[rank] = Stamp(2, interval, 40 + interval, phase, allowed)

    def both(self, interval: int, **more: object) -> None:
        for rank in (0, 1):
            self.stamped(rank, interval, **more)  # type: ignore[arg-type]

    def looks(self, seconds: float, ended: tuple[int, ...] = ()) -> Overdue | None:
        """What the first look says that says anything, else the last one's silence."""
        stop = self.now + seconds
        while self.now < stop:
            self.now += 1.0
            if found := self.watch.look(self.now, self.stamps, self.answers, ended):
                return found
        return None


def test_progress_is_no_hang_however_long_it_goes_on() -> None:
    looks = Looks()
    for interval in range(50):
        looks.both(interval)
        assert looks.looks(9) is None


def test_an_interval_that_takes_longer_than_its_stamp_allows_is_a_hang() -> None:
    looks = Looks()
    looks.both(5)
    assert looks.looks(11) is None
    found = looks.looks(1)
    assert found is not None
    assert (found.attempt, found.allowed, found.silent) == (2, 10.0, False)
    assert found.seconds > 10.0


def test_phases_alone_are_no_progress() -> None:
    looks = Looks()
    looks.both(5, phase="data")
    assert looks.looks(8) is None
    looks.both(5, phase="forward_backward")
    assert looks.looks(5) is not None


def test_a_checkpoint_that_began_is_allowed_its_own_time() -> None:
    looks = Looks()
    looks.both(5)
    assert looks.looks(8) is None
    looks.both(5, phase="checkpoint", allowed=50.0)
    assert looks.looks(41) is None
    assert looks.looks(5) is not None


def test_one_rank_that_stands_still_is_enough() -> None:
    looks = Looks()
    looks.stamped(1, 5)
    for interval in range(12):
        looks.stamped(0, interval)
        found = looks.looks(1)
    assert found is not None


def test_a_rank_that_ended_well_is_watched_no_more() -> None:
    looks = Looks()
    looks.both(5, phase="leave")
    assert looks.looks(60, ended=(0, 1)) is None
    assert looks.looks(60, ended=(0,)) is not None


def test_stamps_of_another_attempt_say_nothing() -> None:
    looks = Looks()
    looks.stamps = {rank: Stamp(1, 99, 0, "forward_backward", 10.0) for rank in (0, 1)}
    assert looks.looks(100) is None, "left by attempt 1, and no worker of attempt 2 has begun"
    assert looks.looks(2) is not None, "workers that never begin are a hang after the first iteration's floor"


def test_a_new_attempt_has_a_clean_slate() -> None:
    looks = Looks()
    looks.both(5)
    assert looks.looks(9) is None
    looks.watch = Watch(3, (0, 1), FLOORS, looks.now)
    assert looks.looks(60) is None


def test_time_in_which_nobody_looked_is_not_held_against_the_workers() -> None:
    looks = Looks()
    looks.both(5)
    assert looks.looks(5) is None
    looks.now += 3600.0  # the machine was paused, and its clock went on
    assert looks.looks(10.0 - 5.0 - MOST_COUNTED) is None
    assert looks.looks(5) is not None


def test_after_a_pause_workers_that_go_on_are_left_alone() -> None:
    looks = Looks()
    for interval in range(20):
        looks.both(interval)
        looks.now += 600.0
        assert looks.looks(5) is None


def test_a_fork_server_that_does_not_answer_is_a_hang_though_its_workers_train() -> None:
    looks = Looks()
    looks.answers = False
    found = None
    for interval in range(12):
        looks.both(interval)
        found = found or looks.looks(1)
    assert found is not None
    assert found.silent


def test_one_answer_is_enough_to_be_alive() -> None:
    looks = Looks()
    for interval in range(40):
        looks.both(interval)
        looks.answers = interval % 9 == 0
        assert looks.looks(1) is None


# Who it was

OVERDUE = Overdue(2, 61.0, 60.0)
WAITS = Collective(2, 0, True, "waits since 60 s in gloo:all_reduce number 4 of group default_pg, sizes [[4]]")


def stamp(phase: str = "forward_backward", iteration: int = 12) -> Stamp:
    return Stamp(2, iteration, iteration, phase, 60.0)


def sight(rank: int, state: str = "S", *, under_way: bool | None = None, waits_in: str = "") -> Sight:
    collective = (
        None if under_way is None else Collective(2, rank, under_way, WAITS.what if under_way else "is in none")
    )
    return Sight(rank, 100 + rank, state, waits_in, "stacks", collective)


def blamed(stamps: dict[int, Stamp], *sights: Sight) -> Failure:
    return explain(OVERDUE, stamps, sights, HERE)


def test_a_stopped_process_is_to_blame_whatever_the_others_do() -> None:
    found = blamed({0: stamp("data"), 1: stamp(), 2: stamp()}, sight(0), sight(1, "T"), sight(2, under_way=True))
    assert (found.cause, found.rank, found.suspicion[0]) == ("Hang", 1, 0)
    assert "stopped by a signal (process state T)" in found.message
    assert "no progress for 61 s where 60 s are allowed" in found.message
    assert found.message.endswith(HERE)


@pytest.mark.parametrize("phase", ["data", "load", "open"])
def test_a_rank_that_reads_is_a_stall_of_data_not_a_hang(phase: str) -> None:
    found = blamed({0: stamp(), 1: stamp(phase)}, sight(0, under_way=True), sight(1))
    assert (found.cause, found.rank, found.iteration) == ("DataStall", 1, 12)
    assert f"in phase {phase} after iteration 12" in found.message


def test_a_stopped_rank_is_a_hang_also_in_the_middle_of_reading() -> None:
    assert blamed({0: stamp("data")}, sight(0, "T")).cause == "Hang"


def test_a_rank_that_waits_for_a_device_comes_before_one_that_computes() -> None:
    found = blamed({0: stamp(), 1: stamp()}, sight(0, "R", under_way=False), sight(1, "D", waits_in="nvidia_ioctl"))
    assert found.rank == 1
    assert "process state D in nvidia_ioctl" in found.message


def test_a_rank_outside_of_collectives_keeps_those_inside_waiting() -> None:
    found = blamed({0: stamp(), 1: stamp()}, sight(0, under_way=True), sight(1, "R", under_way=False))
    assert (found.cause, found.rank) == ("Hang", 1)
    assert "is in none" in found.message


def test_of_ranks_that_all_wait_the_one_that_has_come_least_far_is_named() -> None:
    found = blamed({0: stamp("optimizer"), 1: stamp()}, sight(0, under_way=True), sight(1, under_way=True))
    assert found.rank == 1
    assert WAITS.what in found.message


def test_a_rank_that_ended_meanwhile_is_not_to_blame() -> None:
    assert blamed({0: stamp(), 1: stamp("optimizer")}, sight(1, under_way=True)).rank in (0, 1)
    assert blamed({0: stamp(), 1: stamp()}, sight(1, under_way=False)).rank == 1


def test_a_container_that_does_not_answer_is_to_blame_itself() -> None:
    found = explain(Overdue(2, 61.0, 60.0, silent=True), {0: stamp()}, None, HERE)
    assert (found.cause, found.suspicion) == ("Hang", (0,))
    assert "did not answer for 61 s" in found.message


def test_who_is_surely_to_blame_is_found_among_members_by_comparing() -> None:
    stopped = blamed({0: stamp()}, sight(0, "T"))
    outside = blamed({0: stamp()}, sight(0, "R", under_way=False))
    behind = blamed({0: stamp(iteration=11)}, sight(0, under_way=True))
    waiting = blamed({0: stamp()}, sight(0, under_way=True))
    assert stopped.suspicion < outside.suspicion < behind.suspicion < waiting.suspicion


def test_the_account_has_what_each_rank_said_and_who_said_nothing() -> None:
    text = account(OVERDUE, {0: stamp(), 1: stamp()}, (sight(0, under_way=True), Sight(1, 101, "T")))
    assert "rank 0, process 100: it is in phase forward_backward" in text
    assert "\nstacks\n" in text
    assert "rank 1, process 101" in text
    assert "it did not answer the signal" in text
