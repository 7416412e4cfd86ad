"""Clients of the API: the operator's, in place of `adapters.kube.Kube`, and an agent's, in place of the library's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from kubernetes.aio.client.exceptions import ApiException

from starcoder_operator.adapters.errors import KubeError, Unavailable, Withheld
from starcoder_operator.adapters.kinds import LEASES, ROLE_BINDINGS, ROLES, Kind, Manifest
from starcoder_trainer.contract import names

from .api_server import ApiServer, selected
from .network import TIMEOUT, Network


class OperatorClient:
    """What `Observer`, `Actor`, `Events` and `Elector` use of `adapters.kube.Kube`, with the same errors.

    Args:
        by: name of this operator, in the history.
        around: wraps every call: counts it, and may end the operator before or after it.
        on_outage, may_write: as of `Kube`.
    """

    def __init__(
        self,
        api: ApiServer,
        network: Network,
        by: str,
        around: Callable[[str, Callable[[], Any]], Any],
        on_outage: Callable[[], None] = lambda: None,
        may_write: Callable[[], bool] = lambda: True,
    ) -> None:
        self._api, self._network, self._by = api, network, by
        self._around = around
        self._on_outage = on_outage
        self._may_write = may_write

    async def get(self, kind: Kind, namespace: str, name: str) -> Manifest:
        return await self._call(f"get {kind.kind} {name}", lambda: self._api.get(kind, namespace, name))

    async def list(self, kind: Kind, namespace: str, labels: str = "") -> list[Manifest]:
        return await self._call(
            f"list {kind.kind}",
            lambda: self._api.list(kind, namespace, labels),
            lambda seconds: selected(self._api.as_of(seconds, kind), namespace, labels),
        )

    async def create(self, manifest: Manifest, *, dry_run: bool = False) -> Manifest:
        what = f"create {manifest['kind']} {manifest['metadata']['name']}"
        return await self._call(what, lambda: self._api.create(manifest, self._by, dry_run=dry_run))

    async def replace(self, manifest: Manifest) -> Manifest:
        what = f"update {manifest['kind']} {manifest['metadata']['name']}"
        return await self._call(what, lambda: self._api.replace(manifest, self._by))

    async def merge_patch(self, kind: Kind, namespace: str, name: str, patch: Manifest) -> Manifest:
        return await self._call(
            f"patch {kind.kind} {name}", lambda: self._api.merge_patch(kind, namespace, name, patch, self._by)
        )

    async def apply_status(self, kind: Kind, manifest: Manifest) -> Manifest:
        return await self._call("apply status", lambda: self._api.apply_status(kind, manifest, self._by))

    async def delete(self, kind: Kind, namespace: str, name: str, *, uid: str) -> None:
        await self._call(
            f"delete {kind.kind} {name}", lambda: self._api.delete(kind, namespace, name, self._by, uid=uid)
        )

    async def _call(self, what: str, perform: Callable[[], Any], past: Callable[[float], Any] | None = None) -> Any:
        writes = not what.startswith(("get", "list"))
        if writes and not self._may_write():
            raise Withheld(f"{what}: another replica may lead by now, nothing was sent")
        try:
            return await self._around(
                what, lambda: self._network.api_call("operator", what, perform, writes=writes, past=past)
            )
        except Unavailable:
            self._on_outage()
            raise


class AgentClient:
    """What an agent's `LeaseWriter` uses of `CoordinationV1Api`, with the rights of the run's Role."""

    def __init__(self, api: ApiServer, network: Network, pod: str, run: str, reached: Callable[[], bool]) -> None:
        self._api, self._network, self._pod, self._run = api, network, pod, run
        self._reached = reached

    async def read_namespaced_lease(self, name: str, namespace: str, **_: Any) -> Any:
        return await self._call(f"get Lease {name}", lambda: self._api.get(LEASES, namespace, name), namespace, False)

    async def patch_namespaced_lease(self, name: str, namespace: str, body: Manifest, **_: Any) -> Any:
        return await self._call(
            f"patch Lease {name}",
            lambda: self._api.merge_patch(LEASES, namespace, name, body, f"agent of {self._pod}"),
            namespace,
            True,
        )

    async def _call(self, what: str, perform: Callable[[], Manifest], namespace: str, writes: bool) -> Any:
        def arrives() -> Manifest:
            if not self._reached():
                raise TimeoutError
            account = names.service_account_name(self._run)
            if not all(self._api.find(kind, namespace, account) for kind in (ROLES, ROLE_BINDINGS)):
                raise KubeError("forbidden", code=403)
            return perform()

        if not self._reached():
            await asyncio.sleep(TIMEOUT)
            raise TimeoutError
        try:
            lease = await self._network.api_call("agent", f"{self._pod}: {what}", arrives, writes=writes)
        except Unavailable as e:
            raise (ApiException(status=e.code, reason=e.message) if e.code else TimeoutError(e.message)) from e
        except KubeError as e:
            raise ApiException(status=e.code, reason=e.message) from e
        meta = lease["metadata"]
        return SimpleNamespace(
            metadata=SimpleNamespace(annotations=meta.get("annotations"), resource_version=meta["resourceVersion"])
        )
