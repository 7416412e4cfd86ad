"""Ten thousand schedules of faults, and not one in which something does not hold that must."""

import os

import pytest

from tests.support.simulation.faults import NodeDies, OperatorIsCut, Schedule, StoreCallFails, WatchMisbehaves
from tests.support.simulation.search import find_in_processes
from tests.support.simulation.world import Simulation

SCHEDULES = int(os.environ.get("SCHEDULES", "10000"))
PROCESSES = 2


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_whatever_fails_in_whatever_order_nothing_is_violated_and_the_run_ends_well():
    story, rate = find_in_processes(SCHEDULES, 1, PROCESSES)
    assert story is None, story
    print(f"{SCHEDULES} schedules, {rate:.0f} a second")


def test_a_schedule_comes_out_the_same_each_time():
    schedule = Schedule(
        ((3.0, NodeDies(0)), (0.0, OperatorIsCut(5, after=True)), (0.5, StoreCallFails("delayed", 1)),
         (1.0, WatchMisbehaves("Pod", "lost", 3))),
        jitter=7, operators=2,
    )  # fmt: skip
    stories = [Simulation(schedule).run().story for _ in range(3)]
    assert stories[0] == stories[1] == stories[2]


def test_an_undisturbed_run_takes_one_attempt():
    sim = Simulation(Schedule()).run()
    assert sim.status["attempt"] == 1
    assert sim.status["restarts"]["total"] == 0
    assert sim.status["checkpoint"]["iteration"] == sim.iterations
