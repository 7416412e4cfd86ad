"""When iterations were done, as the workers' logs tell: the runtime stamps each line, and all nodes are one machine."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

_LINE = re.compile(r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d+)Z (.*)$")
_BEGINS = re.compile(r"iteration (\d+) of \d+; ")
_DONE = re.compile(r"iteration (\d+)/\d+ \| loss")


@dataclass(frozen=True)
class Logged:
    at: float
    """Seconds since 1970."""
    iteration: int
    begins: bool
    """Workers start at this iteration; else it was just done."""


def read(log: str) -> list[Logged]:
    """Of `kubectl logs --timestamps`, in the log's order."""
    found = []
    for text in log.splitlines():
        if not (stamped := _LINE.match(text)):
            continue
        if not (said := _BEGINS.search(stamped[3]) or _DONE.search(stamped[3])):
            continue
        second = datetime.fromisoformat(stamped[1]).replace(tzinfo=UTC).timestamp()
        found.append(Logged(second + float(f"0.{stamped[2]}"), int(said[1]), said.re is _BEGINS))
    return found


def newest(logs: Iterable[list[Logged]]) -> int:
    """The last iteration that was done, as the log of any Pod tells; 0 where none does."""
    return max((entry.iteration for log in logs for entry in log if not entry.begins), default=0)


@dataclass(frozen=True)
class Resumption:
    at: float
    """When the first iteration after the fault was done, on the Pod where it was done last."""
    iterations_again: int | None
    """Done before the fault and done again; None where no log is left that reaches back before it."""


def resumption(logs: Iterable[list[Logged]], fault: float) -> Resumption | None:
    """How training went on after a fault at that time; None while it has not."""
    before, firsts, starts = [], [], []
    for log in logs:
        start = None
        for entry in log:
            if entry.begins:
                start = entry if entry.at > fault else None
            elif start is None:
                before.append(entry.iteration)  # also those done between the fault and its being noticed
            else:
                firsts.append(entry.at)
                starts.append(start.iteration)
                break
    if not firsts:
        return None
    return Resumption(max(firsts), max(0, max(before) - min(starts)) if before else None)
