"""Source files below a folder: which are taken, in which order, and why others are not."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path

LEFT_OUT_FOLDERS = frozenset({".git", ".hg", ".svn", "__pycache__", "node_modules", ".venv"})
"""Not sources: what version control, Python and package managers keep."""
MAX_FILE_BYTES = 1 << 20
"""Larger files are data, as in The Stack."""


class Skipped(StrEnum):
    """Why a file that was asked for is not taken."""

    EMPTY = "empty"
    LARGE = "too large"
    BINARY = "binary (a zero byte)"
    NOT_UTF8 = "not UTF-8"
    NAME = "name not UTF-8"
    LINK = "link or no regular file"
    UNREADABLE = "unreadable"


@dataclass(frozen=True)
class SourceFile:
    path: str
    """Below the folder, with slashes."""
    size: int
    """Bytes, when it was found."""


@dataclass(frozen=True)
class Selection:
    """Patterns match the path or the name: `*.py`, `lib/*/test_*`."""

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    max_file_bytes: int = MAX_FILE_BYTES

    def takes(self, path: str) -> bool:
        return _matches(path, self.include) and not _matches(path, self.exclude)


def find_files(
    root: Path, selection: Selection, seed: int, left_out: Path | None = None
) -> tuple[list[SourceFile], Counter[Skipped]]:
    """Files below `root` in the order in which they are written: shuffled by `seed`, whatever the file system says.

    Documents that follow each other share windows; shuffled, neighbours of one folder don't.

    Args:
        left_out: A folder below `root` that is not looked into (the output).
    """
    found: list[SourceFile] = []
    skipped: Counter[Skipped] = Counter()

    def unreadable(_: OSError) -> None:
        skipped[Skipped.UNREADABLE] += 1

    for folder, folders, names in os.walk(root, onerror=unreadable):
        folders[:] = [f for f in folders if f not in LEFT_OUT_FOLDERS and Path(folder, f) != left_out]
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if not selection.takes(relative):
                continue
            match _look_at(path, relative, selection.max_file_bytes):
                case Skipped() as reason:
                    skipped[reason] += 1
                case int() as size:
                    found.append(SourceFile(relative, size))
    found.sort(key=lambda file: (blake2b(f"{seed}/{file.path}".encode(), digest_size=8).digest(), file.path))
    return found, skipped


def read_text(root: Path, file: SourceFile) -> str | Skipped:
    try:
        data = (root / file.path).read_bytes()
    except OSError:
        return Skipped.UNREADABLE
    if b"\0" in data:
        return Skipped.BINARY
    try:
        return data.decode() or Skipped.EMPTY
    except UnicodeDecodeError:
        return Skipped.NOT_UTF8


def _look_at(path: Path, relative: str, max_bytes: int) -> int | Skipped:
    """The file's size where it is worth reading."""
    try:
        relative.encode()
    except UnicodeEncodeError:
        return Skipped.NAME
    if path.is_symlink() or not path.is_file():
        return Skipped.LINK
    try:
        size = path.stat().st_size
    except OSError:
        return Skipped.UNREADABLE
    if size == 0:
        return Skipped.EMPTY
    return Skipped.LARGE if size > max_bytes else size


def _matches(path: str, patterns: Sequence[str]) -> bool:
    name = path.rpartition("/")[2]
    return any(fnmatchcase(path, p) or fnmatchcase(name, p) for p in patterns)
