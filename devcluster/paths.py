"""Where the dev cluster keeps things: one base for caches and state, on one file system so that hard links work."""

from __future__ import annotations

import os
from pathlib import Path


def cache() -> Path:
    """Base of all caches; STARCODER_CACHE overrides it."""
    named = os.environ.get("STARCODER_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "starcoder-operator"


def state(name: str) -> Path:
    """Folder of one cluster: its keys, etcd, nodes, logs and pid files."""
    return cache() / "devcluster" / name
