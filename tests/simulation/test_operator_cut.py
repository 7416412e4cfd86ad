"""An operator that is killed before or after any of its writes: the next one brings the run to the same end.

What it reads it forgets with its end, so a cut at a read is one after the write before it.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from tests.support.simulation.faults import (
    NodeDies,
    NodeReturns,
    OperatorIsCut,
    PodIsDeleted,
    RunIsDeleted,
    Schedule,
    TimePasses,
    UserSuspends,
)
from tests.support.simulation.world import Simulation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SCRIPTS = {
    "start": Schedule(),
    "start-without-gangs": Schedule(gang="None"),
    "node-lost": Schedule(((4.0, NodeDies(0)), (20.0, TimePasses()))),
    "node-lost-beside-a-spare": Schedule(((4.0, NodeDies(0)), (20.0, TimePasses())), spares=1),
    "pod-deleted": Schedule(((4.0, PodIsDeleted(1)),)),
    "suspended-and-resumed": Schedule(((4.0, UserSuspends(True)), (9.0, UserSuspends(False)))),
    "shrunk-and-grown": Schedule(
        ((4.0, NodeDies(0)), (12.0, NodeReturns(0)), (20.0, TimePasses())), free_nodes=0, shrinks=True
    ),
    "deleted": Schedule(((4.0, RunIsDeleted()),)),
}


@functools.cache
def uncut(name: str) -> Simulation:
    return Simulation(SCRIPTS[name]).run()


def writes(name: str) -> list[int]:
    """Numbers of the operator's writes in a script that nobody cuts."""
    calls = uncut(name).calls
    return [number for number, what in enumerate(calls, 1) if not what.startswith(("get", "list"))]


@pytest.mark.parametrize("name", SCRIPTS)
def test_wherever_the_operator_is_cut_the_run_comes_to_the_same_end(name):
    script, end = SCRIPTS[name], uncut(name).end
    cuts = [(number, after) for number in writes(name) for after in (False, True)]
    assert len(cuts) >= 30
    for number, after in cuts:
        sim = Simulation(replace(script, steps=((0.0, OperatorIsCut(number, after)), *script.steps))).run()
        assert sim.end == end, sim.told
