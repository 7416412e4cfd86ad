"""Kubernetes -> Snapshot: all that one decision needs, read anew, or an exception. Never a guess.

What can't be read at all is Unknown: the `KubeError` of the read ends the pass, the queue tries again. What can be read
and makes no sense (a report that is no JSON, a Pod of somebody else under our label) is logged and left out.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from starcoder_trainer.contract import names
from starcoder_trainer.contract.assignment import Assignment
from starcoder_trainer.contract.codec import ContractError
from starcoder_trainer.contract.report import Report

from .adapters.clock import Clock
from .adapters.errors import ApiAbsent, NotFound
from .adapters.kinds import (
    CONFIG_MAPS,
    DISRUPTION_BUDGETS,
    LEASES,
    NODES,
    PODS,
    RUNS,
    Kind,
    Manifest,
    kind_of,
)
from .adapters.kube import Kube
from .adapters.memory import Memory, RunMemory
from .adapters.nodes import NodeCache
from .adapters.sightings import Sightings, agents_of, lease_sighting, renewed
from .api.v1alpha1 import StarCoderRunSpec, StarCoderRunStatus
from .build import rbac
from .build.volumes import CREDENTIALS
from .domain.elasticity import members_ever
from .domain.pod_template import ANNOTATION_AVOIDS, ANNOTATION_TEMPLATE
from .domain.snapshot import (
    AssignmentView,
    ContainerView,
    GangView,
    LeaseView,
    NodeView,
    PodView,
    Snapshot,
)
from .domain.timestamps import whole_seconds
from .gang import Gang, gang_of

log = logging.getLogger(__name__)

ACCESS_SEEN_FOR = 300.0
"""Seconds for which ServiceAccount, Role and RoleBinding are taken to be as they were seen."""


class Unreadable(Exception):
    """The run's spec as stored is none we know: made under another version of the CRD."""

    def __init__(self, run: Manifest, problem: str) -> None:
        super().__init__(problem)
        self.run = run


def is_owned(thing: Manifest, uid: str) -> bool:
    """Whether the run of that uid is the object's controller or another of its owners."""
    return any(o.get("uid") == uid for o in thing["metadata"].get("ownerReferences") or [])


