"""All that one decision needs, read before it and immutable.

`None` where a part could not be read means Unknown, never empty: `observe` raises instead of guessing, so a Snapshot
that exists was read completely. Ages are seconds since this operator saw the thing change, never a difference to a
remote clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from starcoder_operator.api.v1alpha1 import StarCoderRunSpec, StarCoderRunStatus
from starcoder_trainer.contract.assignment import Assignment
from starcoder_trainer.contract.report import Report


@dataclass(frozen=True)
class ContainerView:
    name: str
    ready: bool
    restarts: int
    waiting_reason: str = ""
    """ErrImagePull, ImagePullBackOff, CreateContainerConfigError, CrashLoopBackOff, …"""
    waiting_message: str = ""
    terminated_reason: str = ""
    """Of the current state, else of the last one."""
    exit_code: int | None = None

    @property
    def went_with_its_node(self) -> bool:
        """containerd answers so for a container of which it found nothing when it started: power cut, reboot, crash
        (`unknownContainerStatus` in its internal/cri/server/helpers.go)."""
        return self.terminated_reason == "Unknown" and self.exit_code == 255


@dataclass(frozen=True)
class PodView:
    name: str
    uid: str
    resource_version: str
    member: int
    incarnation: int
    phase: str
    node: str
    """Empty while unscheduled."""
    deleting: bool
    scheduled: bool
    unschedulable_message: str
    ready: bool
    ip: str
    disruption: str
    """Reason of the DisruptionTarget condition, empty where there is none."""
    scheduling_group: str
    """spec.schedulingGroup.podGroupName as the server stored it."""
    containers: tuple[ContainerView, ...]
    age: float
    """Seconds since this operator first saw it."""
    scheduled_for: float = 0.0
    """Seconds since this operator saw that it has a node; 0 where it has none."""
    containers_for: float = 0.0
    """Seconds since this operator saw a container's readiness or restarts change."""
    deleting_for: float = 0.0
    """Seconds since this operator saw that it is being deleted."""
    grace: float = 0.0
    """Seconds that it was given to end when it was deleted; 0: none, or it is not being deleted."""
    group_size: int = 0
    """Pods that its group has in all, as the Pod says; 0: the group is an object that says it, or there is none."""
    gated: bool = False
    """Scheduling gates hold it: nobody has tried to place it."""
    agent_changed: float | None = None
    """Seconds since this operator saw the agent's container end or start; None where it has seen neither."""
    priority_class: str = ""
    avoided_nodes: tuple[str, ...] = ()
    """Nodes that its affinity forbids: lost, broken, or avoided; from annotation `pod_template.ANNOTATION_AVOIDS`."""
    template: str = ""
    """Digest of what the Pod was built from; annotation `pod_template.ANNOTATION_TEMPLATE`. Empty: not known."""
    credentials_secret: str | None = None
    """The Secret that it mounts for S3."""
    why: str = ""
    """What its kubelet or a controller says of its phase (status.reason and status.message), empty where nothing."""


@dataclass(frozen=True)
class NodeView:
    name: str
    ready: bool | None
    """None: Unknown (its kubelet is silent)."""
    unschedulable: bool
    noexecute_taints: tuple[str, ...]
    faults: tuple[str, ...] = ()
    """Conditions of the operator's list of device faults that are True, each with its message."""
    labels: dict[str, str] = field(default_factory=dict, compare=False)
    """All; a change of one is no news by itself."""
    extended: dict[str, int] = field(default_factory=dict)
    """Allocatable resources with a domain in their name, such as nvidia.com/gpu, of all Pods there."""


@dataclass(frozen=True)
class LeaseView:
    member: int
    name: str
    resource_version: str
    report: Report | None
    """None: nothing written yet."""
    age: float
    """Seconds since the agent was heard of: since this operator saw its Lease renewed, or that of the relay that spoke
    for it and did not suspect it; 0 where it has not watched long enough to tell."""
    renewed: float = 0.0
    """Seconds since this operator saw renewTime or report of this very Lease change."""
    unheard: float = 0.0
    """Seconds since the assignment's relay last heard this agent, as far as this operator knows; of one that it hears,
    those since the relay's own renewal."""
    troubled_for: float = 0.0
    """Seconds for which this operator has seen the report tell of the problem that it tells of, by its reason."""
    witnessed: bool = True
    """It has seen such a change since it can see: what stands there was not written before an outage."""


@dataclass(frozen=True)
class GangView:
    """The PodGroup of the present placement."""

    name: str
    uid: str
    resource_version: str
    min_count: int
    scheduled: bool | None
    """PodGroupInitiallyScheduled; None: no such condition yet."""
    message: str


@dataclass(frozen=True)
class AssignmentView:
    resource_version: str
    assignment: Assignment
    config_json: str
    phase_for: float = 0.0
    """Seconds for which this operator has seen the attempt in this phase."""


@dataclass(frozen=True)
class Snapshot:
    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str
    deleting: bool
    created_at: str
    spec: StarCoderRunSpec
    status: StarCoderRunStatus
    """As last written; the planner's memory."""
    pods: tuple[PodView, ...] = ()
    leases: tuple[LeaseView, ...] = ()
    nodes: dict[str, NodeView] = field(default_factory=dict)
    """All nodes, or at least those that Pods of this run are on or avoid and that the Leases' reports name. A node that
    is missing does not exist; empty means that nodes can't be read, and then none is held to be lost."""
    nodes_complete: bool = True
    """False: others may exist; while they are listed, or where they can't be read."""
    gang: GangView | None = None
    """None: there is none (it was looked for)."""
    gang_api: bool = True
    """The server knows the API of `spec.scheduling.gang`."""
    assignment: AssignmentView | None = None
    budget: int | None = None
    """minAvailable of the run's PodDisruptionBudget; None: there is none."""
    rbac_present: bool = False
    """ServiceAccount, Role and RoleBinding exist as built for this spec."""
    now: str = ""
    """RFC 3339 UTC, whole seconds, for timestamps that people read."""
    instant: str = ""
    """The same with milliseconds, for sums of short times. Empty: as `now`."""
    clock: float = 0.0
    """Monotonic seconds, for intervals."""
    problems: dict[str, str] = field(default_factory=dict)
    """What the last `act` was refused: 'create pod' -> the server's message (a bad podPatch, quota, PSA, …)."""
    heard_for: float = float("inf")
    """Seconds since all agents of the run were silent together the last time, by this operator's sight: 0 while they
    are, infinite where they never were."""


def own_assignment(snapshot: Snapshot) -> Assignment | None:
    """The assignment as written for this run; one left by an earlier run of the name is none."""
    view = snapshot.assignment
    return view.assignment if view is not None and view.assignment.run_uid == snapshot.uid else None


def is_held(snapshot: Snapshot) -> bool:
    """The assignment as written tells the gang to wait for an attempt to be formed."""
    current = own_assignment(snapshot)
    return current is not None and current.phase == "hold"
