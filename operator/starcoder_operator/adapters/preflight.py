"""What must hold before the operator can do anything: the CRD is served, and we are allowed what we do."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable

from .errors import KubeError, Refused
from .kinds import PERMISSIONS, RUNS, Permission
from .kube import Kube

log = logging.getLogger(__name__)


async def missing(kube: Kube, namespaces: tuple[str, ...], permissions: tuple[Permission, ...]) -> list[str]:
    """Rights that are not granted, as sentences.

    Raises:
        KubeError: the API server could not be asked.
    """

    async def ask(permission: Permission, verb: str, namespace: str) -> str | None:
        kind = permission.kind
        if await kube.may(kind, verb, namespace=namespace, subresource=permission.subresource):
            return None
        resource = str(kind).replace(kind.plural, f"{kind.plural}/{permission.subresource}".rstrip("/"), 1)
        where = f"in namespace {namespace}" if namespace and kind.namespaced else "in the cluster"
        return f"no right to {verb} {resource} {where}"

    questions = {
        (permission, verb, namespace if permission.kind.namespaced else "")
        for permission, namespace in itertools.product(permissions, namespaces or ("",))
        for verb in permission.verbs
    }
    answers = await asyncio.gather(*(ask(*question) for question in questions))
    return sorted(answer for answer in answers if answer is not None)


async def obstacles(kube: Kube, namespaces: tuple[str, ...]) -> list[str]:
    """What keeps the operator from starting, as sentences; empty: nothing."""
    try:
        if not await kube.serves(RUNS):
            return [f"the API server does not serve {RUNS} {RUNS.version}: install the CRD (crds/ or the chart)"]
        lacking = await missing(kube, namespaces, tuple(p for p in PERMISSIONS if p.needed))
    except Refused as e:
        log.warning("permissions can't be checked, going on without: %s", e.message)
        return []
    except KubeError as e:
        return [e.message]
    return [f"{sentence}: bind the operator's ServiceAccount to the chart's role" for sentence in lacking]


async def wait_until_clear(
    kube: Kube, namespaces: tuple[str, ...], tell: Callable[[list[str]], None], *, again: float = 5.0
) -> None:
    """Returns when nothing is in the way. `tell` gets the obstacles after each look; each is logged once."""
    told: set[str] = set()
    while True:
        found = await obstacles(kube, namespaces)
        tell(found)
        if not found:
            break
        for sentence in found:
            if sentence not in told:
                log.error("can't start: %s", sentence)
        told = set(found)
        await asyncio.sleep(again)
    try:
        for sentence in await missing(kube, namespaces, tuple(p for p in PERMISSIONS if not p.needed)):
            log.warning("%s: runs with scheduling.gang Native can't be served", sentence)
    except KubeError as e:
        log.warning("permissions for gangs can't be checked: %s", e.message)