class Observer:
    def __init__(self, kube: Kube, clock: Clock, sightings: Sightings, nodes: NodeCache, memory: Memory) -> None:
        self._kube = kube
        self._clock = clock
        self._sightings = sightings
        self._nodes = nodes
        self._memory = memory

    async def __call__(self, namespace: str, name: str) -> Snapshot:
        """The run and all that is its.

        Raises:
            NotFound: there is no such run (any more).
            Unreadable: its spec can't be understood.
            KubeError: something could not be read, so nothing is known.
        """
        key = (namespace, name)
        run = await self._kube.get(RUNS, namespace, name)
        meta = run["metadata"]
        uid, generation = meta["uid"], meta.get("generation", 0)
        memory = self._memory.of(key, uid)
        try:
            spec = StarCoderRunSpec.model_validate(run.get("spec") or {})
        except ValidationError as e:
            first = e.errors(include_url=False)[0]
            raise Unreadable(run, f"spec.{'.'.join(map(str, first['loc']))}: {first['msg']}") from e
        status = read_status(run)
        pods, leases, assignment, (gang, gang_api), budget, access = await _together(
            self._owned(PODS, namespace, name, memory),
            self._owned(LEASES, namespace, name, memory),
            self._assignment(namespace, name, memory),
            self._gang(spec, namespace, name, memory),
            self._budget(namespace, name, memory),
            self._access(rbac.access(namespace, name, uid, spec, members_ever(spec, status)), generation, memory),
        )
        gang_kind, instant = gang_of(spec), self._clock.now()
        pod_views = tuple(pod for each in pods if (pod := self._pod(each, gang_kind, memory)) is not None)
        own_views = [view for each in leases if (view := self._lease(each, memory)) is not None]
        lease_views = tuple(self._heard(view, assignment) for view in own_views)
        return Snapshot(
            namespace=namespace,
            name=name,
            uid=uid,
            generation=generation,
            resource_version=meta["resourceVersion"],
            deleting="deletionTimestamp" in meta,
            created_at=meta.get("creationTimestamp", ""),
            spec=spec,
            status=status,
            pods=pod_views,
            leases=lease_views,
            nodes_complete=self._nodes.complete,
            nodes=await self._nodes_of(pod_views, lease_views, status),
            gang=gang,
            gang_api=gang_api,
            assignment=assignment,
            budget=budget,
            rbac_present=access,
            now=whole_seconds(instant),
            instant=instant,
            clock=self._clock.monotonic(),
            problems=dict(memory.problems),
            heard_for=self._sightings.heard_for(agents_of(namespace, name)),
        )

    async def _owned(self, kind: Kind, namespace: str, run: str, memory: RunMemory) -> list[Manifest]:
        """Objects under the run's label that are the run's."""
        found = await self._kube.list(kind, namespace, f"{names.LABEL_RUN}={run}")
        return [thing for thing in found if self._ours(kind, thing, memory)]

    def _ours(self, kind: Kind, thing: Manifest, memory: RunMemory) -> bool:
        if is_owned(thing, memory.uid):
            return True
        meta = thing["metadata"]
        _warn_once(memory, meta["uid"], f"{kind.kind} {meta['name']} has the run's label and another owner: left alone")
        return False

    def _pod(self, pod: Manifest, gang: Gang, memory: RunMemory) -> PodView | None:
        meta = pod["metadata"]
        age = self._sightings.age(f"pod/{meta['uid']}")
        try:
            view = pod_view(pod, gang, age)
        except (KeyError, ValueError):
            _warn_once(memory, meta["uid"], f"Pod {meta['name']} lacks the labels of a member: left alone")
            return None
        view = replace(view, agent_changed=self._agent_changed(view))
        look = " ".join(f"{c.name} {c.ready} {c.restarts}" for c in view.containers)
        view = replace(view, containers_for=self._sightings.age(f"pod/{meta['uid']}/containers", look))
        if view.scheduled:
            view = replace(view, scheduled_for=self._sightings.age(f"pod/{meta['uid']}/scheduled"))
        return replace(view, deleting_for=self._sightings.age(f"pod/{meta['uid']}/deleting")) if view.deleting else view

    def _agent_changed(self, pod: PodView) -> float | None:
        agent = next((c for c in pod.containers if c.name == names.CONTAINER_AGENT), None)
        if agent is None:
            return None
        key = f"pod/{pod.uid}/agent"
        age = self._sightings.age(key, f"{agent.restarts} {agent.ready}")
        return age if self._sightings.witnessed(key) else None

    def _lease(self, lease: Manifest, memory: RunMemory) -> LeaseView | None:
        meta = lease["metadata"]
        text = (meta.get("annotations") or {}).get(names.ANNOTATION_REPORT, "")
        report = None
        try:
            member = int(meta["labels"][names.LABEL_MEMBER])
            report = Report.from_json(text) if text else None
        except ContractError as e:
            _warn_once(memory, f"{meta['uid']} {text}", f"the report in Lease {meta['name']} can't be read: {e}")
        except (KeyError, ValueError):
            _warn_once(memory, meta["uid"], f"Lease {meta['name']} lacks the labels of a member: left alone")
            return None
        agents, (key, look) = agents_of(meta["namespace"], meta["labels"][names.LABEL_RUN]), lease_sighting(lease)
        age = self._sightings.speaks(agents, key, look)
        problem = report.problem.reason if report is not None and report.problem is not None else ""
        troubled_for = self._sightings.age(f"lease/{meta['uid']}/problem", problem)
        if report is not None:
            self._sightings.relay(report.boot_id, renewed(lease), report.suspects)
        return LeaseView(
            member=member,
            name=meta["name"],
            resource_version=meta["resourceVersion"],
            report=report,
            age=age,
            renewed=age,
            troubled_for=troubled_for if problem else 0.0,
            witnessed=self._sightings.witnessed(key),
        )

    def _heard(self, lease: LeaseView, assignment: AssignmentView | None) -> LeaseView:
        """With its age where a relay speaks for the agent. What one that is gone has said still counts."""
        relay = lease.report.relayed_by if lease.report is not None else ""
        age = self._sightings.age_by(relay, lease.member) if relay else None
        at_work = assignment.assignment.relay if assignment is not None else None
        unheard = self._sightings.age_by(at_work.boot_id, lease.member) if at_work is not None else None
        return replace(lease, age=lease.age if age is None else min(lease.age, age), unheard=unheard or 0.0)

    async def _assignment(self, namespace: str, run: str, memory: RunMemory) -> AssignmentView | None:
        try:
            found = await self._kube.get(CONFIG_MAPS, namespace, names.assignment_name(run))
        except ApiAbsent:
            raise
        except NotFound:
            return None
        if not self._ours(CONFIG_MAPS, found, memory):
            return None
        data = found.get("data") or {}
        try:
            assignment = Assignment.from_json(data.get(names.ASSIGNMENT_KEY, ""))
        except ContractError as e:
            _warn_once(memory, found["metadata"]["resourceVersion"], f"the assignment can't be read: {e}")
            return None
        meta = found["metadata"]
        age = self._sightings.age(f"assignment/{meta['uid']}", f"{assignment.attempt} {assignment.phase}")
        return AssignmentView(meta["resourceVersion"], assignment, data.get(names.CONFIG_KEY, ""), age)

    async def _gang(
        self, spec: StarCoderRunSpec, namespace: str, run: str, memory: RunMemory
    ) -> tuple[GangView | None, bool]:
        """(newest group that is not on its way out, whether the server has such things)."""
        group = gang_of(spec).group
        if group is None:
            return None, True
        try:
            found = await self._owned(group.kind, namespace, run, memory)
        except ApiAbsent:
            return None, False
        # A finalizer holds one that was deleted until its Pods have ended; none may join it any more.
        groups = [g for g in found if "deletionTimestamp" not in g["metadata"]]
        return (group.view(max(groups, key=_placement)) if groups else None), True

    async def _budget(self, namespace: str, run: str, memory: RunMemory) -> int | None:
        """minAvailable of the run's own budget. As of access, a look holds for a while."""
        now = self._clock.monotonic()
        if memory.budget is not None and now - memory.budget[1] < ACCESS_SEEN_FOR:
            return memory.budget[0]
        found: int | None = None
        try:
            there = await self._kube.get(DISRUPTION_BUDGETS, namespace, run)
            if is_owned(there, memory.uid):
                found = int((there.get("spec") or {}).get("minAvailable") or 0)
        except ApiAbsent:
            raise
        except (NotFound, ValueError):
            pass
        memory.budget = (found, now)
        return found

    async def _access(self, wanted: tuple[Manifest, ...], generation: int, memory: RunMemory) -> bool:
        """Whether the agents' rights are there. They are seldom touched, so a look holds for a while."""
        now = self._clock.monotonic()
        if memory.access is not None:
            seen_generation, at = memory.access
            if seen_generation == generation and now - at < ACCESS_SEEN_FOR:
                return True
        places = [(kind_of(w), w["metadata"]["namespace"], w["metadata"]["name"]) for w in wanted]
        try:
            found = await _together(*(self._kube.get(*place) for place in places))
        except ApiAbsent:
            raise
        except NotFound:
            return False
        pairs = zip(found, wanted, strict=True)
        if not all(is_owned(there, memory.uid) and is_right(there, want) for there, want in pairs):
            return False
        memory.access = (generation, now)
        return True

    async def _nodes_of(
        self, pods: tuple[PodView, ...], leases: tuple[LeaseView, ...], status: StarCoderRunStatus
    ) -> dict[str, NodeView]:
        """All that the watch has shown, and those that matter to the run and it has not."""
        wanted = {pod.node for pod in pods} | {node for pod in pods for node in pod.avoided_nodes}
        wanted |= {lease.report.node for lease in leases if lease.report is not None}
        wanted |= {entry.node for entry in status.avoided_nodes}
        views = self._nodes.all()
        unknown = sorted(wanted - views.keys() - {""})
        asked = await _together(*(self._node(name) for name in unknown))
        return views | {view.name: view for view in asked if view is not None}

    async def _node(self, name: str) -> NodeView | None:
        try:
            return self._nodes.view(await self._kube.get(NODES, "", name))
        except ApiAbsent:
            raise
        except NotFound:
            return None


