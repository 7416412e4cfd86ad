"""Waiting on conditions while watching that what should bring them about is still alive."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from .process import Daemon, ProcessFailed


def until(
    condition: Callable[[], bool], what: str, daemons: Iterable[Daemon], *, seconds: float = 180, every: float = 0.05
) -> None:
    """Returns once `condition` holds. Raises ProcessFailed when a daemon has died or the limit has passed."""
    daemons = tuple(daemons)
    end = time.monotonic() + seconds
    while not condition():
        for daemon in daemons:
            if daemon.identity() is None:
                raise ProcessFailed(f"{daemon.name} died while we waited until {what}; {daemon.last_words()}")
        if time.monotonic() > end:
            logs = "\n".join(daemon.last_words() for daemon in daemons)
            raise ProcessFailed(f"not within {seconds:.0f} s: {what}\n{logs}")
        time.sleep(every)
