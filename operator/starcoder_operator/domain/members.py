"""One view a member: its newest Pod, what its agent says, and whether either can be counted on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from starcoder_operator.api.v1alpha1.workers import Toleration
from starcoder_trainer.contract import names
from starcoder_trainer.contract.report import Report

from .elasticity import pool_size
from .hearing import USUAL, Limits, suspects
from .snapshot import ContainerView, LeaseView, NodeView, PodView, Snapshot, own_assignment

NODE_INDEX_LAG = 10.0
"""Seconds that a node may be missing from the snapshot after a Pod was seen on it: nodes and Pods are not read at one
moment, and an autoscaler's node is new."""
OWN_TOLERATIONS = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
"""Taints that say what NodeView.ready says already."""


class LossKind(StrEnum):
    NODE = "node"
    DEVICE = "device"
    DISRUPTED = "disrupted"
    DELETED = "deleted"
    FAILED = "failed"
    FINISHED = "finished"
    SILENT = "silent"
    STUCK = "stuck"


@dataclass(frozen=True)
class Loss:
    """Why a member's Pod can't go on and has to be replaced."""

    kind: LossKind
    node: str
    message: str


@dataclass(frozen=True)
class MemberView:
    index: int
    pod_name: str
    """Of the newest Pod, also when it is gone; empty where there never was one."""
    pod: PodView | None
    lease: LeaseView | None
    stale: bool
    """The newest Pod's agent was not heard in time."""
    loss: Loss | None
    last_incarnation: int
    """Highest that is known of, -1 for none; the next Pod's is one more."""
    suspect: bool = False
    """Other agents hear this one no more."""

    @property
    def report(self) -> Report | None:
        """Of the agent in the newest Pod; None while it has not said anything."""
        report = self.lease.report if self.lease else None
        if report is None or self.pod is None or report.incarnation != self.pod.incarnation:
            return None
        return report if report.pod in ("", self.pod.name) else None

    @property
    def live(self) -> bool:
        """The Pod stands and its agent answers."""
        return self.loss is None and self.report is not None and not self.stale

    @property
    def fit(self) -> bool:
        """Live, and nothing is known to keep its workers from starting."""
        problem = self.report.problem if self.report else None
        return self.live and (problem is None or problem.reason != "WorkerNotReady")

    @property
    def boot_id(self) -> str:
        """Of the live agent, else empty."""
        return self.report.boot_id if self.live and self.report else ""

    @property
    def node(self) -> str:
        if self.pod is not None:
            return self.pod.node
        report = self.lease.report if self.lease else None
        return report.node if report and report.incarnation == self.last_incarnation else ""

    @property
    def worker(self) -> ContainerView | None:
        return self._container(names.CONTAINER_WORKER)

    @property
    def agent(self) -> ContainerView | None:
        return self._container(names.CONTAINER_AGENT)

    @property
    def agent_is_down(self) -> bool:
        """Its container has ended, as the kubelet says, which starts it again."""
        agent = self.agent
        down = agent is not None and not agent.ready and agent.exit_code is not None
        return self.loss is None and down and not self.heard_since

    @property
    def heard_since(self) -> bool:
        """The agent has written its Lease since the containers look as they do: the kubelet's word is behind."""
        lease, pod = self.lease, self.pod
        return self.report is not None and lease is not None and pod is not None and lease.renewed < pod.containers_for

    @property
    def agent_returns(self) -> bool:
        """Its container has ended, or started again and the new agent has not spoken yet."""
        if self.pod is None or self.lease is None or self.pod.agent_changed is None:
            return self.agent_is_down
        return self.agent_is_down or self.pod.agent_changed < self.lease.renewed

    def _container(self, name: str) -> ContainerView | None:
        return next((c for c in self.pod.containers if c.name == name), None) if self.pod else None


def members_of(snapshot: Snapshot, limits: Limits = USUAL) -> tuple[MemberView, ...]:
    """All members of the run, by index: its pool, and those beyond it that still take part since the run was made
    smaller. Where no agent at all is fresh, none is held to be lost for its silence; nor right after a silence that was
    common to all, since they come back one by one."""
    pods = newest_pods(snapshot.pods)
    suspected = suspects(snapshot, limits)
    leases = {lease.member: lease for lease in snapshot.leases}
    views = [
        _member(snapshot, index, pods.get(index), leases.get(index), suspect=index in suspected, limits=limits)
        for index in range(_members(snapshot))
    ]
    if snapshot.heard_for < limits.heard or not any(v.live for v in views):
        return tuple(views)
    return tuple(_judge_silence(v, limits) for v in views)


def _members(snapshot: Snapshot) -> int:
    current = own_assignment(snapshot)
    taking_part = [place.index for place in current.members] if current and current.phase != "stop" else []
    return max([pool_size(snapshot.spec), *(index + 1 for index in taking_part)])


def all_silent(members: tuple[MemberView, ...]) -> bool:
    """Agents have reported, and not one of them is heard."""
    said = [m for m in members if m.loss is None and m.report is not None]
    return bool(said) and all(m.stale for m in said)


def newest_pods(pods: Iterable[PodView]) -> dict[int, PodView]:
    """Member to its Pod of the highest incarnation."""
    newest: dict[int, PodView] = {}
    for pod in pods:
        known = newest.get(pod.member)
        if known is None or pod.incarnation > known.incarnation:
            newest[pod.member] = pod
    return newest