async def _together(*reads: Awaitable[Any]) -> list[Any]:
    """All results; where one fails, its exception after the others have ended too."""
    results = await asyncio.gather(*reads, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _warn_once(memory: RunMemory, what: str, sentence: str) -> None:
    if what not in memory.warned:
        memory.warned.add(what)
        log.warning(sentence, extra={"run_uid": memory.uid})


def covers(there: Any, wanted: Any) -> bool:
    """Whether all of `wanted` is in `there`, which may have more fields (defaults, what the server adds)."""
    if isinstance(wanted, dict):
        return isinstance(there, dict) and all(covers(there.get(k), v) for k, v in wanted.items())
    return bool(there == wanted)


def is_right(there: Manifest, wanted: Manifest) -> bool:
    """Whether an object grants what it is to grant; labels are people's business."""
    return covers(there, {part: value for part, value in wanted.items() if part != "metadata"})


def read_status(run: Manifest) -> StarCoderRunStatus:
    """The status as last written. One that can't be read counts as none: its owner is this operator alone."""
    try:
        return StarCoderRunStatus.model_validate(run.get("status") or {})
    except ValidationError as e:
        log.warning("status of %s can't be read and starts anew: %s", run["metadata"]["name"], e)
        return StarCoderRunStatus()


def _placement(group: Manifest) -> tuple[str, int, str]:
    """Order of groups in time; those of one second by the number at their name's end."""
    name = group["metadata"]["name"]
    number = re.search(r"(\d+)$", name)
    return group["metadata"].get("creationTimestamp", ""), int(number[1]) if number else -1, name


def _condition(thing: Manifest, kind: str) -> Manifest:
    conditions = (thing.get("status") or {}).get("conditions") or []
    return next((c for c in conditions if c.get("type") == kind), {})


def pod_view(pod: Manifest, gang: Gang, age: float) -> PodView:
    """Raises KeyError or ValueError where the labels of a member are missing or no numbers."""
    meta, spec, status = pod["metadata"], pod.get("spec") or {}, pod.get("status") or {}
    annotations = meta.get("annotations") or {}
    scheduled = _condition(pod, "PodScheduled")
    disruption = _condition(pod, "DisruptionTarget") or _condition(pod, "TerminationTarget")  # the latter is Kueue's
    gated, volumes = bool(spec.get("schedulingGates")), spec.get("volumes") or []
    node = spec.get("nodeName", "")
    return PodView(
        name=meta["name"],
        uid=meta["uid"],
        resource_version=meta["resourceVersion"],
        member=int(meta["labels"][names.LABEL_MEMBER]),
        incarnation=int(meta["labels"][names.LABEL_INCARNATION]),
        phase=status.get("phase", "Pending"),
        node=node,
        deleting="deletionTimestamp" in meta,
        scheduled=bool(node),
        unschedulable_message=scheduled.get("message", "") if scheduled.get("status") == "False" and not gated else "",
        ready=_condition(pod, "Ready").get("status") == "True",
        ip=status.get("podIP", ""),
        disruption=disruption.get("reason", "") if disruption.get("status") == "True" else "",
        scheduling_group=gang.membership(pod),
        group_size=gang.size(pod),
        gated=gated,
        containers=tuple(
            container_view(c)
            for c in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
        ),
        age=age,
        grace=float(meta.get("deletionGracePeriodSeconds") or 0),
        priority_class=spec.get("priorityClassName", ""),
        avoided_nodes=tuple(n for n in annotations.get(ANNOTATION_AVOIDS, "").split(",") if n),
        template=annotations.get(ANNOTATION_TEMPLATE, ""),
        credentials_secret=next((v["secret"]["secretName"] for v in volumes if v.get("name") == CREDENTIALS), None),
        why=": ".join(status[key] for key in ("reason", "message") if status.get(key)),
    )


def container_view(status: Manifest) -> ContainerView:
    state, last = status.get("state") or {}, status.get("lastState") or {}
    waiting = state.get("waiting") or {}
    ended = state.get("terminated") or last.get("terminated") or {}
    return ContainerView(
        name=status["name"],
        ready=bool(status.get("ready")),
        restarts=int(status.get("restartCount") or 0),
        waiting_reason=waiting.get("reason", ""),
        waiting_message=waiting.get("message", ""),
        terminated_reason=ended.get("reason", ""),
        exit_code=ended.get("exitCode"),
    )
