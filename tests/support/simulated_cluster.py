"""A cluster in memory: API server, gang scheduler, kubelets and agents, as far as the planner can tell them from real
ones. Its rules are checked as they are used: a name or a uid that is misused fails the test at once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

from starcoder_operator.api.v1alpha1 import StarCoderRunSpec, StarCoderRunStatus
from starcoder_operator.domain.hearing import USUAL
from starcoder_operator.domain.plan import (
    Action,
    CreatePod,
    DeclareFailed,
    DeleteGang,
    DeletePod,
    EmitEvent,
    EnsureAccess,
    EnsureDisruptionBudget,
    EnsureGang,
    EnsureLeases,
    Plan,
    WriteAssignment,
)
from starcoder_operator.domain.pod_template import template_digest
from starcoder_operator.domain.snapshot import (
    AssignmentView,
    ContainerView,
    GangView,
    LeaseView,
    NodeView,
    PodView,
    Snapshot,
)
from starcoder_operator.domain.timestamps import after, at_millisecond, milliseconds
from starcoder_trainer.agent import messages as m
from starcoder_trainer.agent.heartbeats import is_news, is_relayed
from starcoder_trainer.contract import names
from starcoder_trainer.contract.report import Report
from tests.support.simulated_agents import EPOCH, Agent, World
from tests.support.simulated_kueue import SimulatedKueue


class Conflict(Exception):
    """Somebody wrote since the snapshot was taken."""


class Cut(Exception):
    """The operator died between two calls."""


class Refused(Exception):
    pass


@dataclass
class Pod:
    view: PodView
    created: float
    image: str
    scheduled: float = 0.0
    deleted: float = 0.0
    agent: Agent | None = None
    worker: ContainerView = field(default_factory=lambda: ContainerView(names.CONTAINER_WORKER, True, 0))


@dataclass
class Lease:
    report: Report | None = None
    renewed: float = 0.0
    writes: int = 0
    trouble: str = ""
    """Reason of the problem that it tells of, and since when."""
    troubled_since: float = 0.0


class SimulatedCluster:
    def __init__(self, spec: StarCoderRunSpec, *, name: str = "a", nodes: int = 0) -> None:
        self.name, self.uid, self.spec, self.generation = name, f"uid-{name}", spec, 1
        self.most_replicas = spec.workers.replicas
        """That were ever asked for."""
        self.world = World()
        self.status = StarCoderRunStatus()
        self.version = 1
        self.status_writes = 0
        self.pods: dict[str, Pod] = {}
        self.leases: dict[int, Lease] = {}
        self.nodes = {f"node-{i}": self.node(f"node-{i}") for i in range(nodes or spec.workers.replicas)}
        self.down: set[str] = set()
        """Nodes that are dead, whether or not the control plane has noticed."""
        self.kueue = SimulatedKueue()
        self.full: set[str] = set()
        """Nodes whose GPUs others hold."""
        self.groups: dict[str, GangView] = {}
        self.assignment: AssignmentView | None = None
        self.phase_since = 0.0
        self.access = False
        self.budget: int | None = None
        self.gang_api = self.gang_field = True
        self.refusing: dict[str, str] = {}
        """What is refused -> the server's words."""
        self.problems: dict[str, str] = {}
        self.api_reaches_agents = True
        self.out_of_reach: set[int] = set()
        """Members that the API server does not reach, where it reaches others."""
        self.relaying = True
        """Agents take heartbeats; those of older images do not."""
        self.cut_off: set[int] = set()
        """Members whose Pods reach no other Pod and are reached by none."""
        self.spoken_for: dict[tuple[str, int], float] = {}
        """(boot id of a relay, member) -> when that agent last renewed its Lease without suspecting that member."""
        self.agents_heard = 0.0, float("-inf")
        """When any agent renewed its Lease the last time, and when one did after all had been silent."""
        self.pullable: set[str] | None = None
        """Images that a registry has; None: all."""
        self.slow: set[str] = set()
        """Images that are being pulled for a long time."""
        self.events: list[EmitEvent] = []
        self.names_used: set[str] = set()
        self.torn_away: set[str] = set()
        """PodGroups that somebody deleted."""
        self.runs_written: dict[int, set[str]] = {}
        """Attempt -> assignments in phase run that were written for it."""
        self.leaders: dict[int, str] = {}
        """Attempt -> boot id of the agent that claims HEAD for it."""
        self.attempts_written: list[int] = []
        self._uids, self._versions = itertools.count(), itertools.count(1)

    # What the operator sees and does

    def snapshot(self) -> Snapshot:
        now = self.world.now
        newest = max(self.groups.values(), key=lambda g: int(g.uid.removeprefix("uid-g")), default=None)
        return Snapshot(
            namespace="default",
            name=self.name,
            uid=self.uid,
            generation=self.generation,
            resource_version=str(self.version),
            deleting=False,
            created_at=EPOCH,
            spec=self.spec,
            status=self.status,
            pods=tuple(
                replace(
                    p.view,
                    containers=self._containers(p),
                    age=now - p.created,
                    scheduled_for=now - p.scheduled if p.view.scheduled else 0.0,
                    deleting_for=now - p.deleted if p.view.deleting else 0.0,
                )
                for p in self.pods.values()
            ),
            leases=tuple(
                LeaseView(
                    i,
                    names.lease_name(self.name, i),
                    "1",
                    lease.report,
                    self._age(i),
                    now - lease.renewed,
                    self._unheard(i),
                    now - lease.troubled_since if lease.trouble else 0.0,
                )
                for i, lease in self.leases.items()
            ),
            nodes=dict(self.nodes),
            gang=newest if self.native and self.gang_api else None,
            gang_api=self.gang_api or not self.native,
            assignment=replace(self.assignment, phase_for=now - self.phase_since) if self.assignment else None,
            budget=self.budget,
            rbac_present=self.access,
            now=after(EPOCH, now),
            instant=at_millisecond(milliseconds(EPOCH) + round(1000 * now)),
            clock=now,
            problems=dict(self.problems),
            heard_for=self._heard_for(),
        )

    def _unheard(self, member: int) -> float:
        """Seconds since the assignment's relay last spoke for the member."""
        relay = self.assignment.assignment.relay if self.assignment else None
        now = self.world.now
        return now - self.spoken_for.get((relay.boot_id, member), now) if relay else 0.0

    def _heard_for(self) -> float:
        """As `observe` makes it of what it sees."""
        last, returned = self.agents_heard
        return 0.0 if self.world.now - last >= USUAL.stale else self.world.now - returned

    def _age(self, member: int) -> float:
        """As `observe` makes it of what it sees."""
        lease = self.leases[member]
        relay = lease.report.relayed_by if lease.report is not None else ""
        return self.world.now - max(lease.renewed, self.spoken_for.get((relay, member), lease.renewed))

    @property
    def native(self) -> bool:
        return self.spec.scheduling.gang == "Native"

    @property
    def queued(self) -> bool:
        return self.spec.scheduling.gang == "Kueue"

    def act(self, snapshot: Snapshot, plan: Plan, cut_after: int | None = None) -> None:
        """As the shipped actor does: status, Events, actions; what is refused ends the pass.

        Raises:
            Conflict: the snapshot is old and something that it is about has changed.
            Cut: after so many calls.
        """
        calls = itertools.count()

        def call() -> None:
            if cut_after is not None and next(calls) >= cut_after:
                raise Cut

        self._check_status(plan.status)
        if plan.status.to_dict() != snapshot.status.to_dict():
            call()
            self.write_status(snapshot, plan.status)
        self.events += [a for a in plan.actions if isinstance(a, EmitEvent)]
        actions = [a for a in plan.actions if not isinstance(a, EmitEvent)]
        wanted = {what(a) for a in actions}
        self.problems = {k: v for k, v in self.problems.items() if k in wanted}
        for action in actions:
            call()
            if what(action) in self.refusing:
                self.problems[what(action)] = self.refusing[what(action)]
                return
            self._do(snapshot, action)
            self.problems.pop(what(action), None)

    def write_status(self, snapshot: Snapshot, status: StarCoderRunStatus) -> None:
        if snapshot.resource_version != str(self.version):
            raise Conflict
        assert status.attempt >= self.status.attempt, "attempts only grow"
        assert status.placement >= self.status.placement
        assert all(new >= old for new, old in zip(status.incarnations, self.status.incarnations, strict=False))
        # through the wire
        self.status = StarCoderRunStatus.model_validate(status.to_dict())
        self.version += 1
        self.status_writes += 1

    def _check_status(self, status: StarCoderRunStatus) -> None:
        assert status.reason is not None or not status.conditions
        assert all(n >= 0 for n in status.restarts.by_cause.values())
        assert sum(status.restarts.by_cause.values()) == status.restarts.total

    def _do(self, snapshot: Snapshot, action: Action) -> None:
        match action:
            case EnsureAccess():
                self.access = True
            case EnsureLeases(members):
                for i in members:
                    self.leases.setdefault(i, Lease(renewed=self.world.now))
            case EnsureGang(name, min_count):
                assert self.native
                assert 1 <= min_count <= self.most_replicas
                known = self.groups.get(name)
                if known is None:
                    # one that was read as there and deleted meanwhile may come again
                    assert name not in self.names_used - self.torn_away, f"PodGroup {name} is used again"
                    self.names_used.add(name)
                    self.groups[name] = GangView(name, f"uid-g{next(self._uids)}", "1", min_count, None, "")
                else:
                    self.groups[name] = replace(known, min_count=min_count)
            case CreatePod():
                self._create(action)
            case DeletePod(name, uid):
                pod = self.pods.get(name)
                if pod is not None and pod.view.uid == uid:
                    self.delete_pod(name)
            case DeclareFailed(name, uid):
                pod = self.pods[name]
                assert (pod.view.uid, pod.view.deleting, self.up(pod.view.node)) == (uid, True, False)
                pod.view = replace(pod.view, phase="Failed", ready=False)
            case DeleteGang(name, uid):
                if name in self.groups and self.groups[name].uid == uid:
                    del self.groups[name]
            case EnsureDisruptionBudget(min_available):
                self.budget = min_available
            case WriteAssignment():
                self._write(action)
            case EmitEvent():
                pass

    def _create(self, action: CreatePod) -> None:
        name = names.pod_name(self.name, action.member, action.incarnation)
        assert name not in self.names_used, f"Pod {name} is used again"
        assert action.incarnation <= self.status.incarnations[action.member], "created before it was recorded"
        # somebody may have deleted it since
        assert not self.native or action.gang in self.names_used, "created before its PodGroup"
        standing = [p for p in self.pods.values() if p.view.member == action.member and self.counts(p)]
        assert not standing, f"{name} beside {[p.view.name for p in standing]}"
        self.names_used.add(name)
        view = PodView(
            name=name,
            uid=f"uid-p{next(self._uids)}",
            resource_version="1",
            member=action.member,
            incarnation=action.incarnation,
            phase="Pending",
            node="",
            deleting=False,
            scheduled=False,
            unschedulable_message="",
            ready=False,
            ip="",
            disruption="",
            scheduling_group=action.gang if self.gang_field else "",
            containers=(),
            age=0.0,
            avoided_nodes=action.avoid_nodes,
            template=template_digest(self.spec),
            credentials_secret=self.spec.storage.credentials_secret,
            group_size=action.gang_size,
            gated=self.queued and self.gang_field,
        )
        self.pods[name] = Pod(view, self.world.now, self.spec.workers.image or "")

    def counts(self, pod: Pod) -> bool:
        """It stands, on a node that stands."""
        node = self.nodes.get(pod.view.node)
        fine = not pod.view.node or (node is not None and node.ready is True)
        return fine and not pod.view.deleting and pod.view.phase in ("Pending", "Running")

    def _write(self, action: WriteAssignment) -> None:
        version = self.assignment.resource_version if self.assignment else ""
        if action.resource_version != version:
            raise Conflict
        written = action.assignment
        assert written.attempt <= self.status.attempt, "written before it was recorded"
        assert written.attempt >= max(self.attempts_written, default=0), "attempts only grow"
        self.attempts_written.append(written.attempt)
        assert len({place.index for place in written.members}) == len(written.members), "a member in two places"
        assert len(written.members) * written.gpus_per_member == written.layout.world_size
        if written.leader.boot_id:
            leader = self.leaders.setdefault(written.attempt, written.leader.boot_id)
            assert leader == written.leader.boot_id, f"attempt {written.attempt} changes its leader"
        if written.phase == "run":
            assert all(place.boot_id for place in written.members)
            assert written.offer is not None
            forms = self.runs_written.setdefault(written.attempt, set())
            forms.add(written.to_json())
            assert len(forms) == 1, f"attempt {written.attempt} runs in two forms"
        before = self.assignment
        if before and before.assignment.phase == "run" and written.phase == "hold":
            assert written.attempt > before.assignment.attempt, "a running attempt is held again"
        if before is None or (before.assignment.attempt, before.assignment.phase) != (written.attempt, written.phase):
            self.phase_since = self.world.now
        self.assignment = AssignmentView(str(next(self._versions)), written, action.config_json)

    # What the cluster does by itself

    def settle_cluster(self) -> None:
        """Scheduler, kubelets, agents: one round."""
        if self.queued:
            self.kueue.reconcile(self)
        self._schedule()
        for pod in list(self.pods.values()):
            self._kubelet(pod)
        for pod in list(self.pods.values()):
            self._agent(pod)
        self.beat()

    def beat(self) -> None:
        """Every agent beats once, and what changes by it is written."""
        now, agents = self.world.now, self._agents()
        for agent in agents.values():
            relay = agent.heartbeats.target
            if relay is None or relay.boot_id not in agents or self.cut_off & {agent.member, relay.member}:
                continue
            taken = agents[relay.boot_id].heartbeats.take(now, agent.heartbeats.beat(relay))
            agent.heartbeats.answered(now, taken)
        for agent in agents.values():
            for boot_id in agent.heartbeats.connected:
                if boot_id not in agents or self.cut_off & {agent.member, agents[boot_id].member}:
                    agent.heartbeats.broke(boot_id)
        for agent in agents.values():
            self._renew(agent)

    def _agents(self) -> dict[str, Agent]:
        """Those that run, by boot id."""
        pods = (p for p in self.pods.values() if p.agent is not None and self.up(p.view.node))
        return {p.agent.boot_id: p.agent for p in pods if p.agent is not None and not p.agent.exited}

    def up(self, node: str) -> bool:
        return node in self.nodes and node not in self.down

    def _free(self, avoided: tuple[str, ...]) -> list[str]:
        taken = {p.view.node for p in self.pods.values() if p.view.phase in ("Pending", "Running") and p.view.node}
        shut = taken | self.full | set(avoided)
        return [n for n, v in self.nodes.items() if n not in shut and v.ready and not v.unschedulable]

    def _schedule(self) -> None:
        waiting = [
            p for p in self.pods.values()
            if not p.view.node and not p.view.deleting and p.view.phase == "Pending" and not p.view.gated
        ]  # fmt: skip
        by_group: dict[str, list[Pod]] = {}
        for pod in waiting:
            by_group.setdefault("" if self.queued else pod.view.scheduling_group, []).append(pod)
        for name, pods in by_group.items():
            needed = 0
            if name:
                if name not in self.groups:
                    continue
                alive = [p for p in self.pods.values() if p.view.scheduling_group == name and not p.view.deleting
                         and p.view.phase in ("Pending", "Running")]  # fmt: skip
                needed = self.groups[name].min_count
                if len(alive) < needed:
                    continue
                needed -= sum(bool(p.view.node) for p in alive)
            self._bind(name, pods, needed)

    def _bind(self, group: str, pods: list[Pod], needed: int) -> None:
        chosen: dict[str, str] = {}
        for pod in pods:
            free = [n for n in self._free(pod.view.avoided_nodes) if n not in chosen.values()]
            if free:
                chosen[pod.view.name] = free[0]
        if len(chosen) < needed:
            chosen = {}
        for pod in pods:
            node = chosen.get(pod.view.name, "")
            message = "" if node else "0 nodes are available: too few nvidia.com/gpu"
            if message and needed and pod is pods[0]:  # as Kubernetes 1.37 tells the Pod that it tried first
                message = f"minCount ({needed}) cannot be satisfied: 0 scheduled, 1 remaining"
            pod.view = replace(pod.view, node=node, scheduled=bool(node), unschedulable_message=message)
            pod.scheduled = self.world.now
        if group and chosen:
            self.groups[group] = replace(self.groups[group], scheduled=True)

    def _kubelet(self, pod: Pod) -> None:
        view = pod.view
        if not view.node:
            if view.deleting:
                del self.pods[view.name]
            return
        if view.node not in self.nodes:
            # Pod garbage collection
            self._kill(pod)
            del self.pods[view.name]
            return
        if not self.up(view.node):
            return
        if view.deleting:
            if pod.agent is not None and self.world.now - pod.deleted < view.grace:
                pod.agent.terminate()
                if not pod.agent.exited:
                    return
                self._renew(pod.agent)  # its last words
            self._kill(pod)
            if self.queued and view.scheduling_group:
                pod.view = replace(pod.view, phase="Failed", ready=False)  # Kueue's finalizer holds it
            else:
                del self.pods[view.name]
            return
        if view.phase == "Pending" and self._can_pull(pod):
            pod.view = replace(view, phase="Running", ready=True, ip="10.0.0.1")
            self.start_agent(pod)

    def _can_pull(self, pod: Pod) -> bool:
        return pod.image not in self.slow and (self.pullable is None or pod.image in self.pullable)

    def start_agent(self, pod: Pod) -> None:
        view = pod.view
        pod.agent = Agent(
            run_uid=self.uid, pod=view.name, member=view.member, incarnation=view.incarnation, node=view.node,
            world=self.world, relays=self.relaying, grace=float(self.spec.workers.termination_grace_period_seconds),
        )  # fmt: skip

    def _agent(self, pod: Pod) -> None:
        if pod.agent is None or not self.up(pod.view.node):
            return
        written = self.assignment if self._reaches(pod.agent) else None
        pod.agent.look(written.assignment if written else None, written.config_json if written else "")
        self._renew(pod.agent)
        if pod.agent.quit:
            pod.view = replace(pod.view, phase="Succeeded", ready=False)
            pod.agent = None

    def _reaches(self, agent: Agent) -> bool:
        return self.api_reaches_agents and agent.member not in self.out_of_reach

    def _renew(self, agent: Agent) -> None:
        """As LeaseWriter does."""
        lease, report, now = self.leases.get(agent.member), agent.report, self.world.now
        if lease is None or not self._reaches(agent) or agent.machine.silent:
            return
        if agent.written is not None and is_relayed(agent.written, report) and not is_news(agent.written, report):
            return
        if lease.report is not None and lease.report.incarnation > report.incarnation:
            agent.tell(m.Superseded(now))
            return
        lease.report = agent.written = report
        lease.renewed = now
        trouble = report.problem.reason if report.problem else ""
        if trouble != lease.trouble:
            lease.trouble, lease.troubled_since = trouble, now
        self.spoken_for |= {(agent.boot_id, i): now for i in self.leases if i not in report.suspects}
        last, returned = self.agents_heard
        self.agents_heard = now, now if now - last >= USUAL.stale else returned
        lease.writes += 1
        agent.heartbeats.renewed(now)

    def _containers(self, pod: Pod) -> tuple[ContainerView, ...]:
        if pod.view.node and pod.view.phase == "Pending" and not self._can_pull(pod):
            why = ("ContainerCreating", "") if pod.image in self.slow else ("ErrImagePull", "manifest unknown")
            waiting = ContainerView(names.CONTAINER_WORKER, False, 0, *why)
            return (waiting,)
        if not pod.view.node:
            return ()
        return (ContainerView(names.CONTAINER_AGENT, True, 0), pod.worker)

    # What happens to it

    def delete_assignment(self) -> None:
        """By somebody. An operator that looked before may then create an older one, which agents ignore."""
        self.assignment = None
        self.attempts_written = []

    def delete_group(self, name: str) -> None:
        """By somebody."""
        del self.groups[name]
        self.torn_away.add(name)

    def change_spec(self, **fields: Any) -> None:
        self.spec = self.spec.model_copy(update=fields)
        self.most_replicas = max(self.most_replicas, self.spec.workers.replicas)
        self.generation += 1
        self.version += 1

    def delete_pod(self, name: str, grace: float | None = None, disruption: str = "") -> None:
        """Grace 0 is by force: the object is gone at once, and the processes soon after."""
        pod = self.pods[name]
        if grace is None:
            grace = self.spec.workers.termination_grace_period_seconds
        held = self.queued and pod.view.scheduling_group
        if not held and (not pod.view.node or pod.view.phase in ("Succeeded", "Failed") or grace == 0):
            self._kill(pod)
            del self.pods[name]
        elif not pod.view.deleting:
            pod.view = replace(pod.view, deleting=True, grace=grace, disruption=disruption)
            pod.deleted = self.world.now

    def evict(self, name: str) -> bool:
        """As the eviction API: whether the budget allowed it."""
        pod = self.pods[name]
        healthy = [p for p in self.pods.values() if p.view.ready and not p.view.deleting]
        if pod.view.ready and len(healthy) - 1 < (self.budget or 0):
            return False
        self.delete_pod(name, disruption="EvictionByEvictionAPI")
        return True

    def taint(self, node: str, key: str) -> None:
        """With effect NoExecute; the taint manager then deletes the Pods on it."""
        self.nodes[node] = replace(self.nodes[node], noexecute_taints=(key,))

    def node_dies(self, node: str) -> None:
        self.down.add(node)
        for pod in self.pods.values():
            if pod.view.node == node:
                self._kill(pod)

    def node(self, name: str) -> NodeView:
        """One that is well and has room for one Pod."""
        workers = self.spec.workers
        return NodeView(name, True, False, (), extended={workers.gpu_resource: workers.gpus_per_worker})

    def node_is_unknown(self, node: str) -> None:
        """What the control plane says of it, sooner or later."""
        self.nodes[node] = replace(self.nodes[node], ready=None)

    def node_returns(self, node: str) -> None:
        self.down.discard(node)
        self.nodes[node] = self.node(node)
        for pod in self.pods.values():
            if pod.view.node == node and pod.view.phase == "Running" and pod.agent is None and not pod.view.deleting:
                self.start_agent(pod)

    def agent_restarts(self, name: str) -> None:
        pod = self.pods[name]
        if pod.agent is not None:
            pod.agent.vanish()
            self.start_agent(pod)

    def _kill(self, pod: Pod) -> None:
        if pod.agent is not None:
            pod.agent.vanish()
            pod.agent = None


def what(action: Action) -> str:
    kinds = {
        EnsureAccess: "create access", EnsureLeases: "create lease", EnsureGang: "create gang", CreatePod: "create pod",
        DeletePod: "delete pod", DeclareFailed: "declare pod failed",
        DeleteGang: "delete gang", WriteAssignment: "write assignment",
        EnsureDisruptionBudget: "write disruption budget",
    }  # fmt: skip
    return kinds[type(action)]
