"""S3 in memory: linearizable by key, with conditional PUTs, seen by each agent through a network that has faults.

A request that is under way arrives whether or not its sender still lives.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starcoder_trainer.storage.store import (
    Found,
    NotFound,
    PreconditionFailed,
    Stat,
    StorageError,
    Unreachable,
    Uploaded,
)

from .network import DELAYED, SLOW, Network
from .virtual_time import VirtualLoop

URI = "s3://checkpoints/a"
TIMEOUT = 10.0
"""Seconds until the SDK gives up."""


@dataclass
class Bucket:
    """What is stored, as the server has it."""

    objects: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    written: Callable[[str, bytes | None, str], None] = lambda key, before, by: None
    """Told of each key that was put, what it was before, and the boot id of the writer."""
    deleted: Callable[[str], None] = lambda key: None
    _versions: int = 0

    def get(self, key: str) -> Found:
        if key not in self.objects:
            raise NotFound(f"{URI}/{key}: no such key")
        return Found(*self.objects[key])

    def list(self, prefix: str) -> list[Stat]:
        return [
            Stat(key, len(data), version)
            for key, (data, version) in sorted(self.objects.items())
            if key.startswith(prefix)
        ]

    def put(self, key: str, data: bytes, by: str) -> str:
        before = self.objects.get(key)
        self._versions += 1
        self.objects[key] = (data, str(self._versions))
        self.written(key, before[0] if before else None, by)
        return str(self._versions)

    def put_if(self, key: str, data: bytes, version: str | None, by: str) -> str:
        """`version` None: where the key is absent."""
        if self.objects.get(key, (b"", None))[1] != version:
            raise PreconditionFailed(f"{URI}/{key}: somebody else wrote it first")
        return self.put(key, data, by)

    def delete(self, key: str) -> None:
        if self.objects.pop(key, None) is not None:
            self.deleted(key)


class S3Client:
    """An agent's `ObjectStore`; its methods are called by blocking code in virtual time."""

    def __init__(self, bucket: Bucket, network: Network, loop: VirtualLoop, who: str, boot_id: str) -> None:
        self.uri = URI
        self._bucket, self._network, self._loop = bucket, network, loop
        self._who, self._boot_id = who, boot_id

    def get(self, key: str) -> Found:
        return self._read(f"get {key}", lambda: self._bucket.get(key))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        found: bytes = self._read(f"get {key}", lambda: self._bucket.get(key).data)[start : start + length]
        if len(found) != length:
            raise StorageError(f"{URI}/{key}: found {len(found)} bytes at {start}, expected {length}")
        return found

    def stat(self, key: str) -> Stat:
        data, version = self._read(f"head {key}", lambda: self._bucket.get(key)).__dict__.values()
        return Stat(key, len(data), version, hashlib.sha256(data).hexdigest())

    def list(self, prefix: str = "") -> Iterator[Stat]:
        yield from self._read(f"list {prefix}", lambda: self._bucket.list(prefix))

    def put(self, key: str, data: bytes) -> str:
        return self._write(f"put {key}", lambda: self._bucket.put(key, data, self._boot_id), retried=True)

    def put_if_absent(self, key: str, data: bytes) -> str:
        return self._write(f"put {key} if absent", lambda: self._bucket.put_if(key, data, None, self._boot_id))

    def put_if_match(self, key: str, data: bytes, version: str) -> str:
        return self._write(f"put {key} if match", lambda: self._bucket.put_if(key, data, version, self._boot_id))

    def upload_file(self, key: str, path: Path) -> Uploaded:
        data = path.read_bytes()
        seconds = self._network.upload_seconds
        self._write(f"upload {key}", lambda: self._bucket.put(key, data, self._boot_id), retried=True, takes=seconds)
        digest = hashlib.sha256(data).hexdigest()
        return Uploaded(len(data), digest, digest)

    def delete(self, key: str) -> None:
        self._write(f"delete {key}", lambda: self._bucket.delete(key), retried=True)

    def _read(self, what: str, perform: Callable[[], Any]) -> Any:
        if self._network.store_down:
            self._loop.pause(TIMEOUT)
            raise Unreachable(f"{self._who}: {what}: no answer")
        if self._network.jitter and self._network.rng.random() < 0.3:
            self._loop.pause(self._network.latency())
        return perform()

    def _write(self, what: str, perform: Callable[[], Any], *, retried: bool = False, takes: float = 0.0) -> Any:
        if self._network.store_down:
            self._loop.pause(TIMEOUT)
            raise Unreachable(f"{self._who}: {what}: no answer")
        fault = self._network.next_store_fault()
        if fault is not None:
            self._network.told(f"{self._who}: S3 {what}: {fault}")
        match fault:
            case None:
                return self._arrives(perform, self._network.latency() + takes)
            case "500" if retried:
                return self._arrives(perform, SLOW)  # the SDK tries again
            case "500":
                self._loop.pause(self._network.latency())
                raise Unreachable(f"{what}: internal error")
            case "request lost":
                pass
            case "answer lost":
                self._loop.call_later(self._network.latency(), _whatever_comes, perform)
            case "delayed":
                self._loop.call_later(DELAYED, _whatever_comes, perform)
        self._loop.pause(TIMEOUT)
        raise Unreachable(f"{what}: no answer in {TIMEOUT} s")

    def _arrives(self, perform: Callable[[], Any], seconds: float) -> Any:
        """The request is on its way: it is carried out at the server whatever becomes of its sender."""
        if not self._loop.in_thread:
            return perform()
        answer: list[Any] = []

        def arrange(resume: Callable[[], None]) -> None:
            def at_server() -> None:
                try:
                    answer.append(perform())
                except StorageError as e:
                    answer.append(e)
                resume()

            self._loop.call_later(seconds, at_server)

        self._loop.wait(arrange)
        if isinstance(answer[0], StorageError):
            raise answer[0]
        return answer[0]


def _whatever_comes(perform: Callable[[], Any]) -> None:
    with contextlib.suppress(StorageError):
        perform()
