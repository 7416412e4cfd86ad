"""What a schedule may order, each a value that says what it does: Hypothesis draws, shrinks and prints them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from hypothesis import strategies as st

from starcoder_operator.adapters.kinds import CONFIG_MAPS, LEASES, NODES, POD_GROUPS, PODS, RUNS, Kind

from .network import API_FAULTS, STORE_FAULTS, ApiFault, StoreFault

if TYPE_CHECKING:
    from .world import Simulation

KINDS: dict[str, Kind] = {k.kind: k for k in (RUNS, PODS, LEASES, CONFIG_MAPS, POD_GROUPS, NODES)}
KindName = Literal["StarCoderRun", "Pod", "Lease", "ConfigMap", "PodGroup", "Node"]


class Fault(Protocol):
    def happen(self, sim: Simulation) -> None: ...


@dataclass(frozen=True)
class NodeDies:
    node: int

    def happen(self, sim: Simulation) -> None:
        machine = sim.machine(self.node)
        if machine.up:
            machine.dies()
            sim.control_plane.silent(machine)


@dataclass(frozen=True)
class NodeReturns:
    """Booted again, maybe before anybody noticed that it was gone: its Pods' containers were started anew."""

    node: int

    def happen(self, sim: Simulation) -> None:
        machine = sim.machine(self.node)
        if not machine.up:
            machine.returns()


@dataclass(frozen=True)
class NodeIsCutOff:
    """From the API, from its peers, or from both; never from S3: its agents become zombies."""

    node: int
    of: tuple[str, ...] = ("api", "peers")
    believed_gone: bool = False
    """Its object is deleted, so that nobody waits for it to be silent long enough."""

    def happen(self, sim: Simulation) -> None:
        machine = sim.machine(self.node)
        if self.of == ("peers",):
            # for some seconds nobody can tell it from workers that do not meet
            sim.chargeable += 2
        if "api" in self.of and machine.reaches_api:
            sim.control_plane.silent(machine)
        machine.cut_off |= set(self.of)
        if self.believed_gone and "api" in self.of:
            sim.control_plane.node_is_deleted(machine)


@dataclass(frozen=True)
class NodeIsReached:
    node: int

    def happen(self, sim: Simulation) -> None:
        sim.reached_again(sim.machine(self.node))


@dataclass(frozen=True)
class NodeIsDeleted:
    """Its object, by an autoscaler that believes it gone; where the machine runs, its Pods do."""

    node: int

    def happen(self, sim: Simulation) -> None:
        machine = sim.machine(self.node)
        sim.control_plane.node_is_deleted(machine)
        if machine.reaches_api:
            sim.loop.call_later(5.0, sim.control_plane.heard_of, machine)


@dataclass(frozen=True)
class PodIsDeleted:
    pod: int
    evicted: bool = False

    def happen(self, sim: Simulation) -> None:
        sim.delete_pod(self.pod, evicted=self.evicted)


@dataclass(frozen=True)
class AgentIsKilled:
    pod: int

    def happen(self, sim: Simulation) -> None:
        box = sim.sandbox(self.pod)
        if box is not None and box.kill_agent():
            sim.chargeable += 1


@dataclass(frozen=True)
class WorkerCrashes:
    pod: int

    def happen(self, sim: Simulation) -> None:
        box = sim.sandbox(self.pod)
        if box is None or box.server is None or not box.server.workers:
            return
        sim.chargeable += 1
        worker = next(iter(box.server.workers.values()))
        box.server.fails(worker, 70, "Crash", "worker raised")


@dataclass(frozen=True)
class WorkerContainerIsKilled:
    pod: int

    def happen(self, sim: Simulation) -> None:
        box = sim.sandbox(self.pod)
        if box is not None and box.server is not None:
            sim.chargeable += 1
            box.server.end(137)


@dataclass(frozen=True)
class OperatorDies:
    def happen(self, sim: Simulation) -> None:
        sim.operator_dies("killed")


@dataclass(frozen=True)
class OperatorIsCut:
    """Killed before or after its call of that number from now."""

    call: int
    after: bool

    def happen(self, sim: Simulation) -> None:
        sim.order_cut(self.call, "after" if self.after else "before")


@dataclass(frozen=True)
class OperatorStandsStill:
    seconds: float
    before_call: int = 0
    """Just before it sends its call of that number from now; 0: at once."""

    def happen(self, sim: Simulation) -> None:
        operator = sim.leader
        if self.before_call:
            sim.order_pause(self.before_call, self.seconds)
        elif operator is not None:
            operator.stands_still(self.seconds)


@dataclass(frozen=True)
class CallFails:
    client: Literal["operator", "agent"]
    fault: ApiFault
    skip: int

    def happen(self, sim: Simulation) -> None:
        sim.network.order(self.client, self.skip, self.fault)


@dataclass(frozen=True)
class ApiServerIsDown:
    seconds: float

    def happen(self, sim: Simulation) -> None:
        sim.api_server_down(self.seconds)


@dataclass(frozen=True)
class WatchMisbehaves:
    """lost, doubled: of the next so many events. late: by so many seconds. broken: for so many seconds."""

    kind: KindName
    how: Literal["lost", "doubled", "late", "broken"]
    amount: int

    def happen(self, sim: Simulation) -> None:
        operator = sim.leader
        if operator is None:
            return
        watch = operator.watches[KINDS[self.kind]]
        match self.how:
            case "lost":
                watch.losing += self.amount
                # the server ends each watch after a while, and the next one lists anew
                sim.loop.call_later(30.0, watch.breaks, 0.1)
            case "doubled":
                watch.doubling += self.amount
            case "late":
                watch.lag = float(self.amount)
            case "broken":
                watch.breaks(self.amount)


