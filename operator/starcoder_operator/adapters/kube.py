"""The Kubernetes API as the operator uses it: objects are JSON, failures are of a few kinds (`errors`).

The transport is the asyncio half of the client library: its connections, TLS, credentials and token rotation. Its typed
models stay outside: validating a gang's Pods and Leases into them costs more time than everything else in a pass, and a
field newer than the library would be lost.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any, Protocol, cast

import aiohttp
from kubernetes.aio.client import ApiClient, Configuration

from .errors import AlreadyExists, ApiAbsent, Conflict, KubeError, NotFound, Refused, Unavailable, Withheld
from .kinds import ACCESS_REVIEWS, Kind, Manifest, kind_of

FIELD_MANAGER = "starcoder-operator"

METHODS = {"get": "GET", "list": "GET", "create": "POST", "update": "PUT", "patch": "PATCH", "delete": "DELETE"}
"""Verb of Kubernetes' authorization to HTTP method."""


class CallCounter(Protocol):
    def __call__(self, verb: str, code: int) -> None: ...


def no_count(verb: str, code: int) -> None:
    """For callers that do not measure."""


class Kube:
    """Client of one API server.

    Args:
        count: told verb and HTTP code of every call, code 0 where no answer came.
        on_outage: called whenever a call came to `Unavailable`.
        may_write: asked right before a write is sent; where it says no, nothing is sent and the call is `Withheld`.
        concurrency: calls under way at the same time; the others wait.
        timeout: seconds a call may take.

    Every method raises `KubeError` or one of its kinds, nothing else.
    """

    def __init__(
        self,
        configuration: Configuration,
        *,
        count: CallCounter = no_count,
        on_outage: Callable[[], None] = lambda: None,
        may_write: Callable[[], bool] = lambda: True,
        concurrency: int = 32,
        timeout: float = 15.0,
    ) -> None:
        self._client = ApiClient(configuration)
        self._client.user_agent = FIELD_MANAGER
        self._count = count
        self._on_outage = on_outage
        self._may_write = may_write
        self._slots = asyncio.Semaphore(concurrency)
        self._timeout = aiohttp.ClientTimeout(total=timeout)

    async def close(self) -> None:
        await self._client.close()

    async def get(self, kind: Kind, namespace: str, name: str) -> Manifest:
        return await self._call("get", kind.path(namespace, name))

    async def list(self, kind: Kind, namespace: str, labels: str = "") -> list[Manifest]:
        """Objects of a namespace that `labels` selects. A 404 here can only mean `ApiAbsent`."""
        query = {"labelSelector": labels} if labels else {}
        try:
            answer = await self._call("list", kind.path(namespace), query)
        except NotFound as e:
            raise ApiAbsent(e.message, code=e.code, reason=e.reason) from e
        return cast(list[Manifest], answer.get("items") or [])

    async def create(self, manifest: Manifest, *, dry_run: bool = False) -> Manifest:
        """Unknown fields are refused, so that a slip in a podPatch is told instead of dropped."""
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"} | ({"dryRun": "All"} if dry_run else {})
        namespace = manifest["metadata"].get("namespace", "")
        return await self._call("create", kind_of(manifest).path(namespace), query, manifest)

    async def replace(self, manifest: Manifest) -> Manifest:
        """PUT at `metadata.resourceVersion`; raises Conflict where the object has changed since."""
        meta = manifest["metadata"]
        path = kind_of(manifest).path(meta.get("namespace", ""), meta["name"])
        return await self._call("update", path, {"fieldManager": FIELD_MANAGER}, manifest)

    async def merge_patch(
        self, kind: Kind, namespace: str, name: str, patch: Manifest, *, subresource: str = ""
    ) -> Manifest:
        """JSON merge patch. `metadata.uid` or `.resourceVersion` in it are preconditions."""
        path = kind.path(namespace, name, subresource)
        query = {"fieldManager": FIELD_MANAGER}
        return await self._call("patch", path, query, patch, content_type="application/merge-patch+json")

    async def apply_status(self, kind: Kind, manifest: Manifest) -> Manifest:
        """Server-side apply of the status subresource. `metadata.uid` and `.resourceVersion` are preconditions."""
        meta = manifest["metadata"]
        path = kind.path(meta["namespace"], meta["name"], "status")
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        # The parameter keeps the client from encoding the body, the server takes no notice of it.
        kind_of_patch = "application/apply-patch+yaml; charset=utf-8"
        return await self._call("patch", path, query, yaml_of(manifest), content_type=kind_of_patch)

    async def delete(self, kind: Kind, namespace: str, name: str, *, uid: str) -> None:
        """Only the object of that uid; raises NotFound where it is gone, Conflict where the name is another's now."""
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": uid},
            "propagationPolicy": "Background",
        }
        await self._call("delete", kind.path(namespace, name), {}, options)

    async def serves(self, kind: Kind) -> bool:
        """Whether the server has this kind at all."""
        path = f"/apis/{kind.api_version}" if kind.group else f"/api/{kind.version}"
        try:
            answer = await self._call("get", path)
        except NotFound:
            return False
        return any(r.get("name") == kind.plural for r in answer.get("resources") or [])

    async def may(self, kind: Kind, verb: str, *, namespace: str = "", subresource: str = "") -> bool:
        """Whether we are allowed to; `namespace` empty means in all."""
        attributes = {
            "group": kind.group,
            "resource": kind.plural,
            "subresource": subresource,
            "verb": verb,
            "namespace": namespace if kind.namespaced else "",
        }
        review = {
            "apiVersion": ACCESS_REVIEWS.api_version,
            "kind": ACCESS_REVIEWS.kind,
            "metadata": {},
            "spec": {"resourceAttributes": attributes},
        }
        answer = await self._call("create", ACCESS_REVIEWS.path(), {}, review)
        return bool(answer.get("status", {}).get("allowed"))

    async def _call(
        self,
        verb: str,
        path: str,
        query: dict[str, str] | None = None,
        body: Manifest | bytes | None = None,
        *,
        content_type: str = "application/json",
    ) -> Manifest:
        async with self._slots:
            if verb not in ("get", "list") and path != ACCESS_REVIEWS.path() and not self._may_write():
                raise Withheld(f"{verb} {path}: another replica may lead by now, nothing was sent")
            try:
                code, text, retry_after = await self._exchange(METHODS[verb], path, query or {}, body, content_type)
            except (aiohttp.ClientError, OSError, TimeoutError) as e:
                self._count(verb, 0)
                self._on_outage()
                what = str(e) or type(e).__name__
                raise Unavailable(f"{verb} {path}: the API server did not answer ({what})") from e
        self._count(verb, code)
        if 200 <= code < 300:
            return _parse(text)
        error = failure(code, text, what=f"{verb} {path}", retry_after=retry_after)
        if isinstance(error, Unavailable):
            self._on_outage()
        raise error

    async def _exchange(
        self, method: str, path: str, query: dict[str, str], body: Manifest | bytes | None, content_type: str
    ) -> tuple[int, str, float]:
        """(HTTP code, body, Retry-After in seconds or 0)."""
        headers = {"Accept": "application/json", "Content-Type": content_type}
        parameters = await self._client.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        response = await self._client.call_api(*parameters, _request_timeout=self._timeout)
        text = (await response.read()).decode("utf-8", "replace")
        asked = response.headers.get("Retry-After", "")
        return response.status, text, float(asked) if asked.isdigit() else 0.0


