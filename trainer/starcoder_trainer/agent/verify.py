"""Is what the store holds what was saved? Asked before HEAD lists a checkpoint, and before one is chosen to resume."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from starcoder_trainer.checkpoint.cover import BadPieces, check_pieces
from starcoder_trainer.contract.codec import ContractError
from starcoder_trainer.contract.ledger import (
    MANIFEST,
    Entry,
    FileRecord,
    Manifest,
    ShardManifest,
    checkpoint_prefix,
    digest_of,
)
from starcoder_trainer.storage.store import NotFound, ObjectStore, Stat

READ_BACK_BYTES = 16 << 20
AT_ONCE = 16


class Corrupt(Exception):
    """An object is missing or is not what its manifest says."""


class Incomplete(Exception):
    """Shards are still missing; they may yet come."""


def read_shards(store: ObjectStore, attempt: int, step: int) -> tuple[ShardManifest, ...]:
    """All shard manifests of a step, by member.

    Raises:
        Corrupt: one can't be read as a shard manifest of this attempt and step.
    """
    folder = checkpoint_prefix(attempt, step)

    def read(stat: Stat) -> ShardManifest:
        try:
            shard = ShardManifest.from_json(store.get(stat.key).data)
        except ContractError as e:
            raise Corrupt(f"{store.uri}/{stat.key}: {e}") from e
        if (shard.attempt, shard.step) != (attempt, step):
            raise Corrupt(
                f"{store.uri}/{stat.key}: found attempt {shard.attempt} step {shard.step}, expected {attempt}, {step}"
            )
        return shard

    return tuple(sorted(at_once(read, store.list(f"{folder}/shard-")), key=lambda shard: shard.member))


def assemble(attempt: int, step: int, shards: tuple[ShardManifest, ...]) -> Manifest:
    """The manifest of a step whose shards hold each rank exactly once.

    Raises:
        Incomplete: ranks are missing.
        Corrupt: ranks, files, facts or pieces contradict each other.
    """
    where = f"attempt {attempt} step {step}"
    if not shards:
        raise Incomplete(f"{where}: found no shard")
    sizes = {shard.world_size for shard in shards}
    if len(sizes) > 1:
        raise Corrupt(f"{where}: shards are of world sizes {sorted(sizes)}, expected one")
    (world_size,) = sizes
    ranks = Counter(rank for shard in shards for rank in shard.ranks)
    if twice := sorted(rank for rank, n in ranks.items() if n > 1 or not 0 <= rank < world_size):
        raise Corrupt(f"{where}: ranks {twice} are in two shards or beyond the world of {world_size}")
    if missing := sorted(set(range(world_size)) - ranks.keys()):
        raise Incomplete(f"{where}: ranks {_brief(missing)} of {world_size} are missing")
    files = tuple(file for shard in shards for file in shard.files)
    if twice_named := [name for name, n in Counter(file.name for file in files).items() if n > 1]:
        raise Corrupt(f"{where}: files {_brief(twice_named)} are in two shards")
    commons = [shard.common for shard in shards]
    if any(common != commons[0] for common in commons):
        raise Corrupt(f"{where}: shards disagree about the facts of the run: {commons}"[:1000])
    pieces = tuple(piece for shard in shards for piece in shard.pieces)
    try:
        check_pieces(pieces, {file.name: file.size for file in files})
    except BadPieces as e:
        raise Corrupt(f"{where}: {e}") from e
    return Manifest(attempt, step, world_size, files, pieces, commons[0])


def verify_contents(store: ObjectStore, manifest: Manifest) -> None:
    """Size and checksum of every file, before HEAD may list them.

    Where the store keeps the SHA-256 that it checked the upload against, asking for it is enough: S3 refuses an
    upload whose bytes do not match, and stores what it accepted with that checksum (so does versitygw, for whole
    objects and for parts). A store that keeps none has the bytes read back and hashed.

    Raises:
        Corrupt: the first file that differs.
    """
    folder = checkpoint_prefix(manifest.attempt, manifest.step)

    def check(file: FileRecord) -> None:
        key = f"{folder}/{file.name}"
        try:
            stat = store.stat(key)
        except NotFound as e:
            raise Corrupt(f"{store.uri}/{key}: missing, expected {file.size} bytes") from e
        if stat.size != file.size:
            raise Corrupt(f"{store.uri}/{key}: found {stat.size} bytes, expected {file.size}")
        if stat.checksum and file.checksum:
            found, expected = stat.checksum, file.checksum
        else:
            found, expected = _sha256(store, key, file.size), file.sha256
        if found != expected:
            raise Corrupt(f"{store.uri}/{key}: found SHA-256 {found}, expected {expected}")

    at_once(check, manifest.files)


def verify_entry(store: ObjectStore, entry: Entry) -> Manifest:
    """Manifest of a checkpoint that HEAD lists, with its digest checked and every file present in its size.

    Contents were verified before HEAD listed it; here is found what was deleted, cut or replaced since. Workers would
    meet it too late for another checkpoint to be chosen.

    Raises:
        Corrupt: the first object that differs.
    """
    folder = checkpoint_prefix(entry.attempt, entry.step)
    try:
        data = store.get(f"{folder}/{MANIFEST}").data
    except NotFound as e:
        raise Corrupt(f"{store.uri}/{folder}/{MANIFEST}: missing, expected digest {entry.digest}") from e
    if digest_of(data) != entry.digest:
        raise Corrupt(f"{store.uri}/{folder}/{MANIFEST}: found digest {digest_of(data)}, expected {entry.digest}")
    manifest = Manifest.from_json(data)
    sizes = {stat.key: stat.size for stat in store.list(f"{folder}/")}
    for file in manifest.files:
        key = f"{folder}/{file.name}"
        if sizes.get(key) != file.size:
            found = "missing" if key not in sizes else f"found {sizes[key]} bytes"
            raise Corrupt(f"{store.uri}/{key}: {found}, expected {file.size} bytes")
    return manifest


def at_once[T, R](ask: Callable[[T], R], things: Iterable[T]) -> list[R]:
    """The answers, in order, of AT_ONCE requests under way at a time; raises what the first in order raises."""
    with ThreadPoolExecutor(AT_ONCE, "storage") as pool:
        return list(pool.map(ask, things))


def _sha256(store: ObjectStore, key: str, size: int) -> str:
    digest = hashlib.sha256()
    for start in range(0, size, READ_BACK_BYTES):
        digest.update(store.get_range(key, start, min(READ_BACK_BYTES, size - start)))
    return digest.hexdigest()


def _brief(items: Iterable[object]) -> str:
    listed = [str(item) for item in items]
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
