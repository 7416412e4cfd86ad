"""Whatever reports say and the clock does, and whoever looks when: each second of a run is in exactly one bucket."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from starcoder_operator.api.v1alpha1.goodput import Goodput
from starcoder_operator.domain.planner import plan
from starcoder_operator.domain.timestamps import at_millisecond, milliseconds
from starcoder_trainer.contract.report import Spent
from tests.support import runs
from tests.support.simulated_cluster import EPOCH, Conflict, Cut, SimulatedCluster

SECONDS = st.floats(0, 1e6, allow_nan=False) | st.sampled_from([0.0, 0.001, 1.0, 59.9994])
SPENT = st.builds(Spent, *[SECONDS] * 5, first_iteration=st.none() | SECONDS) | st.none()

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("passes"), st.integers(0, 900_000)),
        st.tuples(st.just("cut"), st.integers(0, 4)),
        st.tuples(st.just("away"), st.integers(1, 40)),
        st.tuples(st.just("clock"), st.integers(-600_000, 600_000)),
        st.tuples(st.just("crash"), st.integers(0, 1)),
        st.tuples(st.just("node"), st.integers(0, 2)),
        st.tuples(st.just("suspend"), st.booleans()),
        st.tuples(st.just("says"), st.tuples(st.integers(0, 1), SPENT, st.integers(0, 200))),
        st.tuples(st.just("forgets"), st.none()),
    ),
    max_size=60,
)


class Life:
    """A run whose operator has a clock of its own."""

    def __init__(self) -> None:
        spec = runs.run(
            workers__replicas=2,
            training__globalBatchSize=16,
            training__iterations=200,
            elasticity={"minReplicas": 1, "spares": 1, "patience": "5s", "growBack": {"interval": "10s"}},
        ).spec
        self.cluster = SimulatedCluster(spec, nodes=3)
        self.skew = 0
        """Milliseconds that the operator's clock is ahead."""
        self.latest = milliseconds(EPOCH)
        """That this clock ever showed to a pass that was written."""

    def passes(self, cut: int | None = None) -> None:
        seen = self.cluster.snapshot()
        clock = milliseconds(seen.instant) + self.skew
        snapshot, before = replace(seen, instant=at_millisecond(clock)), self.cluster.status.goodput
        with contextlib.suppress(Conflict, Cut):
            self.cluster.act(snapshot, plan(snapshot), cut)
        after = self.cluster.status.goodput
        if after is not None:
            self.latest = max(self.latest, clock)
            self.holds(before, after)

    def holds(self, before: Goodput | None, after: Goodput) -> None:
        buckets = {name: round(1000 * s) for name, s in after.buckets.to_dict().items()}
        assert sum(buckets.values()) == milliseconds(after.as_of) - milliseconds(after.since)
        assert all(s >= 0 for s in buckets.values())
        assert milliseconds(after.as_of) <= self.latest
        if before is not None and before.since == after.since:
            assert all(buckets[name] >= round(1000 * s) for name, s in before.buckets.to_dict().items())
            assert after.reached >= before.reached
        for record in self.cluster.status.recoveries:
            assert all(s >= 0 for s in record.seconds.to_dict().values())
            assert milliseconds(record.at) <= self.latest
        assert all(r.stage is None for r in self.cluster.status.recoveries[:-1])

    def does(self, what: str, how: Any) -> None:
        cluster = self.cluster
        match what:
            case "passes":
                self.passes()
                cluster.settle_cluster()
                cluster.world.now += how / 1000
            case "cut":
                self.passes(how)
            case "away":
                for _ in range(how):
                    cluster.settle_cluster()
                    cluster.world.now += 1
            case "clock":
                self.skew += how
            case "crash":
                agents = [p.agent for p in cluster.pods.values() if p.view.member == how and p.agent is not None]
                if agents:
                    agents[-1].crash()
                    cluster.settle_cluster()
            case "node":
                name = f"node-{how}"
                if name in cluster.down:
                    cluster.node_returns(name)
                elif not cluster.down:
                    cluster.node_dies(name)
                    cluster.node_is_unknown(name)
            case "suspend":
                if cluster.spec.suspend != how:
                    cluster.change_spec(suspend=how)
            case "says":
                member, spent, iteration = how
                lease = cluster.leases.get(member)
                if lease is not None and lease.report is not None and lease.report.progress is not None:
                    progress = replace(lease.report.progress, spent=spent, iteration=iteration)
                    lease.report = replace(lease.report, progress=progress)
            case "forgets":
                cluster.status = cluster.status.model_copy(update={"goodput": None, "recoveries": ()})


@settings(max_examples=300, deadline=None)
@given(steps=STEPS)
def test_buckets_add_up_to_the_time_that_they_are_of(steps: list[tuple[str, Any]]) -> None:
    life = Life()
    for what, how in steps:
        life.does(what, how)
    life.passes()


@settings(max_examples=100, deadline=None)
@given(steps=STEPS.map(lambda steps: [s for s in steps if s[0] not in ("clock", "forgets", "suspend")]))
def test_a_run_that_came_to_its_end_has_all_its_life_in_buckets(steps: list[tuple[str, Any]]) -> None:
    life = Life()
    for what, how in steps:
        life.does(what, how)
    for name in sorted(life.cluster.down):
        life.cluster.node_returns(name)
    for _ in range(300):
        if life.cluster.status.state in ("Succeeded", "Failed"):
            break
        life.does("passes", 1000)
    status = life.cluster.status
    assert status.completed_at is not None, status.message
    assert status.goodput is not None
    assert milliseconds(status.goodput.since) == milliseconds(EPOCH)
    assert abs(milliseconds(status.goodput.as_of) - milliseconds(status.completed_at)) < 1000
    assert status.goodput.bucket is None
    assert sum(status.goodput.buckets.to_dict().values()) > 0
