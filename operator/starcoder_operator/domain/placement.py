"""Which Pods go, which come, and the PodGroup they come in. Members at work in an attempt that runs are left alone.

A placement is one PodGroup: the whole gang enters the cluster by it at once, replacements of lost Pods join it. Its
`minCount` are those without whom the run does not train; spares and what it can do without are in the group too, so
that one without room holds nothing up. Once the group has placed its gang, `minCount` is lowered to those that still
stand before a replacement is created, since a group that is short of it lets none of its Pods be scheduled. Where the
group is gone, or nothing of its gang stands any more, the Pods that come get a group of the next number.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import reasons
from .elasticity import least, pool_size
from .members import MemberView, device_trouble, node_trouble
from .plan import Action, CreatePod, DeclareFailed, DeleteGang, DeletePod, EnsureGang
from .pod_groups import Seat, seats
from .pod_template import template_digest
from .snapshot import PodView, Snapshot, own_assignment
from .timestamps import seconds_between

IMAGE_TROUBLE = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "ImageInspectError",
     "RegistryUnavailable", "SignatureValidationFailed"}
)  # fmt: skip
CONFIG_TROUBLE = frozenset(
    {"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "PreCreateHookError",
     "PreStartHookError", "PostStartHookError"}
)  # fmt: skip
CRASH_TROUBLE = frozenset({"CrashLoopBackOff"})
"""Reasons of waiting containers, as the kubelet says them, that time alone does not mend."""

_OF_CREDENTIALS = frozenset({"CredentialsMissing", "StorageAccessDenied"})
"""Problems of agents that Pods with the credentials of another Secret may not have."""

NO_PLACE = "the run has fewer members than when it was made"
OF_SPENT = "nothing of its gang has a node any more: it comes anew, with the others"
RETRY = 20.0
"""Seconds after which the server is tried again with one Pod where it refused one or dropped `spec.schedulingGroup`."""
TRIED_SLOWLY = (reasons.REFUSED, reasons.GANG_FIELD_DROPPED)
"""Reasons of the condition Scheduled that hold Pods back. Its status is False while nothing is tried and Unknown while
a try is under way, so lastTransitionTime is that of the last try."""


@dataclass(frozen=True)
class Placement:
    """What is to be done about Pods and PodGroup, and what has to be recorded before it."""

    number: int
    incarnations: tuple[int, ...]
    missing: int = 0
    """Members without a Pod that counts."""
    dropped: int = 0
    """Pods that came without the group they were created for."""
    held_back: bool = False
    """The server refused Pods or dropped their group: none is created, until one is tried."""
    trying: bool = False
    """That one is tried now."""
    look_again: float | None = None
    actions: tuple[Action, ...] = ()


def group_name(run: str, number: int) -> str:
    """PodGroup of that placement; never used again."""
    return f"{run}-p{number}"


def is_native(snapshot: Snapshot) -> bool:
    return snapshot.spec.scheduling.gang == "Native"


def is_queued(snapshot: Snapshot) -> bool:
    return snapshot.spec.scheduling.gang == "Kueue"


def unchanged(snapshot: Snapshot, members: tuple[MemberView, ...]) -> Placement:
    """While an attempt runs; what a status that was lost had recorded is recorded again."""
    return Placement(snapshot.status.placement, _incarnations(members, (), snapshot.status.incarnations))


def place(
    snapshot: Snapshot,
    members: tuple[MemberView, ...],
    busy: frozenset[int] = frozenset(),
    avoided: frozenset[str] = frozenset(),
) -> Placement:
    """Lost Pods and those that wait in vain make room, missing ones come.

    Args:
        busy: members that take part in an attempt that runs. They are left alone until it has ended.
        avoided: nodes that look well and that the run keeps away from.
    """
    digest = template_digest(snapshot.spec)
    idle = tuple(m for m in members if m.index not in busy)
    said = [m.report.problem.reason for m in idle if m.live and m.report is not None and m.report.problem is not None]
    locked_out = not _OF_CREDENTIALS.isdisjoint(said)
    vain = {m.index: why for m in idle if (why := _in_vain(snapshot, m, digest, avoided, locked_out=locked_out))}
    if not busy and _is_spent(snapshot, members):
        vain |= {m.index: OF_SPENT for m in idle if m.pod is not None and m.loss is None}
    dropped = {m.index for m in idle if m.index not in vain and _came_without_group(snapshot, m, digest)}
    kept = tuple(
        m for m in members
        if m.index in busy
        or (m.pod is not None and m.loss is None and m.index not in vain and m.index not in dropped)
    )  # fmt: skip
    standing = {m.index for m in kept}
    missing = tuple(m for m in members[: pool_size(snapshot.spec)] if m.index not in standing)
    actions: list[Action] = [*_deletions(snapshot, members, kept, vain, dropped)]
    actions += _declarations(snapshot, kept)
    allowed, look_again, trying = _allowance(snapshot, kept, missing, bool(dropped))
    number, coming = snapshot.status.placement, missing[:allowed]
    if allowed:
        number = _number(snapshot, kept, missing)
    if allowed or (snapshot.gang is not None and snapshot.gang.name == group_name(snapshot.name, number)):
        actions += _gang(snapshot, number, kept, missing)
    where = _seats(snapshot, number, kept, missing)
    coming = tuple(m for m in coming if m.index in where)
    avoid = avoided.union(lost_nodes(snapshot))
    actions += _creations(coming, where, avoid, silent_nodes(members) - avoid)
    return Placement(
        number=number,
        incarnations=_incarnations(members, coming, snapshot.status.incarnations),
        missing=len(missing),
        dropped=len(dropped),
        held_back=look_again is not None,
        trying=trying,
        look_again=look_again,
        actions=tuple(actions),
    )


def waiting_trouble(pod: PodView) -> tuple[str, str] | None:
    """(reason of a condition, message) of the first container that can't be started; None where all can or do."""
    kinds = (
        (IMAGE_TROUBLE, reasons.IMAGE_PULL_FAILED),
        (CONFIG_TROUBLE, reasons.CONTAINER_CONFIG_ERROR),
        (CRASH_TROUBLE, reasons.CONTAINER_CRASHING),
    )
    for container in pod.containers:
        for waiting, reason in kinds:
            if container.waiting_reason in waiting:
                said = container.waiting_message or "the kubelet gives no message"
                return reason, f"container {container.name} of Pod {pod.name}: {container.waiting_reason}: {said}"
    return None


