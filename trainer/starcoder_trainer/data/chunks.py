"""Ranged reads of one large object through a cache on local disk that all processes of a Pod share.

The object is cut into chunks. Chunk c lives in the file of slot c mod slots, so that the cache is bounded without
anybody counting, and where the object fits, each chunk has a slot of its own and is fetched once a Pod. A permutation
visits chunks evenly, so a larger object gains nothing from any cleverer choice of what to drop. A slot's file says
which chunk it holds, with a checksum; it is replaced by renaming, under a lock that dies with its holder: of the ranks
that want a chunk at once, one fetches it.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from starcoder_trainer.storage.store import NotFound, ObjectStore

from .errors import DataNotFound

log = logging.getLogger(__name__)

LARGE_CHUNK_BYTES = 1 << 20
"""Where the object fits into the cache: few requests, all of them used in full."""
SMALL_CHUNK_BYTES = 64 << 10
"""Where it does not: little of what a chunk holds beside the window is ever used (8,192 tokens are 16 KiB)."""

_HEADER = struct.Struct("<8sQQI")
"""Magic, chunk, bytes, their CRC-32."""
_MAGIC = b"scchunk1"
_FILES_A_FOLDER = 1024
_LOCKS = 64


class ChunkedObject:
    """Object `key` of `store`, `size` bytes, of which one version is read. Thread-safe."""

    def __init__(self, store: ObjectStore, key: str, *, size: int, version: str, cache: Path, cache_bytes: int) -> None:
        """`cache`: a folder, made when needed; about `cache_bytes` of it are used at most, none where that is 0."""
        self._store, self._key, self._size = store, key, size
        if size <= cache_bytes:
            self._chunk_bytes, self._slots = LARGE_CHUNK_BYTES, -(-size // LARGE_CHUNK_BYTES)
        else:
            self._chunk_bytes, self._slots = SMALL_CHUNK_BYTES, cache_bytes // SMALL_CHUNK_BYTES
        # Another version of the object is another object.
        identity = f"{store.uri}\n{key}\n{size}\n{version}\n{self._chunk_bytes}\n{self._slots}"
        self._folder = cache / hashlib.sha256(identity.encode()).hexdigest()[:32]
        self._verified: dict[int, int] = {}
        """Slot -> chunk whose checksum this process has seen to be right. Only a crash of the node can spoil a file
        after that, and this process does not outlive it."""
        self._cached_here = bool(self._slots) and self._make_folder()
        self._warned = False

    def read(self, start: int, length: int) -> bytes:
        """Raises:
        DataNotFound: the object is gone.
        StorageError: the store gave up.
        """
        if not self._cached_here:
            return self._fetch(start, length)
        size, parts, stop = self._chunk_bytes, [], start + length
        while start < stop:
            chunk, within = divmod(start, size)
            part = self._part(chunk, within, min(stop - chunk * size, size))
            parts.append(part)
            start += len(part)
        return b"".join(parts)

    def _part(self, chunk: int, start: int, stop: int) -> bytes:
        slot = chunk % self._slots
        found = self._cached(slot, chunk, start, stop)
        if found is not None:
            return found
        with self._locked(f"lock-{slot % _LOCKS}"):
            found = self._cached(slot, chunk, start, stop)
            if found is not None:  # another rank was first
                return found
            offset = chunk * self._chunk_bytes
            data = self._fetch(offset, min(self._chunk_bytes, self._size - offset))
            self._keep(slot, chunk, data)
        return data[start:stop]

    def _fetch(self, start: int, length: int) -> bytes:
        try:
            return self._store.get_range(self._key, start, length)
        except NotFound as e:
            raise DataNotFound(f"{e}: it was there when training began; prepare the data again") from e

    # On disk

    def _cached(self, slot: int, chunk: int, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop) of the chunk where its slot holds it, whole."""
        try:
            file = os.open(self._path(slot), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            head = os.pread(file, _HEADER.size, 0)
            if len(head) < _HEADER.size:
                return None
            magic, holds, length, checksum = _HEADER.unpack(head)
            if magic != _MAGIC or holds != chunk or length < stop:
                return None
            if self._verified.get(slot) == chunk:
                return os.pread(file, stop - start, _HEADER.size + start)
            data = os.pread(file, length, _HEADER.size)
            if len(data) != length or zlib.crc32(data) != checksum:
                return None
            self._verified[slot] = chunk
            return data[start:stop]
        except OSError:
            return None
        finally:
            os.close(file)

    def _keep(self, slot: int, chunk: int, data: bytes) -> None:
        path = self._path(slot)
        temporary = path.with_suffix(".tmp")  # under the slot's lock, so nobody else writes it
        try:
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(_HEADER.pack(_MAGIC, chunk, len(data), zlib.crc32(data)) + data)
            temporary.replace(path)
            self._verified[slot] = chunk
        except OSError as e:
            if not self._warned:
                log.warning("data cache in %s: %s; what it can't keep is read from the store each time", path.parent, e)
            self._warned = True

    def _path(self, slot: int) -> Path:
        folder, name = divmod(slot, _FILES_A_FOLDER)
        return self._folder / f"{folder:x}" / f"{name:x}"

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Alone among threads and processes.

        flock belongs to the open file, so it holds between threads as well. POSIX record locks would not do: they
        belong to processes, and two that each wait for the other's thread are told of a deadlock (EDEADLK).
        """
        lock = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _make_folder(self) -> bool:
        """False where the disk can't be used, which costs speed, not the run."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._locked("lock-probe"):
                return True
        except OSError as e:
            log.warning("data cache in %s not used: %s; every sample is read from the store", self._folder, e)
            return False
