"""Which group of a fixed size each Pod comes in, where groups are told by their Pods alone (Kueue).

A group has room for a replacement when fewer of its Pods count than it has in all. One that is being deleted counts
until it has ended, and what comes beside it is deleted as one too many: so its replacement waits for that. One that has
succeeded counts for ever. Pods for which no group will have room, of a gang placed for the first time or anew or of a
run that was made larger, come in a group of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .members import MemberView
from .snapshot import PodView


@dataclass(frozen=True)
class Seat:
    group: str
    size: int
    """Pods that the group has in all."""


def seats(
    kept: Iterable[MemberView], pods: Iterable[PodView], missing: tuple[MemberView, ...], fresh: str
) -> dict[int, Seat]:
    """Missing member to its group; without those who wait for a Pod before them to end.

    Args:
        kept: members whose Pods stand. A group of which none stands is at its end and takes nobody.
        pods: all of the run.
        fresh: name of the group for those for whom no other will have room.
    """
    standing = {m.pod.uid: m.pod for m in kept if m.pod is not None and m.pod.scheduling_group and m.pod.group_size}
    sizes = {pod.scheduling_group: pod.group_size for pod in standing.values()}
    counting = [p for p in pods if p.scheduling_group in sizes and p.phase != "Failed" and (p.node or not p.deleting)]
    free: list[Seat] = []
    leaving = 0
    for name, size in sorted(sizes.items()):
        there = [p for p in counting if p.scheduling_group == name]
        free += [Seat(name, size)] * max(0, size - len(there))
        leaving += sum(p.uid not in standing and p.phase != "Succeeded" for p in there)
    at_once, rest = missing[: len(free)], missing[len(free) :]
    new = rest[leaving:]
    return dict(zip([m.index for m in at_once], free, strict=False)) | {m.index: Seat(fresh, len(new)) for m in new}
