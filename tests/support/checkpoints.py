"""Checkpoints made of a few bytes, and a store in memory that can lose requests and answers."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from starcoder_trainer.agent.ledger import Ledger
from starcoder_trainer.contract.config import RunIdentity
from starcoder_trainer.contract.ledger import (
    FileRecord,
    ShardManifest,
    checkpoint_prefix,
    shard_manifest_key,
)
from starcoder_trainer.storage.store import (
    Found,
    NotFound,
    ObjectStore,
    PreconditionFailed,
    Stat,
    Unreachable,
    Uploaded,
)

RUN = RunIdentity("demo", "training", "uid-1")


def ledger(store: ObjectStore, holder: str, run: RunIdentity = RUN, keep_last: int = 3) -> Ledger:
    return Ledger(store, run, holder, keep_last, pause=lambda seconds: None, now=lambda: "2026-01-01T00:00:00Z")


def save_shard(
    store: ObjectStore, attempt: int, step: int, member: int = 0, ranks: tuple[int, ...] = (0,), world_size: int = 1
) -> ShardManifest:
    """What one member uploads: a file a rank, then its shard manifest."""
    files = []
    for rank in ranks:
        name = f"rank-{rank:05d}.bin"
        with tempfile.NamedTemporaryFile() as file:
            file.write(f"{attempt}/{step}/{rank}".encode() * 10)
            file.flush()
            done = store.upload_file(f"{checkpoint_prefix(attempt, step)}/{name}", Path(file.name))
        files.append(FileRecord(name, done.size, done.sha256, done.checksum))
    shard = ShardManifest(attempt, step, member, ranks, world_size, tuple(files), (), {"step": str(step)})
    store.put(shard_manifest_key(attempt, step, member), shard.to_json().encode())
    return shard


class MemoryStore:
    """Linearizable, as S3 is. `fate` is asked at each conditional write and says what the network does with it."""

    def __init__(self) -> None:
        self.uri = "s3://memory/run"
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.fates: list[Literal["ok", "request lost", "answer lost"]] = []
        self._versions = 0
        self._lock = threading.Lock()

    def get(self, key: str) -> Found:
        with self._lock:
            if key not in self.objects:
                raise NotFound(key)
            return Found(*self.objects[key])

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self.get(key).data[start : start + length]

    def stat(self, key: str) -> Stat:
        found = self.get(key)
        return Stat(key, len(found.data), found.version)

    def list(self, prefix: str = "") -> Iterator[Stat]:
        for key in sorted(self.objects):
            if key.startswith(prefix):
                yield self.stat(key)

    def put(self, key: str, data: bytes) -> str:
        with self._lock:
            self._versions += 1
            self.objects[key] = (data, str(self._versions))
            return self.objects[key][1]

    def put_if_absent(self, key: str, data: bytes) -> str:
        return self._conditional(key, data, None)

    def put_if_match(self, key: str, data: bytes, version: str) -> str:
        return self._conditional(key, data, version)

    def _conditional(self, key: str, data: bytes, version: str | None) -> str:
        fate = self.fates.pop(0) if self.fates else "ok"
        if fate == "request lost":
            raise Unreachable(f"{key}: request lost")
        if self.objects.get(key, (b"", None))[1] != version:
            raise PreconditionFailed(key)
        written = self.put(key, data)
        if fate == "answer lost":
            raise Unreachable(f"{key}: answer lost")
        return written

    def upload_file(self, key: str, path: Path) -> Uploaded:
        data = path.read_bytes()
        self.put(key, data)
        return Uploaded(len(data), hashlib.sha256(data).hexdigest(), "")

    def delete(self, key: str) -> None:
        with self._lock:
            self.objects.pop(key, None)