def node_trouble(
    name: str, nodes: dict[str, NodeView], tolerations: tuple[Toleration, ...], *, heard: bool = False
) -> str | None:
    """Why Pods on this node can't go on, as a sentence; None where they can or nodes can't be read.

    Args:
        heard: an agent there still answers, so that a kubelet that is silent is not taken for a dead node.
    """
    if not nodes:
        return None
    node = nodes.get(name)
    if node is None:
        return f"node {name} is gone"
    if node.ready is None and not heard:
        return f"node {name} is Unknown: its kubelet is silent"
    if node.ready is False:
        return f"node {name} is NotReady"
    for taint in node.noexecute_taints:
        if taint in OWN_TOLERATIONS or not any(_tolerates(t, taint) for t in tolerations):
            return f"node {name} has the NoExecute taint {taint}"
    return None


def device_trouble(name: str, nodes: dict[str, NodeView]) -> str | None:
    """What its node conditions say of broken devices; None where they say nothing."""
    node = nodes.get(name)
    return f"node {name} has a faulty device: {'; '.join(node.faults)}" if node is not None and node.faults else None


def _tolerates(toleration: Toleration, key: str) -> bool:
    """For ever, whatever the taint's value: then nobody evicts the Pod."""
    return (
        toleration.effect in (None, "NoExecute")
        and toleration.key in (None, "", key)
        and toleration.toleration_seconds is None
    )


def _member(
    snapshot: Snapshot, index: int, pod: PodView | None, lease: LeaseView | None, *, suspect: bool, limits: Limits
) -> MemberView:
    report = lease.report if lease else None
    recorded = snapshot.status.incarnations
    last = max(
        recorded[index] if index < len(recorded) else -1,
        pod.incarnation if pod else -1,
        report.incarnation if report else -1,
    )
    speaks = pod is not None and report is not None and report.incarnation == pod.incarnation
    if pod is not None and pod.incarnation < last:
        pod = None  # a newer one was created or was about to be, and is gone
    name = pod.name if pod is not None else names.pod_name(snapshot.name, index, last) if last >= 0 else ""
    return MemberView(
        index=index,
        pod_name=name,
        pod=pod,
        lease=lease,
        stale=speaks and lease is not None and _is_stale(lease, suspect, limits),
        loss=_loss(
            snapshot,
            pod,
            name,
            report.node if report and report.incarnation == last else "",
            heard=speaks and lease is not None and _is_heard(lease, suspect, limits),
            stuck=_stuck(report) if speaks else "",
        ),
        last_incarnation=last,
        suspect=speaks and suspect,
    )


def _is_stale(lease: LeaseView, suspect: bool, limits: Limits) -> bool:
    return lease.age >= limits.stale or (suspect and lease.renewed >= limits.of_suspect(lease))


def _is_heard(lease: LeaseView, suspect: bool, limits: Limits) -> bool:
    return (lease.renewed if suspect else lease.age) < limits.heard


def _stuck(report: Report | None) -> str:
    """What an agent says of workers that it can't end."""
    problem = report.problem if report else None
    return problem.message if problem is not None and problem.reason == "WorkersStuck" else ""


def _loss(
    snapshot: Snapshot, pod: PodView | None, name: str, node_before: str, *, heard: bool, stuck: str
) -> Loss | None:
    """`stuck`: what its agent says of workers that it can't end; empty where it can."""
    node = pod.node if pod else node_before
    tolerations = snapshot.spec.workers.tolerations
    trouble = node_trouble(node, snapshot.nodes, tolerations, heard=heard) if node else None
    if trouble and node not in snapshot.nodes and pod is not None and pod.age < NODE_INDEX_LAG:
        trouble = None
    if pod is not None and pod.phase == "Succeeded" and not pod.deleting:
        return Loss(LossKind.FINISHED, node, f"Pod {name} ended before the run was complete")
    if trouble:
        return Loss(LossKind.NODE, node, trouble)
    if fault := device_trouble(node, snapshot.nodes):
        return Loss(LossKind.DEVICE, node, fault)
    if pod is None:
        return Loss(LossKind.DELETED, node, f"Pod {name} is gone") if name else None
    if pod.disruption and (pod.deleting or pod.phase == "Failed"):
        return Loss(LossKind.DISRUPTED, node, f"Pod {name} was disrupted ({pod.disruption})")
    if pod.deleting:
        return Loss(LossKind.DELETED, node, f"Pod {name} is being deleted")
    if pod.phase == "Failed":
        said = f" ({pod.why})" if pod.why else ""
        return Loss(LossKind.FAILED, node, f"Pod {name} was given up by node {node or 'none'}{said}")
    return Loss(LossKind.STUCK, node, stuck) if stuck else None


def _judge_silence(view: MemberView, limits: Limits) -> MemberView:
    if view.loss is not None or not view.stale or view.pod is None:
        return view
    age = view.lease.age if view.lease else 0.0
    if view.agent_returns and age < limits.stale:
        return view  # it is sooner there again than another Pod
    how = "misses its heartbeats" if view.suspect else f"has been silent for {age:.0f} s while others answer"
    return replace(view, loss=Loss(LossKind.SILENT, view.pod.node, f"the agent of Pod {view.pod_name} {how}"))
