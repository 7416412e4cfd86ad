"""What a person sees of a local run: a bar in a terminal, plain lines elsewhere, a summary at the end."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from starcoder_trainer.contract.report import Progress as Report
from starcoder_trainer.contract.report import Verified

LINE_SECONDS = 5.0
"""Between two plain lines about progress."""


class View(Protocol):
    def progress(self, now: Report) -> None: ...

    def say(self, text: str) -> None:
        """A line that stays."""

    def close(self) -> None: ...


class Bar:
    def __init__(self, iterations: int) -> None:
        self._bar = Progress(
            TextColumn("[bold]iteration {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task: TaskID = self._bar.add_task("", total=iterations, loss="-", rate="-")
        self._bar.start()

    def progress(self, now: Report) -> None:
        loss = "-" if now.loss is None else f"{now.loss:.4f}"
        self._bar.update(self._task, completed=now.iteration, loss=loss, rate=f"{now.tokens_per_second:,.0f}")

    def say(self, text: str) -> None:
        # Folded by the terminal, so that a path in it can still be copied.
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


class Lines:
    def __init__(self, iterations: int) -> None:
        self._iterations = iterations
        self._last_line = -LINE_SECONDS
        self._rate = 0.0
        self._began: tuple[float, int] | None = None

    def progress(self, now: Report) -> None:
        clock = time.monotonic()
        if self._began is None or now.iteration < self._began[1]:
            self._began = (clock, now.iteration)
        if clock - self._last_line < LINE_SECONDS and now.iteration < self._iterations:
            return
        self._last_line = clock
        seconds, done = clock - self._began[0], now.iteration - self._began[1]
        eta = f", ETA {(self._iterations - now.iteration) * seconds / done:.0f} s" if done else ""
        loss = "" if now.loss is None else f", loss {now.loss:.4f}"
        self.say(f"iteration {now.iteration}/{self._iterations}{loss}, {now.tokens_per_second:,.0f} tokens/s{eta}")

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        return


def view(iterations: int) -> View:
    return Bar(iterations) if sys.stderr.isatty() else Lines(iterations)


@dataclass
class Summary:
    """Gathered while the run goes on."""

    began: float = field(default_factory=time.monotonic)
    first: Report | None = None
    last: Report | None = None
    restarts: int = 0
    verified: Verified | None = None

    def progress(self, now: Report) -> None:
        if now.loss is not None:
            self.first = self.first or now
            self.last = now

    def lines(self, ending: str) -> list[str]:
        lines = [ending]
        if self.first and self.last:
            tokens = self.last.consumed_tokens
            lines.append(f"  iterations  {self.first.iteration} to {self.last.iteration}")
            lines.append(f"  loss        {self.first.loss:.4f} to {self.last.loss:.4f}")
            lines.append(f"  tokens      {tokens:,} in all")
        lines.append(f"  wall time   {time.monotonic() - self.began:.1f} s")
        lines.append(f"  restarts    {self.restarts}")
        if self.verified:
            where = (
                f"iteration {self.verified.checkpoint.step}, {self.verified.size_bytes:,} bytes, {self.verified.uri}"
            )
            lines.append(f"  checkpoint  {where}")
        return lines
