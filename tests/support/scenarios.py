"""Scenarios for the planner in the words of a test: `make_run().workers(3).training().node_dies("node-1")`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

from starcoder_operator.api.v1alpha1 import Condition, StarCoderRunStatus
from starcoder_operator.api.v1alpha1.goodput import Goodput
from starcoder_operator.api.v1alpha1.status import ConditionType
from starcoder_operator.domain.elasticity import pool_size
from starcoder_operator.domain.hearing import USUAL
from starcoder_operator.domain.plan import Plan
from starcoder_operator.domain.planner import plan
from starcoder_operator.domain.snapshot import Snapshot
from starcoder_trainer.contract.report import Problem
from tests.support import runs
from tests.support.simulated_cluster import SimulatedCluster

ROUNDS = 400
"""After so many nothing will change any more."""


def make_run(name: str = "a") -> Scenario:
    return Scenario(name)


class Scenario:
    """A run in a simulated cluster. Steps that describe the run come first, then what happens to it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changes: dict[str, Any] = {"checkpoint__everyIterations": 10}
        self._nodes: int | None = None
        self._cluster: SimulatedCluster | None = None
        self.last: Plan | None = None

    # The run

    def workers(self, replicas: int) -> Self:
        return self.with_spec(workers__replicas=replicas, training__globalBatchSize=8 * replicas)

    def at_least(self, replicas: int, **elasticity: Any) -> Self:
        """Trains with so few when the others find no place; `patience="30s"` and the like beside it."""
        return self.with_spec(
            elasticity__minReplicas=replicas, **{f"elasticity__{key}": value for key, value in elasticity.items()}
        )

    def spares(self, count: int) -> Self:
        return self.with_spec(elasticity__spares=count)

    def with_spec(self, **changes: Any) -> Self:
        self._changes |= changes
        return self

    def on_nodes(self, count: int) -> Self:
        self._nodes = count
        return self

    def without_relay(self) -> Self:
        """Every agent renews its own Lease, as those of older images do."""
        self.cluster.relaying = False
        return self

    @property
    def cluster(self) -> SimulatedCluster:
        if self._cluster is None:
            spec = runs.run(**self._changes).spec
            nodes = pool_size(spec) if self._nodes is None else self._nodes
            self._cluster = SimulatedCluster(spec, name=self._name, nodes=nodes)
            if nodes == 0:
                self._cluster.nodes = {}
        return self._cluster

    # Time

    def passes(self) -> Self:
        """The operator looks once and does what it decides."""
        snapshot = self.cluster.snapshot()
        self.last = plan(snapshot)
        self.cluster.act(snapshot, self.last)
        return self

    def round(self, seconds: float = 1.0) -> Self:
        """Operator, scheduler, kubelets and agents, each once."""
        self.passes()
        self.cluster.settle_cluster()
        self.cluster.world.now += seconds
        return self

    def until(self, met: Callable[[StarCoderRunStatus], bool]) -> Self:
        for _ in range(ROUNDS):
            if met(self.status):
                return self
            self.round()
        raise AssertionError(f"never met; the run is {self.status.state}: {self.status.reason}: {self.status.message}")

    def training(self) -> Self:
        return self.until(lambda s: s.state == "Running")

    def until_quiet(self, rounds: int = 60) -> Self:
        for _ in range(rounds):
            self.round()
        return self

    def over(self) -> Self:
        return self.until(lambda s: s.state in ("Succeeded", "Failed"))

    # What happens

    def node_dies(self, node: str, noticed: bool = True) -> Self:
        self.cluster.node_dies(node)
        if noticed:
            # By the time that a node is Unknown its agents have missed some beats. Collectives only hang: nobody resets
            # their connections.
            self.beats(USUAL.heard)
            self.cluster.node_is_unknown(node)
        return self

    def node_returns(self, node: str) -> Self:
        self.cluster.node_returns(node)
        return self

    def worker_fails(
        self, member: int, cause: str = "Crash", message: str = "worker raised", fingerprint: str = ""
    ) -> Self:
        agent = self.pod(member).agent
        assert agent is not None
        assert agent.crash(cause, message, fingerprint)  # type: ignore[arg-type]
        self.cluster.settle_cluster()
        return self

    def stands_still(
        self, member: int, cause: str, message: str, suspicion: tuple[int, ...] = (), fingerprint: str = ""
    ) -> Self:
        """This member's agent says so; those that hang with it have not noticed yet that its workers went."""
        agent = self.pod(member).agent
        assert agent is not None
        assert agent.crash(cause, message, fingerprint, suspicion)  # type: ignore[arg-type]
        self.cluster.leases[member].report = agent.report
        return self

    def failed(self, node: str) -> Self:
        """The node is lost and the run has gone on from it."""
        return self.node_dies(node).passes()

    def device_breaks(self, node: str, *faults: str) -> Self:
        """Conditions of the node that say so; none: it is well again."""
        self.cluster.nodes[node] = replace(self.cluster.nodes[node], faults=faults)
        return self

    def cordoned(self, node: str) -> Self:
        self.cluster.nodes[node] = replace(self.cluster.nodes[node], unschedulable=True)
        return self

    def evicted(self, member: int, why: str = "EvictionByEvictionAPI") -> Self:
        """As `kubectl drain` and the scheduler's preemption do it."""
        self.cluster.delete_pod(self.pod(member).view.name, disruption=why)
        return self

    def deleted(self, member: int, grace: float | None = None) -> Self:
        self.cluster.delete_pod(self.pod(member).view.name, grace)
        return self

    def holds_up(self, member: int, what: str) -> Self:
        """`workers` of that member come to the end of no iteration; its `upload` never ends."""
        self.pod(member).agent.holds_up.add(what)
        return self

    def hindered(self, reason: str, message: str = "no such thing; mend it") -> Self:
        self.cluster.world.store.problem = Problem(reason, message)  # type: ignore[arg-type]
        return self

    def without_storage(self, *nodes: str) -> Self:
        """These nodes don't reach S3."""
        self.cluster.world.store.away_from = {*nodes}
        return self

    def mended(self) -> Self:
        self.cluster.world.store.problem = None
        return self

    def suspended(self, suspend: bool = True) -> Self:
        self.cluster.change_spec(suspend=suspend)
        return self

    def silent(self) -> Self:
        """Agents reach the API server no more; workers train on."""
        self.cluster.api_reaches_agents = False
        return self

    def refused(self, what: str, message: str) -> Self:
        """The API server refuses `create pod` and the like in these words."""
        self.cluster.refusing = {what: message}
        return self

    def waits(self, seconds: float) -> Self:
        self.cluster.world.now += seconds
        return self

    def operator_away(self, seconds: int) -> Self:
        """All others go on."""
        for _ in range(seconds):
            self.cluster.settle_cluster()
            self.cluster.world.now += 1
        return self

    def beats(self, seconds: float) -> Self:
        """Agents beat; nothing else happens."""
        for _ in range(round(seconds)):
            self.cluster.world.now += 1
            self.cluster.beat()
        return self

    # What is so

    def pod(self, member: int) -> Any:
        pods = [p for p in self.cluster.pods.values() if p.view.member == member]
        return max(pods, key=lambda p: p.view.incarnation)

    @property
    def snapshot(self) -> Snapshot:
        return self.cluster.snapshot()

    @property
    def status(self) -> StarCoderRunStatus:
        return self.cluster.status

    def condition(self, type: ConditionType) -> Condition:
        found = self.status.condition(type)
        assert found is not None, f"no condition {type}"
        return found

    @property
    def at_work(self) -> list[int]:
        """Members of the assignment, in rank order."""
        assert self.cluster.assignment is not None
        return [place.index for place in self.cluster.assignment.assignment.members]

    def said(self, type: ConditionType) -> tuple[str, str]:
        found = self.condition(type)
        return found.status, found.reason

    @property
    def goodput(self) -> Goodput:
        assert self.status.goodput is not None
        return self.status.goodput

    @property
    def seconds(self) -> dict[str, float]:
        """By bucket; those that are empty are left out."""
        return {name: seconds for name, seconds in self.goodput.buckets.to_dict().items() if seconds}

    @property
    def pods(self) -> list[str]:
        return sorted(self.cluster.pods)

    @property
    def phase(self) -> str:
        assert self.cluster.assignment is not None
        return self.cluster.assignment.assignment.phase

    @property
    def told(self) -> list[tuple[str, str]]:
        """(kind, reason) of all Events so far."""
        return [(e.kind, e.reason) for e in self.cluster.events]
