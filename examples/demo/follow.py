"""A run as a person follows it: a bar in a terminal, plain lines elsewhere, and the figures of the summary."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

LINE_SECONDS = 5.0
"""Between two plain lines that tell of nothing but progress."""

Status = dict[str, Any]


@dataclass
class Story:
    """What happened, gathered from one status after the other."""

    first: Status | None = None
    last: Status = field(default_factory=dict)
    killed: str = ""
    """The node, if one was."""
    attempt_at_fault: int = 0

    def fault(self, node: str) -> None:
        """A node is killed now."""
        self.killed = node
        self.attempt_at_fault = self.last.get("attempt", 0)

    def saw(self, status: Status) -> None:
        self.last = status
        if status.get("loss") is not None and self.first is None:
            self.first = status

    @property
    def recovery(self) -> Status | None:
        """The operator's own record of the fault: a status is seconds old when it is seen, and can't time one."""
        records = self.last.get("recoveries") or []
        return next((r for r in records if r.get("toAttempt", 0) > self.attempt_at_fault and "total" in r), None)

    @property
    def over(self) -> bool:
        return self.last.get("state") in ("Succeeded", "Failed")


class View:
    """Shows a status each time it changes."""

    def __init__(self, console: Console, iterations: int) -> None:
        self.console = console
        self._line_at = -LINE_SECONDS
        self._told = ""
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[rate]} tokens/s"),
                TimeElapsedColumn(),
                TextColumn("ETA {task.fields[eta]}"),
                console=console,
            )
            self._task = self._bar.add_task("Pending", total=iterations, loss="-", rate="-", eta="-")
            self._bar.start()

    def show(self, status: Status) -> None:
        rate = status.get("tokensPerSecond")
        loss, rate_text = status.get("loss") or "-", "-" if rate is None else f"{rate:,}"
        news = f"{status.get('state')}: {status.get('message', '')}"
        if news != self._told and status.get("state") != "Running":
            self._told = news
            self.say(f"  {news}")
        elif status.get("state") == "Running":
            self._told = ""
        if self._bar is not None:
            self._bar.update(
                self._task, description=status.get("state", ""), completed=status.get("iteration", 0), loss=loss,
                rate=rate_text, eta=(status.get("eta") or "-").partition("T")[2] or "-",
            )  # fmt: skip
        elif status.get("state") == "Running" and time.monotonic() - self._line_at >= LINE_SECONDS:
            self._line_at = time.monotonic()
            done = f"{status.get('iteration', 0)}/{status.get('iterations', 0)}"
            self.say(f"  iteration {done}, loss {loss}, {rate_text} tokens/s, ETA {status.get('eta') or '-'}")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def summary(story: Story, seconds: float) -> list[str]:
    """Lines of the end."""
    first, last = story.first or {}, story.last
    checkpoint = last.get("checkpoint") or {}
    restarts = last.get("restarts") or {}
    causes = ", ".join(f"{cause} {n}" for cause, n in sorted((restarts.get("byCause") or {}).items()))
    lines = [
        f"state        {last.get('state')}",
        f"loss         {first.get('loss')} (iteration {first.get('iteration')}) -> {last.get('loss')} "
        f"(iteration {last.get('iteration')})",
        f"tokens       {last.get('consumedTokens', 0):,}",
        f"restarts     {restarts.get('total', 0)}" + (f" ({causes})" if causes else ""),
    ]
    if story.killed and (recovery := story.recovery) is not None:
        lines.append(
            f"lost         {recovery['total']:.1f} s from the death of node {story.killed} to training again; "
            f"iterations done again: {recovery['iterationsLost']}"
        )
    lines += [
        f"checkpoint   iteration {checkpoint.get('iteration')}, verified {checkpoint.get('committedAt')}, "
        f"{checkpoint.get('uri')}",
        f"wall time    {seconds:.0f} s",
    ]
    return lines
