"""Kubernetes Events on a run (events.k8s.io/v1), for people who ask `kubectl describe`."""

from __future__ import annotations

import hashlib
import logging
from typing import Literal

from .clock import micro_time
from .errors import AlreadyExists, KubeError, NotFound
from .kinds import EVENTS, RUNS, Manifest
from .kube import Kube

log = logging.getLogger(__name__)

NOTE_LIMIT = 1024
"""Characters the API takes."""


class Events:
    """An event that is told again is counted on the object that is there, so that none is there twice."""

    def __init__(self, kube: Kube, instance: str) -> None:
        self._kube = kube
        self._instance = instance

    async def emit(
        self, namespace: str, name: str, uid: str, *, kind: Literal["Normal", "Warning"], reason: str, message: str
    ) -> None:
        """Tell it, or log why it could not be told: an Event is news, the status is the record."""
        try:
            manifest = event_manifest(
                namespace, name, uid, kind=kind, reason=reason, message=message, instance=self._instance
            )
            await self._count_or_create(manifest)
        except KubeError as e:
            log.warning(
                "event %s not told: %s", reason, e.message, extra={"namespace": namespace, "run": name, "note": message}
            )

    async def _count_or_create(self, manifest: Manifest) -> None:
        try:
            await self._kube.create(manifest)
        except AlreadyExists:
            namespace, name = manifest["metadata"]["namespace"], manifest["metadata"]["name"]
            try:
                there = await self._kube.get(EVENTS, namespace, name)
                count = int((there.get("series") or {}).get("count", 1)) + 1
                series = {"series": {"count": count, "lastObservedTime": manifest["eventTime"]}}
                await self._kube.merge_patch(EVENTS, namespace, name, series)
            except NotFound:
                # expired between the two calls
                await self._kube.create(manifest)


def event_manifest(
    namespace: str, name: str, uid: str, *, kind: str, reason: str, message: str, instance: str
) -> Manifest:
    """The name is a digest of what is told about whom, so the same news is the same object."""
    note = message if len(message) <= NOTE_LIMIT else message[: NOTE_LIMIT - 1] + "…"
    digest = hashlib.sha256("\0".join((uid, kind, reason, note)).encode()).hexdigest()[:16]
    return {
        "apiVersion": EVENTS.api_version,
        "kind": EVENTS.kind,
        "metadata": {"name": f"{name}.{digest}", "namespace": namespace},
        "eventTime": micro_time(),
        "reportingController": "starcoder.dev/operator",
        "reportingInstance": instance[:128],
        "action": "Reconcile",
        "type": kind,
        "reason": reason,
        "note": note,
        "regarding": {
            "apiVersion": RUNS.api_version,
            "kind": RUNS.kind,
            "namespace": namespace,
            "name": name,
            "uid": uid,
        },
    }
