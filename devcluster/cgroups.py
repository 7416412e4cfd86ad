"""A control group a node, in every hierarchy of the machine (v1, hybrid or v2)."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

V2_CONTROLLERS = "+cpuset +cpu +io +memory +pids"


@dataclass(frozen=True)
class Hierarchy:
    """A mounted cgroup file system."""

    root: Path
    v2: bool
    options: frozenset[str]


def hierarchies(mountinfo: str) -> tuple[Hierarchy, ...]:
    """Those in the text of /proc/self/mountinfo (proc(5))."""
    found = {}
    for line in mountinfo.splitlines():
        mount, _, source = line.partition(" - ")
        kind, _, options = source.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            root = Path(mount.split()[4])
            found[root] = Hierarchy(root, kind == "cgroup2", frozenset(options.split(",")))
    return tuple(found.values())


def mounted() -> tuple[Hierarchy, ...]:
    return hierarchies(Path("/proc/self/mountinfo").read_text())


def create(name: str) -> None:
    """Makes group `name` at the root of each hierarchy, ready for a kubelet's `cgroupRoot`."""
    found = mounted()
    only_v2 = all(h.v2 for h in found)
    for hierarchy in found:
        group = hierarchy.root / name
        if only_v2:
            with suppress(OSError):  # given already, or this root may not; the kubelet names what it misses
                (hierarchy.root / "cgroup.subtree_control").write_text(V2_CONTROLLERS)
        group.mkdir(exist_ok=True)
        if only_v2:
            with suppress(OSError):
                (group / "cgroup.subtree_control").write_text(V2_CONTROLLERS)
        if "cpuset" in hierarchy.options:  # v1: a new group has none, and takes no process before it has
            for file in ("cpuset.cpus", "cpuset.mems"):
                (group / file).write_text((hierarchy.root / file).read_text())


def remove(name: str, seconds: float = 10) -> tuple[Path, ...]:
    """Removes group `name` and all below; those that still hold processes past the limit are returned.

    As a reboot would: a container's group that outlives its node costs the next kubelet seconds each.
    """
    end = time.monotonic() + seconds
    while left := _remove_empty(name):
        if time.monotonic() > end:
            return left
        time.sleep(0.02)
    return ()


def _remove_empty(name: str) -> tuple[Path, ...]:
    left = []
    for hierarchy in mounted():
        top = hierarchy.root / name
        if not top.is_dir():
            continue
        for group, _, _ in top.walk(top_down=False):
            try:
                group.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                left.append(group)
    return tuple(left)