def yaml_of(manifest: Manifest) -> bytes:
    """JSON that is YAML as well, whatever text people and libraries put into messages.

    A server-side apply is parsed as YAML, which knows no surrogates: JSON's usual escape of characters beyond U+FFFF
    (gloo ends its errors with one) makes it refuse the whole status. Those are sent as they are; what YAML does not
    take raw is escaped, and half a surrogate pair is replaced.
    """
    text = json.dumps(manifest, ensure_ascii=False, separators=(",", ":"))
    return _NOT_RAW_IN_YAML.sub(_escaped, text).encode()


_NOT_RAW_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\u{0xFFFD if 0xD800 <= code <= 0xDFFF else code:04x}"


def _parse(text: str) -> Manifest:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    return value if isinstance(value, dict) else {}


def failure(code: int, text: str, *, what: str, retry_after: float = 0.0) -> KubeError:
    """Which kind of failure an answer is.

    Args:
        code: HTTP status, not 2xx.
        text: body; a metav1.Status as a rule, plain text from what stands in front of the server.
    """
    status: dict[str, Any] = _parse(text)
    reason = str(status.get("reason", ""))
    message = str(status.get("message") or text.strip()[:1000] or f"HTTP {code}")
    match code:
        case 404 if status.get("details", {}).get("name"):
            return NotFound(message, code=code, reason=reason)
        case 404:
            return ApiAbsent(f"{what}: {message}", code=code, reason=reason)
        case 409 if reason == "AlreadyExists":
            return AlreadyExists(message, code=code, reason=reason)
        case 409:
            return Conflict(message, code=code, reason=reason)
        case 401:
            # an expired token; the next call reads it again
            return Unavailable(f"{what}: {message}", code=code, reason=reason)
        case 429 | 408:
            return Unavailable(f"{what}: {message}", code=code, reason=reason, retry_after=retry_after)
        case 500 if "failed calling webhook" in message:
            # an admission webhook that is down or answers nonsense: its owner's to mend, the API server is well
            return Refused(message, code=code, reason=reason)
        case _ if code >= 500:
            return Unavailable(f"{what}: {message}", code=code, reason=reason, retry_after=retry_after)
        case _:
            return Refused(message, code=code, reason=reason)