def _in_vain(snapshot: Snapshot, member: MemberView, digest: str, avoided: frozenset[str], *, locked_out: bool) -> str:
    """Why this Pod, which runs nothing, is better built anew; empty where it is to stay.

    Args:
        locked_out: an agent has no credentials, or none that S3 takes.
    """
    pod = member.pod
    if pod is None or member.loss is not None:
        return ""
    if member.index >= pool_size(snapshot.spec):
        return NO_PLACE
    if pod.template and pod.template != digest and (not pod.scheduled or waiting_trouble(pod)):
        return "it waits, and the spec has changed since it was built"
    if locked_out and pod.credentials_secret != snapshot.spec.storage.credentials_secret:
        return f"it has the credentials of {pod.credentials_secret}, and spec.storage.credentialsSecret is another now"
    if pod.scheduled:
        return f"node {pod.node} is avoided (status.avoidedNodes)" if pod.node in avoided else ""
    if is_native(snapshot) and snapshot.gang_api and pod.scheduling_group:
        current = snapshot.gang.name if snapshot.gang else ""
        if pod.scheduling_group != current:
            return f"it waits in PodGroup {pod.scheduling_group}, which is gone"
    back = [
        n for n in pod.avoided_nodes if n in snapshot.nodes and n not in avoided and not _is_unfit(snapshot, n)
    ]  # fmt: skip
    return f"it waits and avoids node {back[0]}, which may be used again" if back else ""


def _is_spent(snapshot: Snapshot, members: tuple[MemberView, ...]) -> bool:
    """The gang was placed, and is lost but for Pods that wait: each would be placed alone. They come anew, as a gang
    with those that are missing."""
    placed = is_native(snapshot) and snapshot.gang is not None and snapshot.gang.scheduled is True
    stands = any(m.pod is not None and m.loss is None and m.pod.scheduled for m in members)
    return placed and not stands and any(m.loss is not None for m in members)


