"""What a cluster may leave on a machine, looked for in the kernel's own lists rather than in our files."""

from __future__ import annotations

import os
from pathlib import Path

from . import cgroups, network, paths
from .addresses import is_netns_of


class LeftBehind(RuntimeError):
    """A removed cluster is not gone."""

    def __init__(self, cluster: str, left: tuple[str, ...]) -> None:
        super().__init__(f"cluster {cluster} is stopped, but not gone; left are:\n  " + "\n  ".join(left))


def found(cluster: str) -> tuple[str, ...]:
    """Namespaces, processes, mounts, cgroups and files of a cluster, one line each."""
    folder = str(paths.state(cluster))
    lines = [f"network namespace {netns}" for netns in network.existing(cluster)]
    lines += [f"process {pid}: {command}" for pid, command in _processes(folder)]
    lines += mounts(cluster)
    for hierarchy in cgroups.mounted():
        groups = hierarchy.root.glob(f"{cluster}-n*")
        lines += [f"cgroup {group}" for group in groups if is_netns_of(cluster, group.name)]
    if Path(folder).exists():
        lines.append(f"folder {folder}")
    return tuple(lines)


def mounts(cluster: str) -> tuple[str, ...]:
    """Mounts on or below a cluster's folder, and mounts of what is in it elsewhere."""
    folder = str(paths.state(cluster))
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        source, place = line.split()[3:5]
        if any(p == folder or p.startswith(f"{folder}/") for p in (source, place)):
            found.append(f"mount {place}")
    return tuple(found)


def _processes(folder: str) -> list[tuple[int, str]]:
    """Those with the cluster's folder on their command line or in their environment's CLUSTER."""
    said = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            variables = (entry / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if f"{folder}/" in command or f"CLUSTER={folder}".encode() in variables:
            said.append((int(entry.name), command.strip()))
    return said
