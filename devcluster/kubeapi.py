"""The few reads that bring-up needs of the API server, without a client library and without kubectl's start-up time."""

from __future__ import annotations

import http.client
import json
import ssl
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from .network import inside
from .pki import Pki

Json = dict[str, Any]


class Refused(RuntimeError):
    """The API server answered with an error."""

    def __init__(self, path: str, status: int, body: str) -> None:
        super().__init__(f"GET {path}: {status} {body[:500]}")
        self.status = status


@dataclass(frozen=True)
class KubeApi:
    """The API server at `address`:`port`, reached from a network namespace (empty: from here), as the admin."""

    pki: Pki
    address: str
    port: int
    netns: str = ""

    def get(self, path: str, seconds: float = 5) -> str:
        """Body of an answer. Raises OSError where nobody answers, Refused otherwise."""
        context = ssl.create_default_context(cafile=str(self.pki.certificate("ca")))
        context.load_cert_chain(self.pki.certificate("admin"), self.pki.key("admin"))
        with inside(self.netns) if self.netns else nullcontext():
            connection = http.client.HTTPSConnection(self.address, self.port, timeout=seconds, context=context)
            try:
                connection.request("GET", path, headers={"Accept": "application/json"})
                answer = connection.getresponse()
                body = answer.read().decode()
            except http.client.HTTPException as e:
                raise ConnectionError(f"GET {path}: {e!r}") from e
            finally:
                connection.close()
        if answer.status != http.client.OK:
            raise Refused(path, answer.status, body)
        return body

    def ready(self) -> bool:
        """Whether /readyz says so."""
        try:
            return self.get("/readyz") == "ok"
        except (OSError, Refused):
            return False

    def nodes(self) -> tuple[Json, ...]:
        return tuple(json.loads(self.get("/api/v1/nodes"))["items"])

    def exists(self, path: str) -> bool:
        try:
            self.get(path)
        except Refused as e:
            if e.status == http.client.NOT_FOUND:
                return False
            raise
        return True


def is_ready(node: Json) -> bool:
    """Whether a Node's condition Ready is True."""
    return any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"].get("conditions", ()))


def gpus(node: Json) -> int:
    """GPUs that a Node offers to Pods."""
    return int(node["status"].get("allocatable", {}).get("nvidia.com/gpu", "0"))
