"""Plan -> API calls: the status first, then the Events it is news of, then the actions in order.

Every call may already have been made by a pass that was cut off: what is there and ours is fine. What is there and
somebody else's is refused. What the server refuses is remembered for the next pass to tell (`Snapshot.problems`), and
ends this one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Sequence
from typing import Any

from starcoder_trainer.contract import names

from .adapters.clock import Clock
from .adapters.errors import AlreadyExists, ApiAbsent, Conflict, NotFound, Refused
from .adapters.events import Events
from .adapters.kinds import DISRUPTION_BUDGETS, PODS, ROLE_BINDINGS, RUNS, Manifest, kind_of
from .adapters.kube import Kube
from .adapters.memory import Memory, RunMemory
from .adapters.metrics import Metrics
from .api.v1alpha1 import Condition, StarCoderRunStatus
from .build import assignment, lease, pdb, rbac
from .build.containers import Image
from .build.owner import Owner
from .build.patch import PatchError
from .build.pod import pod
from .domain import reasons
from .domain.elasticity import members_ever
from .domain.goodput import without_time
from .domain.plan import (
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
from .domain.recovery import completed
from .domain.snapshot import Snapshot
from .domain.timestamps import whole_seconds
from .gang import Group, gang_of
from .observe import covers, is_owned, is_right, read_status
from .settings import Settings

log = logging.getLogger(__name__)

PROGRESS = frozenset(
    {"iteration", "progress", "consumedTokens", "loss", "tokensPerSecond", "tokensPerSecondPerGPU", "eta"}
)
"""Fields of the status that change with every iteration; alone they are written at most every few seconds."""

TELL_AT_ONCE = 0.05
"""Seconds until the pass that tells of something newly refused."""

WHAT = {
    EnsureAccess: "create access",
    EnsureLeases: "create lease",
    EnsureGang: "create gang",
    CreatePod: "create pod",
    DeletePod: "delete pod",
    DeclareFailed: "declare pod failed",
    EnsureDisruptionBudget: "write disruption budget",
    DeleteGang: "delete gang",
    WriteAssignment: "write assignment",
}
"""Key in `Snapshot.problems` of what each action was refused."""

CREATES = (EnsureAccess, EnsureLeases, EnsureGang, CreatePod)
"""Actions for a Pod that is to come."""


class Actor:
    def __init__(
        self, *, kube: Kube, events: Events, clock: Clock, memory: Memory, settings: Settings, metrics: Metrics
    ) -> None:
        self._kube = kube
        self._events = events
        self._clock = clock
        self._memory = memory
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, snapshot: Snapshot, plan: Plan) -> float | None:
        """Seconds until the next pass; None: only on a change.

        Raises:
            Conflict: somebody wrote meanwhile; the snapshot is old.
            Refused: what was refused the last time was refused again.
            Unavailable: no answer.
        """
        memory = self._memory.of((snapshot.namespace, snapshot.name), snapshot.uid)
        later = [plan.look_again, await self._write_status(snapshot, plan.status, memory)]
        for event in plan.actions:
            if isinstance(event, EmitEvent):
                await self._events.emit(
                    snapshot.namespace,
                    snapshot.name,
                    snapshot.uid,
                    kind=event.kind,
                    reason=event.reason,
                    message=event.message,
                )
        actions = [action for action in plan.actions if not isinstance(action, EmitEvent)]
        self._forget_problems(actions, memory)
        doing = ""
        try:
            for action_type, batch in itertools.groupby(actions, key=type):
                if issubclass(action_type, CREATES):
                    doing = WHAT[CreatePod]
                    await self._try_pod(snapshot, actions, memory)
                doing = WHAT[action_type]
                await self._together([self._do(snapshot, action, memory) for action in batch])
                memory.problems.pop(doing, None)
        except (Refused, ApiAbsent) as e:
            if memory.problems.get(doing) == e.message:
                raise
            log.warning("%s: refused: %s", doing, e.message, extra=_where(snapshot))
            memory.problems[doing] = e.message
            later.append(TELL_AT_ONCE)
        return min((seconds for seconds in later if seconds is not None), default=None)

    def _forget_problems(self, actions: Sequence[Action], memory: RunMemory) -> None:
        """What is not to be done any more can't be a problem any more."""
        wanted = {WHAT[type(action)] for action in actions} | ({WHAT[CreatePod]} if _creates(actions) else set())
        for what in memory.problems.keys() - wanted:
            del memory.problems[what]

    async def refuse(self, run: Manifest, problem: str) -> None:
        """Says in the status that the run can't be read, and does nothing else with it."""
        meta, before = run["metadata"], read_status(run)
        condition = before.condition("Accepted")
        if condition is None or condition.status != "False":
            since = whole_seconds(self._clock.now())
        else:
            since = condition.last_transition_time
        message = f"{problem}; the object was stored under another version of the CRD: apply it anew"
        accepted = Condition(
            type="Accepted",
            status="False",
            reason=reasons.INVALID_SPEC,
            message=message,
            last_transition_time=since,
            observed_generation=meta.get("generation"),
        )
        others = tuple(c for c in before.conditions if c.type != "Accepted")
        status = before.model_copy(
            update={"reason": reasons.INVALID_SPEC, "message": message, "conditions": (accepted, *others)}
        )
        if status != before:
            await self._apply(run["metadata"], status)

    async def _write_status(self, snapshot: Snapshot, status: StarCoderRunStatus, memory: RunMemory) -> float | None:
        """Writes what differs; seconds to wait where mere progress has to."""
        # What time alone changes is derived anew by the next pass, from what was written last: it goes with other news.
        before, after = without_time(snapshot.status), without_time(status)
        differs = {field for field in before.keys() | after.keys() if before.get(field) != after.get(field)}
        if not differs:
            return None
        if differs <= PROGRESS:
            interval = self._settings.status_interval_of(snapshot.spec.workers.replicas)
            wait = memory.progress_written + interval - self._clock.monotonic()
            if wait > 0:
                return wait
        await self._apply(
            {
                "namespace": snapshot.namespace,
                "name": snapshot.name,
                "uid": snapshot.uid,
                "resourceVersion": snapshot.resource_version,
            },
            status,
        )
        memory.progress_written = self._clock.monotonic()
        recovered = completed(snapshot.status, status)
        self._metrics.of_runs.recovered((snapshot.namespace, snapshot.name), recovered)
        return None

    async def _apply(self, meta: Manifest, status: StarCoderRunStatus) -> None:
        preconditions = ("namespace", "name", "uid", "resourceVersion")
        manifest = {
            "apiVersion": RUNS.api_version,
            "kind": RUNS.kind,
            "metadata": {field: meta[field] for field in preconditions},
            "status": status.to_dict(),
        }
        await self._kube.apply_status(RUNS, manifest)

    async def _try_pod(self, snapshot: Snapshot, actions: Sequence[Action], memory: RunMemory) -> None:
        """Has the server judge a Pod of this spec before anything of the run is created; once a generation. What goes
        before does not wait for it: a quota may have no room until a lost Pod is deleted."""
        if memory.dry_run == snapshot.generation:
            return
        first = next((a for a in actions if isinstance(a, CreatePod)), CreatePod(member=0, incarnation=0, gang=""))
        manifest = self._pod(snapshot, first)
        manifest["metadata"]["name"] = f"{snapshot.name}-dry-run"
        if manifest["spec"].get("serviceAccountName") == names.service_account_name(snapshot.name):
            # not created yet, and the server looks for it
            manifest["spec"]["serviceAccountName"] = "default"
        await self._kube.create(manifest, dry_run=True)
        memory.dry_run = snapshot.generation

    async def _do(self, snapshot: Snapshot, action: Action, memory: RunMemory) -> None:
        self._metrics.actions.labels(type(action).__name__).inc()
        match action:
            case EnsureAccess():
                leases = members_ever(snapshot.spec, snapshot.status)
                for manifest in rbac.access(snapshot.namespace, snapshot.name, snapshot.uid, snapshot.spec, leases):
                    await self._ensure_access(manifest, snapshot.uid)
                memory.access = (snapshot.generation, self._clock.monotonic())
            case EnsureLeases(members):
                owner = _owner(snapshot)
                await self._together([self._ensure(lease.lease(owner, m), snapshot.uid) for m in members])
            case EnsureGang():
                await self._ensure_gang(snapshot, _group(snapshot), action)
            case CreatePod():
                log.info("creating Pod", extra=_where(snapshot) | {"member": action.member})
                await self._ensure(self._pod(snapshot, action), snapshot.uid)
            case DeletePod(name, uid, why):
                log.info("deleting Pod: %s", why, extra=_where(snapshot) | {"pod": name})
                await self._gone(self._kube.delete(PODS, snapshot.namespace, name, uid=uid))
            case DeclareFailed(name, uid, why):
                log.info("declaring Pod Failed: %s", why, extra=_where(snapshot) | {"pod": name})
                status = {"phase": "Failed", "reason": "NodeLost", "message": why}
                patch = {"metadata": {"uid": uid}, "status": status}
                await self._gone(self._kube.merge_patch(PODS, snapshot.namespace, name, patch, subresource="status"))
            case DeleteGang(name, uid):
                await self._gone(self._kube.delete(_group(snapshot).kind, snapshot.namespace, name, uid=uid))
            case EnsureDisruptionBudget(min_available):
                await self._ensure_budget(snapshot, min_available)
                memory.budget = (min_available, self._clock.monotonic())
            case WriteAssignment():
                await self._write_assignment(snapshot, action)
            case EmitEvent():
                pass  # told already, beside the status

    async def _ensure(self, manifest: Manifest, uid: str) -> Manifest | None:
        """Creates it. None where it was created now, else as it is there and ours.

        Raises:
            Refused: another owner has an object of that name.
        """
        try:
            await self._kube.create(manifest)
            return None
        except AlreadyExists:
            there = await self._get(manifest)
        if is_owned(there, uid):
            return there
        meta = there["metadata"]
        owner = next((f"{o['kind']} {o['name']} ({o['uid']})" for o in meta.get("ownerReferences") or []), "nobody")
        leaving = ", and is being deleted" if "deletionTimestamp" in meta else ""
        raise Refused(
            f"{manifest['kind']} {meta['name']} is there already and belongs to {owner}{leaving}; expected none or one "
            "of this run; the run goes on when it is gone",
            code=409,
            reason="AlreadyExists",
        )

    async def _get(self, manifest: Manifest) -> Manifest:
        meta = manifest["metadata"]
        try:
            return await self._kube.get(kind_of(manifest), meta["namespace"], meta["name"])
        except NotFound as e:
            raise Conflict(f"{manifest['kind']} {meta['name']} went away while it was looked at") from e

    async def _ensure_access(self, manifest: Manifest, uid: str) -> None:
        there = await self._ensure(manifest, uid)
        if there is None or is_right(there, manifest):
            return
        if kind_of(manifest) is ROLE_BINDINGS and not covers(there, {"roleRef": manifest["roleRef"]}):
            meta = there["metadata"]
            await self._kube.delete(ROLE_BINDINGS, meta["namespace"], meta["name"], uid=meta["uid"])
            await self._kube.create(manifest)
        else:
            merged = manifest | {"metadata": there["metadata"] | manifest["metadata"]}
            await self._kube.replace(merged)

    async def _ensure_gang(self, snapshot: Snapshot, group: Group, action: EnsureGang) -> None:
        manifest = group.manifest(_owner(snapshot), snapshot.spec, action.name, action.min_count)
        there = await self._ensure(manifest, snapshot.uid)
        if there is None:
            return
        size = group.resized(action.min_count)
        if not covers(there, size):
            patch = {"metadata": {"uid": there["metadata"]["uid"]}, **size}
            await self._kube.merge_patch(group.kind, snapshot.namespace, action.name, patch)

    async def _ensure_budget(self, snapshot: Snapshot, min_available: int) -> None:
        manifest = pdb.disruption_budget(_owner(snapshot), min_available)
        there = await self._ensure(manifest, snapshot.uid)
        if there is None or covers(there, {"spec": manifest["spec"]}):
            return
        patch = {"metadata": {"uid": there["metadata"]["uid"]}, "spec": manifest["spec"]}
        await self._kube.merge_patch(DISRUPTION_BUDGETS, snapshot.namespace, snapshot.name, patch)

    async def _write_assignment(self, snapshot: Snapshot, action: WriteAssignment) -> None:
        manifest = assignment.config_map(_owner(snapshot), action.assignment, action.config_json)
        if action.resource_version:
            manifest["metadata"]["resourceVersion"] = action.resource_version
            await self._kube.replace(manifest)
        elif await self._ensure(manifest, snapshot.uid) is not None:
            raise Conflict("the assignment was written meanwhile")

    def _pod(self, snapshot: Snapshot, action: CreatePod) -> Manifest:
        """Raises Refused where the spec makes no Pod."""
        try:
            return pod(
                _owner(snapshot),
                snapshot.spec,
                self._image(snapshot),
                member=action.member,
                incarnation=action.incarnation,
                avoid_nodes=action.avoid_nodes,
                shun_nodes=action.shun_nodes,
                gang=_membership(snapshot, action),
                rhythm=self._settings.rhythm,
            )
        except PatchError as e:
            raise Refused(str(e)) from e

    def _image(self, snapshot: Snapshot) -> Image:
        workers = snapshot.spec.workers
        if workers.image:
            return Image(workers.image, workers.image_pull_policy or "")
        if not self._settings.trainer_image:
            raise Refused(
                "spec.workers.image: not set, and the operator has no default; name an image there, or set the "
                "operator's trainer-image (chart value trainerImage)"
            )
        policy = workers.image_pull_policy or self._settings.trainer_image_pull_policy
        return Image(self._settings.trainer_image, policy)

    async def _gone(self, deletion: Awaitable[Any]) -> None:
        """Deleted now, before, or replaced by an object of another uid: all the same."""
        try:
            await deletion
        except ApiAbsent:
            raise
        except (NotFound, Conflict):
            pass

    async def _together(self, calls: Sequence[Awaitable[Any]]) -> None:
        """All at once, as far as the client lets them; then the first failure, if any."""
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result


def _where(snapshot: Snapshot) -> dict[str, str]:
    return {"namespace": snapshot.namespace, "run": snapshot.name}


def _creates(actions: Sequence[Action]) -> bool:
    return any(isinstance(a, CREATES) for a in actions)


def _owner(snapshot: Snapshot) -> Owner:
    return Owner(snapshot.namespace, snapshot.name, snapshot.uid)


def _membership(snapshot: Snapshot, action: CreatePod) -> Manifest | None:
    if not action.gang:
        return None
    gang = gang_of(snapshot.spec)
    return gang.joined(snapshot.spec, action.gang, size=action.gang_size, member=action.member)


def _group(snapshot: Snapshot) -> Group:
    group = gang_of(snapshot.spec).group
    assert group is not None, f"scheduling.gang {snapshot.spec.scheduling.gang} has no object to act on"
    return group
