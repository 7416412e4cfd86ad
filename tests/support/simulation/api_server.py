"""Kubernetes' API in memory: objects with uid and resourceVersion, preconditions, server-side apply of a status.

Objects are never changed in place, so readers may hold on to them. Errors are those of the operator's client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from starcoder_operator.adapters.errors import AlreadyExists, Conflict, NotFound, Refused
from starcoder_operator.adapters.kinds import POD_GROUPS, PODS, RUNS, SERVICE_ACCOUNTS, Kind, Manifest, kind_of

ENDED = ("Succeeded", "Failed")
GRACE = 30.0
"""Seconds until a Pod that is asked to end is killed; 300 by default."""


@dataclass(frozen=True)
class Change:
    type: Literal["ADDED", "MODIFIED", "DELETED"]
    kind: Kind
    thing: Manifest
    """As it is now; of a deletion as it was."""
    before: Manifest | None
    by: str
    """Who wrote: `operator-1`, `kubelet node-0`, …"""


class ApiServer:
    """Synchronous: what happens between client and server is the clients' affair (`clients`).

    Args:
        now: virtual seconds.
        timestamp: RFC 3339 of the server's wall clock.
    """

    def __init__(self, now: Callable[[], float], timestamp: Callable[[], str]) -> None:
        self._now, self._timestamp = now, timestamp
        self._things: dict[str, dict[tuple[str, str], Manifest]] = {}
        self._version = 0
        self._uids = 0
        self._history: list[tuple[float, str, tuple[str, str], Manifest | None]] = []
        self.watchers: list[Callable[[Change], None]] = []
        """Called with each change, in order, as it is made."""

    # Reading

    def get(self, kind: Kind, namespace: str, name: str) -> Manifest:
        thing = self._of(kind).get((namespace, name))
        if thing is None:
            raise NotFound(f'{kind} "{name}" not found', code=404)
        return thing

    def find(self, kind: Kind, namespace: str, name: str) -> Manifest | None:
        return self._of(kind).get((namespace, name))

    def list(self, kind: Kind, namespace: str = "", labels: str = "") -> list[Manifest]:
        return list(_selected(self._of(kind), namespace, labels))

    def as_of(self, seconds_ago: float, kind: Kind) -> dict[tuple[str, str], Manifest]:
        """All objects of a kind as they were."""
        then = self._now() - seconds_ago
        found: dict[tuple[str, str], Manifest] = {}
        for at, plural, key, thing in self._history:
            if at > then:
                break
            if plural == kind.plural:
                if thing is None:
                    found.pop(key, None)
                else:
                    found[key] = thing
        return found

    # Writing

    def create(self, manifest: Manifest, by: str, *, dry_run: bool = False, kind: Kind | None = None) -> Manifest:
        kind = kind or kind_of(manifest)
        meta = manifest["metadata"]
        key = (meta.get("namespace", ""), meta["name"])
        if key in self._of(kind):
            raise AlreadyExists(f'{kind} "{meta["name"]}" already exists', code=409, reason="AlreadyExists")
        if kind is PODS:
            account = manifest["spec"].get("serviceAccountName", "default")
            if account != "default" and (key[0], account) not in self._of(SERVICE_ACCOUNTS):
                raise Refused(f'pods "{meta["name"]}" is forbidden: serviceaccount "{account}" not found', code=403)
        self._uids += 1
        made = meta | {"uid": f"uid-{self._uids}-{meta['name']}", "creationTimestamp": self._timestamp()}
        if kind is RUNS:
            made["generation"] = 1
        thing = manifest | {"metadata": made}
        if kind is PODS:
            thing["status"] = {"phase": "Pending"}
        return thing if dry_run else self._store(kind, key, thing, None, by)

    def replace(self, manifest: Manifest, by: str) -> Manifest:
        """PUT: `metadata.resourceVersion` is a precondition."""
        kind, meta = kind_of(manifest), manifest["metadata"]
        there = self._met(kind, meta.get("namespace", ""), meta["name"], meta)
        kept = {f: there["metadata"][f] for f in ("uid", "creationTimestamp", "resourceVersion")}
        return self._changed(kind, there, manifest | {"metadata": meta | kept}, by)

    def merge_patch(self, kind: Kind, namespace: str, name: str, patch: Manifest, by: str) -> Manifest:
        """RFC 7386; `metadata.uid` and `.resourceVersion` are preconditions."""
        there = self._met(kind, namespace, name, patch.get("metadata") or {})
        new = _merged(there, patch)
        new["metadata"] = new["metadata"] | {"resourceVersion": there["metadata"]["resourceVersion"]}
        if kind is RUNS and new.get("spec") != there.get("spec"):
            new["metadata"]["generation"] = there["metadata"]["generation"] + 1
        return self._changed(kind, there, new, by)

    def apply_status(self, kind: Kind, manifest: Manifest, by: str) -> Manifest:
        """Server-side apply by the only manager of the status: what it does not name any more goes."""
        meta = manifest["metadata"]
        there = self._met(kind, meta["namespace"], meta["name"], meta)
        return self._changed(kind, there, there | {"status": manifest["status"]}, by)

    def set_status(self, kind: Kind, there: Manifest, status: Manifest, by: str, **spec: Any) -> Manifest:
        """What kubelets, scheduler and controllers write, on top of what is there now."""
        new = there | {"status": status} | ({"spec": there["spec"] | spec} if spec else {})
        return self._changed(kind, there, new, by)

    def delete(self, kind: Kind, namespace: str, name: str, by: str, *, uid: str | None = None) -> None:
        """A Pod on a node waits for its kubelet, a PodGroup for its Pods; all else is gone at once."""
        there = self._met(kind, namespace, name, {"uid": uid} if uid else {})
        waits = (
            bool(there["spec"].get("nodeName")) and there["status"]["phase"] not in ENDED
            if kind is PODS
            else kind is POD_GROUPS and any(True for _ in self.members(there))
        )
        if not waits:
            self.remove(kind, there, by)
        elif "deletionTimestamp" not in there["metadata"]:
            meta = there["metadata"] | {"deletionTimestamp": self._timestamp()}
            meta |= {"deletionGracePeriodSeconds": int(GRACE)} if kind is PODS else {}
            self._changed(kind, there, there | {"metadata": meta}, by)

    def remove(self, kind: Kind, thing: Manifest, by: str) -> None:
        """Gone, whatever held it."""
        meta = thing["metadata"]
        key = (meta.get("namespace", ""), meta["name"])
        there = self._of(kind).get(key)
        if there is None or there["metadata"]["uid"] != meta["uid"]:
            return
        del self._of(kind)[key]
        self._version += 1
        self._history.append((self._now(), kind.plural, key, None))
        self._tell(Change("DELETED", kind, there, there, by))

    def members(self, group: Manifest) -> Iterator[Manifest]:
        """Pods of a PodGroup that have not ended."""
        name = group["metadata"]["name"]
        for pod in self.list(PODS, group["metadata"]["namespace"]):
            if pod["status"]["phase"] not in ENDED and group_of(pod) == name:
                yield pod

    def _of(self, kind: Kind) -> dict[tuple[str, str], Manifest]:
        return self._things.setdefault(kind.plural, {})

    def _met(self, kind: Kind, namespace: str, name: str, conditions: Manifest) -> Manifest:
        there = self.get(kind, namespace, name)
        for field in ("uid", "resourceVersion"):
            wanted = conditions.get(field)
            if wanted is not None and wanted != there["metadata"][field]:
                raise Conflict(f'{kind} "{name}": the {field} has changed; read it again', code=409, reason="Conflict")
        return there

    def _changed(self, kind: Kind, there: Manifest, new: Manifest, by: str) -> Manifest:
        if new == there:
            return there
        meta = there["metadata"]
        key = (meta.get("namespace", ""), meta["name"])
        if self._of(kind).get(key) is not there:
            there = self.get(kind, *key)
        return self._store(kind, key, new, there, by)

    def _store(self, kind: Kind, key: tuple[str, str], new: Manifest, before: Manifest | None, by: str) -> Manifest:
        self._version += 1
        new = new | {"metadata": new["metadata"] | {"resourceVersion": str(self._version)}}
        self._of(kind)[key] = new
        self._history.append((self._now(), kind.plural, key, new))
        self._tell(Change("MODIFIED" if before else "ADDED", kind, new, before, by))
        return new

    def _tell(self, change: Change) -> None:
        for watcher in self.watchers:
            watcher(change)


def group_of(pod: Manifest) -> str:
    return str((pod["spec"].get("schedulingGroup") or {}).get("podGroupName") or "")


def owner_uids(thing: Manifest) -> set[str]:
    return {o["uid"] for o in thing["metadata"].get("ownerReferences") or []}


def selected(things: dict[tuple[str, str], Manifest], namespace: str, labels: str) -> list[Manifest]:
    return list(_selected(things, namespace, labels))


def _selected(things: dict[tuple[str, str], Manifest], namespace: str, labels: str) -> Iterator[Manifest]:
    label, _, value = labels.partition("=")
    for (where, _), thing in things.items():
        if namespace in ("", where) and (not label or (thing["metadata"].get("labels") or {}).get(label) == value):
            yield thing


def _merged(there: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    merged = dict(there) if isinstance(there, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merged(merged.get(key), value)
    return merged