def _came_without_group(snapshot: Snapshot, member: MemberView, digest: str) -> bool:
    """The API server knows PodGroups but not the Pod's field: it drops it without a word."""
    pod = member.pod
    return (
        pod is not None
        and member.loss is None
        and (is_native(snapshot) or is_queued(snapshot))
        and pod.template == digest
        and not pod.scheduling_group
    )


def _deletions(
    snapshot: Snapshot,
    members: tuple[MemberView, ...],
    kept: tuple[MemberView, ...],
    vain: dict[int, str],
    dropped: set[int],
) -> list[DeletePod]:
    """Every Pod that does not count. Those that are being deleted already are left to their kubelet; nothing waits."""
    stay = {m.pod.uid for m in kept if m.pod is not None}
    losses = {m.index: m.loss.message for m in members if m.loss is not None}
    whys = losses | vain | dict.fromkeys(dropped, "it came without its group")

    def why(pod: PodView) -> str:
        return whys.get(pod.member, "a later Pod takes its place" if pod.member < len(members) else NO_PLACE)

    return [DeletePod(pod.name, pod.uid, why(pod)) for pod in snapshot.pods if pod.uid not in stay and not pod.deleting]


def _allowance(
    snapshot: Snapshot, kept: tuple[MemberView, ...], missing: tuple[MemberView, ...], dropped: bool
) -> tuple[int, float | None, bool]:
    """(how many Pods may be created now, when to look again, whether it is a try)."""
    if not missing or (is_native(snapshot) and not snapshot.gang_api):
        return 0, None, False
    if dropped or any(what.startswith("create ") for what in snapshot.problems):
        return 0, RETRY, False
    told = snapshot.status.condition("Scheduled")
    if told is None or told.reason not in TRIED_SLOWLY:
        return len(missing), None, False
    if told.status == "False" and told.observed_generation == snapshot.generation:
        left = RETRY - seconds_between(told.last_transition_time, snapshot.now)
        return (0, left, False) if left > 0 else (1, None, True)
    if told.reason == reasons.REFUSED:
        tried = told.status == "Unknown"
    else:
        tried = snapshot.spec.scheduling.gang == "None" or any(_is_in_group(snapshot, m) for m in kept)
    return (len(missing), None, False) if tried else (1, None, True)


def _is_in_group(snapshot: Snapshot, member: MemberView) -> bool:
    gang, pod = snapshot.gang, member.pod
    if is_queued(snapshot):
        return pod is not None and bool(pod.scheduling_group)
    return gang is not None and pod is not None and pod.scheduling_group == gang.name


def _number(snapshot: Snapshot, kept: tuple[MemberView, ...], missing: tuple[MemberView, ...]) -> int:
    """Of the placement that Pods now come in."""
    number, gang = snapshot.status.placement, snapshot.gang
    current = own_assignment(snapshot)
    stopped = current is not None and current.phase == "stop" and not kept
    if is_queued(snapshot):
        fresh = group_name(snapshot.name, _beyond(snapshot, number))
        comes = any(seat.group == fresh for seat in seats(kept, snapshot.pods, missing, fresh).values())
        return _beyond(snapshot, number) if comes else number
    if not is_native(snapshot):
        return number + 1 if number == 0 or stopped else number
    if gang is None or gang.name != group_name(snapshot.name, number):
        return _beyond(snapshot, number)
    spent = not kept and (gang.scheduled is True or gang.min_count < least(snapshot.spec))
    return _beyond(snapshot, number) if spent or stopped else number


def _beyond(snapshot: Snapshot, number: int) -> int:
    """One more than every number that is still to be seen, so that a lost status costs no name."""
    names = {pod.scheduling_group for pod in snapshot.pods} | ({snapshot.gang.name} if snapshot.gang else set())
    prefix = group_name(snapshot.name, 0)[:-1]
    seen = [int(n.removeprefix(prefix)) for n in names if n.startswith(prefix) and n.removeprefix(prefix).isdecimal()]
    return max([number, *seen]) + 1