@dataclass(frozen=True)
class AgentsHearLate:
    """Of assignments."""

    seconds: float

    def happen(self, sim: Simulation) -> None:
        sim.assignment_lag = self.seconds


@dataclass(frozen=True)
class StoreCallFails:
    fault: StoreFault
    skip: int

    def happen(self, sim: Simulation) -> None:
        sim.network.store_faults.append((self.skip, self.fault))


@dataclass(frozen=True)
class StoreIsDown:
    seconds: float

    def happen(self, sim: Simulation) -> None:
        sim.network.store_down = True
        sim.loop.call_later(self.seconds, sim.store_is_back)


@dataclass(frozen=True)
class WallClockJumps:
    """Of the operator's machine."""

    seconds: int

    def happen(self, sim: Simulation) -> None:
        sim.wall_clock_off += self.seconds


@dataclass(frozen=True)
class SomebodyDeletes:
    kind: Literal["ConfigMap", "PodGroup"]

    def happen(self, sim: Simulation) -> None:
        sim.user_deletes(KINDS[self.kind])


@dataclass(frozen=True)
class UserSuspends:
    suspend: bool

    def happen(self, sim: Simulation) -> None:
        sim.user_changes({"suspend": self.suspend})


@dataclass(frozen=True)
class TimePasses:
    def happen(self, sim: Simulation) -> None:
        pass


@dataclass(frozen=True)
class RunIsDeleted:
    def happen(self, sim: Simulation) -> None:
        sim.user_deletes(RUNS)


_node, _pod = st.sampled_from([0, 0, 1, 1, 2, 3]), st.sampled_from([0, 0, 1, 2, 3])
_seconds = st.sampled_from([1.0, 5.0, 20.0, 40.0])
_kinds = st.sampled_from(sorted(KINDS))

FAULTS: st.SearchStrategy[Fault] = st.one_of(
    st.builds(NodeDies, _node),
    st.builds(NodeReturns, _node),
    st.builds(NodeIsCutOff, _node, st.sampled_from([("api", "peers"), ("api",), ("peers",)])),
    st.builds(NodeIsCutOff, _node, st.sampled_from([("api", "peers"), ("api",)]), st.just(True)),
    st.builds(NodeIsReached, _node),
    st.builds(NodeIsDeleted, _node),
    st.builds(PodIsDeleted, _pod, st.booleans()),
    st.builds(AgentIsKilled, _pod),
    st.builds(WorkerCrashes, _pod),
    st.builds(WorkerContainerIsKilled, _pod),
    st.just(OperatorDies()),
    st.builds(OperatorIsCut, st.integers(1, 40), st.booleans()),
    st.builds(OperatorIsCut, st.integers(1, 12), st.booleans()),
    st.builds(OperatorStandsStill, _seconds),
    st.builds(OperatorStandsStill, _seconds, st.integers(1, 20)),
    st.builds(CallFails, st.just("operator"), st.sampled_from(API_FAULTS), st.integers(0, 20)),
    st.builds(CallFails, st.just("operator"), st.sampled_from(API_FAULTS), st.integers(0, 5)),
    st.builds(CallFails, st.just("agent"), st.sampled_from(API_FAULTS), st.integers(0, 5)),
    st.builds(ApiServerIsDown, _seconds),
    st.builds(
        WatchMisbehaves, _kinds, st.sampled_from(["lost", "doubled", "late", "broken"]), st.sampled_from([1, 3, 10])
    ),
    st.builds(AgentsHearLate, st.sampled_from([1.0, 5.0])),
    st.builds(StoreCallFails, st.sampled_from(STORE_FAULTS), st.integers(0, 10)),
    st.builds(StoreIsDown, _seconds),
    st.builds(WallClockJumps, st.sampled_from([-3600, -60, 60, 3600])),
    st.builds(SomebodyDeletes, st.sampled_from(["ConfigMap", "PodGroup"])),
    st.builds(UserSuspends, st.booleans()),
)

DELAYS = st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 16.0, 25.0])
"""Seconds between two steps of a schedule; a start takes about two, all iterations ten."""


@dataclass(frozen=True)
class Schedule:
    """A run, and what befalls it. All faults end after the last step; then the run must come to its end."""

    steps: tuple[tuple[float, Fault], ...] = ()
    """(seconds after the step before, fault)"""
    members: int = 2
    spares: int = 0
    free_nodes: int = 1
    gang: Literal["Native", "None"] = "Native"
    shrinks: bool = False
    """Trains on with fewer members where some find no place, and grows again."""
    operators: int = 1
    """Replicas; two are elected, one is started again where it ends."""
    upload_seconds: float = 0.0
    """What a file of a checkpoint takes to S3: commits come that much later than what they are of."""
    jitter: int = 0
    """Seed of latencies; 0: all the same."""

    @property
    def nodes(self) -> int:
        return self.members + self.spares + self.free_nodes


SCHEDULES = st.builds(
    Schedule,
    steps=st.lists(st.tuples(DELAYS, FAULTS), max_size=6).map(tuple),
    members=st.sampled_from([2, 1, 3]),
    spares=st.sampled_from([0, 0, 1]),
    free_nodes=st.sampled_from([1, 0, 2]),
    gang=st.sampled_from(["Native", "None"]),
    shrinks=st.booleans(),
    operators=st.sampled_from([1, 1, 1, 2]),
    upload_seconds=st.sampled_from([0.0, 0.0, 0.0, 1.0, 4.0]),
    jitter=st.one_of(st.just(0), st.integers(0, 1000)),
)
