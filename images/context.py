"""What an image is made from, copied aside: what is hashed is what is built, whoever edits the sources meanwhile."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

STAMP = 1577836800
"""Modification time of every staged file (2020-01-01): a checkout or a `touch` must not look like a change."""


def stage(ignore_file: Path, into: Path, *, repository: Path = REPOSITORY) -> str:
    """Copies to `into` what `ignore_file` admits of the repository; returns the SHA-256 of names, modes and contents.

    The ignore file is the one that `docker build` reads: everything is out but the paths after a `!`. Byte code
    is left out.
    """
    digest = hashlib.sha256()
    for path in admitted(ignore_file, repository):
        relative = path.relative_to(repository)
        try:
            content, mode = path.read_bytes(), path.stat().st_mode
        except FileNotFoundError:
            continue  # an editor's temporary file, gone since it was listed
        mode = 0o755 if mode & 0o111 else 0o644
        digest.update(f"{relative}\0{mode:o}\0{len(content)}\0".encode())
        digest.update(content)
        copy = into / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(content)
        copy.chmod(mode)
        os.utime(copy, (STAMP, STAMP))
    for folder in (into, *(p for p in into.rglob("*") if p.is_dir())):
        folder.chmod(0o755)
        os.utime(folder, (STAMP, STAMP))
    return digest.hexdigest()


def admitted(ignore_file: Path, repository: Path) -> Iterator[Path]:
    """The files after a `!`, in order. Raises FileNotFoundError for a path that the repository lacks."""
    named = [line[1:] for line in ignore_file.read_text().splitlines() if line.startswith("!")]
    for name in sorted(named):
        path = repository / name
        if path.is_file():
            yield path
        elif path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        else:
            raise FileNotFoundError(f"{ignore_file} admits {name}, which {repository} doesn't have")
