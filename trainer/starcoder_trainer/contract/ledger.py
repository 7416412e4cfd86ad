"""Documents of the checkpoint ledger in S3. Only what HEAD lists exists, and it lists only what is verified."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from .codec import Document

HEAD_KEY = "HEAD.json"
MANIFEST = "manifest.json"


def checkpoint_prefix(attempt: int, step: int) -> str:
    """Folder of a checkpoint below `checkpoint.uri`, without a trailing slash."""
    return f"a{attempt}/step-{step:08d}"


def shard_manifest_key(attempt: int, step: int, member: int) -> str:
    return f"{checkpoint_prefix(attempt, step)}/shard-{member:05d}.json"


def stacks_key(attempt: int, member: int) -> str:
    """What a member's workers said when their attempt hung. Beside the checkpoints of the attempt, never among them."""
    return f"a{attempt}/stacks/member-{member:05d}.txt"


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class FileRecord:
    """One object of a checkpoint."""

    name: str
    """Relative to the checkpoint's folder."""
    size: int
    """Bytes."""
    sha256: str
    """Hex, of the local file before upload."""
    checksum: str = ""
    """What the store checked the upload against and keeps beside the object; empty where it keeps none."""


@dataclass(frozen=True)
class Piece:
    """A contiguous range of one tensor's flattened model-parallel piece, and where its bytes are.

    `tensor` names state, parameter and model-parallel position (see starcoder_trainer.checkpoint); elements
    [start, start + count) of that 1-D tensor of `total` elements are bytes [offset, offset + count x itemsize) of
    `file`, little-endian.
    """

    tensor: str
    dtype: str
    total: int
    start: int
    count: int
    file: str
    offset: int


@dataclass(frozen=True)
class RankManifest(Document):
    """Written locally by a worker beside its file, as the last thing, after fsync."""

    attempt: int
    step: int
    rank: int
    files: tuple[str, ...]
    pieces: tuple[Piece, ...]
    common: dict[str, str]
    """Small facts equal on all ranks: consumed samples, layout, configuration digest; values as JSON text."""


@dataclass(frozen=True)
class ShardManifest(Document):
    """shard-<member>.json: all that one member uploaded for a step, put there last. Of use until the step is committed
    or given up."""

    attempt: int
    step: int
    member: int
    ranks: tuple[int, ...]
    world_size: int
    files: tuple[FileRecord, ...]
    pieces: tuple[Piece, ...]
    common: dict[str, str]


@dataclass(frozen=True)
class Manifest(Document):
    """manifest.json of a complete, verified checkpoint; its digest is in HEAD.

    It repeats what the shard manifests say: all ranks read it at once when an attempt starts, and one object for each
    takes as many requests as there are ranks, not that many for every member.
    """

    attempt: int
    step: int
    world_size: int
    files: tuple[FileRecord, ...]
    pieces: tuple[Piece, ...]
    common: dict[str, str]


@dataclass(frozen=True)
class Entry:
    step: int
    attempt: int
    digest: str
    """Of manifest.json."""
    committed_at: str
    size_bytes: int


@dataclass(frozen=True)
class Head(Document):
    """HEAD.json. Every PUT is conditional on the version read, and carries a nonce of its own."""

    run_uid: str
    run_name: str
    attempt: int
    """The only attempt that may commit."""
    nonce: str
    """Of the PUT that wrote this version: after a lost response, reading back one's own nonce means success."""
    holder: str
    """Boot id of the agent that claimed the attempt."""
    entries: tuple[Entry, ...] = ()
    """Retained checkpoints, newest last."""

    @property
    def newest(self) -> Entry | None:
        return self.entries[-1] if self.entries else None
