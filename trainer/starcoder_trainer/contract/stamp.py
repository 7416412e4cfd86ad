"""What a worker is at, in a file of its Pod's memory: its agent reads it without the worker's help.

The file is mapped by its one writer; a reader that meets it half-written finds a checksum that does not match, and
looks again later.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

_BODY = struct.Struct("<8sQQQd24s")
_CHECKSUM = struct.Struct("<I")
_SIZE = _BODY.size + _CHECKSUM.size
_MAGIC = b"scstamp1"


@dataclass(frozen=True)
class Stamp:
    attempt: int
    interval: int
    """Counts the stretches of work that are judged as one; all ranks of an attempt begin each at the same moment."""
    iteration: int
    """Iterations done."""
    phase: str
    """What the worker does now: form, build, load, open, data, forward_backward, optimizer, stop_flag, checkpoint or
    leave."""
    allowed: float
    """Seconds that the interval may take in all; more is a hang."""


def stamp_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}"


class StampFile:
    """The writing end, of one worker."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(stamp_path(folder, rank), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            os.ftruncate(file, _SIZE)
            self._memory = mmap.mmap(file, _SIZE)
        finally:
            os.close(file)

    def write(self, stamp: Stamp) -> None:
        """Microseconds, and nothing that could block."""
        body = _BODY.pack(
            _MAGIC, stamp.attempt, stamp.interval, stamp.iteration, stamp.allowed, stamp.phase.encode()[:24]
        )
        self._memory[:] = body + _CHECKSUM.pack(zlib.crc32(body))


def read_stamp(folder: Path, rank: int) -> Stamp | None:
    """None where there is none, or where it is just being written."""
    try:
        data = stamp_path(folder, rank).read_bytes()
    except OSError:
        return None
    if len(data) != _SIZE or not data.startswith(_MAGIC):
        return None
    body, checksum = data[: _BODY.size], data[_BODY.size :]
    if _CHECKSUM.pack(zlib.crc32(body)) != checksum:
        return None
    _, attempt, interval, iteration, allowed, phase = _BODY.unpack(body)
    return Stamp(attempt, interval, iteration, phase.rstrip(b"\0").decode(errors="replace"), allowed)