def _gang(
    snapshot: Snapshot, number: int, kept: tuple[MemberView, ...], missing: tuple[MemberView, ...]
) -> list[Action]:
    """The group that Pods come in, or the one that is there made no larger than the Pods it can have."""
    if not is_native(snapshot):
        return []
    name, gang = group_name(snapshot.name, number), snapshot.gang
    if gang is None or gang.name != name:
        leave: list[Action] = [DeleteGang(gang.name, gang.uid)] if gang is not None and not kept else []
        return [*leave, EnsureGang(name, min(len(missing), _lacking(snapshot, kept)))]
    joined = [m.pod for m in kept if m.pod is not None and m.pod.scheduling_group == name]
    placed = sum(pod.scheduled for pod in joined)
    waiting = len(joined) - placed + len(missing)
    size = placed or min(waiting, _lacking(snapshot, kept))
    return [EnsureGang(name, size)] if waiting and size < gang.min_count else []


def _lacking(snapshot: Snapshot, kept: tuple[MemberView, ...]) -> int:
    """Members that have to find a node together for the run to train, beside those that have one; at least 1."""
    placed = sum(m.pod is not None and m.pod.scheduled for m in kept)
    return max(1, least(snapshot.spec) - placed)


def _seats(
    snapshot: Snapshot, number: int, kept: tuple[MemberView, ...], missing: tuple[MemberView, ...]
) -> dict[int, Seat]:
    """Missing member to the group that it comes in."""
    name = group_name(snapshot.name, number)
    match snapshot.spec.scheduling.gang:
        case "Native":
            return {m.index: Seat(name, 0) for m in missing}
        case "Kueue":
            return seats(kept, snapshot.pods, missing, name)
        case "None":
            return {m.index: Seat("", 0) for m in missing}


def _declarations(snapshot: Snapshot, kept: tuple[MemberView, ...]) -> list[DeclareFailed]:
    """Deleted Pods on lost nodes, where they would hold the place of those that come for them."""
    if not is_queued(snapshot):
        return []
    stay = {m.pod.uid for m in kept if m.pod is not None}
    tolerations = snapshot.spec.workers.tolerations
    return [
        DeclareFailed(pod.name, pod.uid, f"{trouble}; attempts are fenced, so nothing it still does counts")
        for pod in snapshot.pods
        if pod.uid not in stay and pod.deleting and pod.node and pod.phase in ("Pending", "Running")
        and (trouble := node_trouble(pod.node, snapshot.nodes, tolerations)) is not None
    ]  # fmt: skip


def _creations(
    coming: tuple[MemberView, ...], where: dict[int, Seat], avoid: frozenset[str], shun: frozenset[str]
) -> list[CreatePod]:
    nodes, rather_not = tuple(sorted(avoid)), tuple(sorted(shun))
    return [
        CreatePod(m.index, m.last_incarnation + 1, where[m.index].group, nodes, where[m.index].size, rather_not)
        for m in coming
    ]


def silent_nodes(members: tuple[MemberView, ...]) -> frozenset[str]:
    """Nodes of lost members that are heard no more, until another Pod has come for them. Kubernetes calls a dead node
    Ready for 40 s still, and would place the next Pod there; but it may be well, and only its agent is not."""
    return frozenset(m.node for m in members if m.loss is not None and m.stale and m.node)


def lost_nodes(snapshot: Snapshot) -> tuple[str, ...]:
    """Nodes on which Pods of this run can't go on, as long as they are lost."""
    known = {pod.node for pod in snapshot.pods} | {node for pod in snapshot.pods for node in pod.avoided_nodes}
    known |= {lease.report.node for lease in snapshot.leases if lease.report is not None}
    return tuple(sorted(n for n in known if n in snapshot.nodes and _is_unfit(snapshot, n)))


def _is_unfit(snapshot: Snapshot, node: str) -> bool:
    """It is lost, or its devices are broken."""
    lost = node_trouble(node, snapshot.nodes, snapshot.spec.workers.tolerations)
    return lost is not None or device_trouble(node, snapshot.nodes) is not None


def _incarnations(
    members: tuple[MemberView, ...], coming: tuple[MemberView, ...], recorded: tuple[int, ...]
) -> tuple[int, ...]:
    """By member, also of those that the run has given up: no name is ever used again."""
    highest = [m.last_incarnation for m in members]
    for member in coming:
        highest[member.index] += 1
    return (*highest, *recorded[len(highest) :]) if any(i >= 0 for i in highest) else recorded
