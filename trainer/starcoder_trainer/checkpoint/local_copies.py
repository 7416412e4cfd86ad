"""What this Pod's disk still holds of a checkpoint, so that a restart reads from S3 only what others wrote.

The agent keeps the files of the step that it uploaded last. A file counts as a copy where it has the size and the
SHA-256 that the checkpoint's manifest lists, so nothing depends on who wrote it or on what became of it since.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from starcoder_trainer.contract.assignment import CheckpointRef
from starcoder_trainer.contract.ledger import FileRecord

from .save import directory_of

log = logging.getLogger(__name__)

GetRange = Callable[[str, int, int], bytes]
"""(file, start, length) to bytes."""


class LocalCopies:
    """Reads from the copies where there are any, else from the store. Thread-safe."""

    def __init__(
        self, scratch: Path, checkpoint: CheckpointRef, files: Mapping[str, FileRecord], from_store: GetRange
    ) -> None:
        """`files`: by name, as the manifest lists them."""
        self._folder = directory_of(scratch, checkpoint.attempt, checkpoint.step)
        self._files = files
        self._from_store = from_store
        self._locks = {name: threading.Lock() for name in files}
        self._opened: dict[str, int | None] = {}
        """Descriptors of those that were looked at; None where there is no good copy."""
        self._counting = threading.Lock()
        self.local_bytes = 0

    def get_range(self, file: str, start: int, length: int) -> bytes:
        descriptor = self._open(file)
        if descriptor is not None:
            data = b""
            with contextlib.suppress(OSError):  # the disk fails; the store does not
                data = os.pread(descriptor, length, start)
            if len(data) == length:
                with self._counting:
                    self.local_bytes += length
                return data
        return self._from_store(file, start, length)

    def close(self) -> None:
        for descriptor in self._opened.values():
            if descriptor is not None:
                os.close(descriptor)
        self._opened = {}

    def _open(self, file: str) -> int | None:
        record = self._files.get(file)
        if record is None:
            return None
        with self._locks[file]:
            if file not in self._opened:
                self._opened[file] = _verified(self._folder / file, record)
            return self._opened[file]


def _verified(path: Path, record: FileRecord) -> int | None:
    """A descriptor of the file, which stays good when the file is deleted meanwhile."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_size == record.size:
            with open(descriptor, "rb", closefd=False) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == record.sha256:
                    return descriptor
        log.warning("%s: is not what the checkpoint's manifest lists, and is read from the store", path)
    except OSError as e:
        log.warning("%s: %s; it is read from the store", path, e)
    os.close(descriptor)
    return None
