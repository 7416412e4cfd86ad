"""What a person sees of `prepare`: a bar a stage in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Protocol

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 5.0
"""Between two plain lines about one stage."""


class View(Protocol):
    def stage(self, name: str, total_bytes: int) -> None:
        """The stage before is over."""

    def advance(self, seen_bytes: int) -> None: ...

    def close(self) -> None: ...


class Bars:
    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("[bold]{task.description:<20}"),
            BarColumn(),
            DownloadColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._bars.start()

    def stage(self, name: str, total_bytes: int) -> None:
        self._task = self._bars.add_task(name, total=total_bytes)

    def advance(self, seen_bytes: int) -> None:
        self._bars.advance(self._task, seen_bytes)

    def close(self) -> None:
        self._bars.stop()


class Lines:
    def stage(self, name: str, total_bytes: int) -> None:
        self._name, self._total, self._seen = name, total_bytes, 0
        self._began = self._last_line = time.monotonic()
        self._say(f"{name}: {decimal(total_bytes)}")

    def advance(self, seen_bytes: int) -> None:
        self._seen += seen_bytes
        now = time.monotonic()
        if now - self._last_line >= LINE_SECONDS and self._seen:
            self._last_line = now
            left = (now - self._began) * (self._total - self._seen) / self._seen
            self._say(f"{self._name}: {decimal(self._seen)} of {decimal(self._total)}, ETA {left:.0f} s")

    def close(self) -> None:
        return

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def view() -> View:
    return Bars() if sys.stderr.isatty() else Lines()
