"""Thousands of schedules of faults, and not one in which something does not hold that must."""

import os

import pytest
from hypothesis import strategies as st

from tests.support.simulation.faults import (
    DELAYS,
    KINDS,
    ApiServerIsDown,
    CallFails,
    NodeDies,
    OperatorDies,
    OperatorIsCut,
    OperatorStandsStill,
    Schedule,
    StoreCallFails,
    StoreIsDown,
    WallClockJumps,
    WatchMisbehaves,
)
from tests.support.simulation.network import API_FAULTS, STORE_FAULTS
from tests.support.simulation.search import find_in_processes, find_violation
from tests.support.simulation.world import Simulation, Violation

SCHEDULES = int(os.environ.get("SCHEDULES", "10000"))
PROCESSES = 2

_calls = st.integers(0, 20)
HOW = ["lost", "doubled", "late", "broken"]
_seconds = st.sampled_from([1.0, 5.0, 20.0, 40.0])
OF_CONTROL_PLANE_AND_STORAGE = st.builds(
    Schedule,
    steps=st.lists(
        st.tuples(
            DELAYS,
            st.one_of(
                st.just(OperatorDies()),
                st.builds(OperatorIsCut, st.integers(1, 40), st.booleans()),
                st.builds(OperatorStandsStill, _seconds),
                st.builds(CallFails, st.sampled_from(["operator", "agent"]), st.sampled_from(API_FAULTS), _calls),
                st.builds(ApiServerIsDown, _seconds),
                st.builds(WatchMisbehaves, st.sampled_from(sorted(KINDS)), st.sampled_from(HOW), st.integers(1, 10)),
                st.builds(StoreCallFails, st.sampled_from(STORE_FAULTS), _calls),
                st.builds(StoreIsDown, _seconds),
                st.builds(WallClockJumps, st.sampled_from([-3600, 3600])),
            ),
        ),
        max_size=6,
    ).map(tuple),
    members=st.integers(1, 3),
    operators=st.sampled_from([1, 2]),
    jitter=st.one_of(st.just(0), st.integers(0, 1000)),
)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_whatever_fails_in_whatever_order_nothing_is_violated_and_the_run_ends_well():
    story, rate = find_in_processes(SCHEDULES, 1, PROCESSES)
    assert story is None, story
    print(f"{SCHEDULES} schedules, {rate:.0f} a second")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_faults_of_control_plane_and_storage_alone_end_no_attempt():
    """Training goes on while nobody looks, and whoever looks again judges nothing by the time in which he did not."""

    def trained_in_one_attempt(sim: Simulation) -> None:
        restarts = sim.status["restarts"]
        if (sim.status["attempt"], restarts["total"]) != (1, 0):
            raise Violation(f"{sim.status['attempt']} attempts, restarts {restarts}\n{sim.told}")

    story = find_violation(500, 1, among=OF_CONTROL_PLANE_AND_STORAGE, check=trained_in_one_attempt)
    assert story is None, story


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
