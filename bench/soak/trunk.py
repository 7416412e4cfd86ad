"""What of a disturbed run counts: the iterations that its checkpoints hold, and who trained them in which layout."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from starcoder_trainer.contract.assignment import Layout
from starcoder_trainer.contract.ledger import Entry


class HistoryGap(Exception):
    """Checkpoints came and went unseen, so that nobody can say any more which iterations counted."""


@dataclass(frozen=True)
class Stretch:
    """Iterations that one layout trained, up to and with `until`."""

    until: int
    layout: Layout


@dataclass
class Trunk:
    """All checkpoints that HEAD ever listed.

    Only the attempt that commits a checkpoint has trained the iterations since the one before: it began there or at
    one of its own, and whoever trained them earlier was cut off from committing.
    """

    committed: dict[int, int] = field(default_factory=dict)
    """Attempt by iteration."""
    layouts: dict[int, Layout] = field(default_factory=dict)
    """By attempt."""

    def see(self, entries: Iterable[Entry], layout: Callable[[Entry], Layout]) -> None:
        """Takes up what HEAD lists now.

        Args:
            layout: of the attempt that wrote a checkpoint; asked once an attempt.

        Raises:
            HistoryGap: nothing of it was listed the last time.
        """
        listed = tuple(entries)
        if self.committed and listed and not any(entry.step in self.committed for entry in listed):
            raise HistoryGap(
                f"HEAD lists checkpoints from iteration {listed[0].step} on, and was last seen with that of "
                f"{max(self.committed)}: look more often, or raise checkpoint.keepLast"
            )
        for entry in listed:
            if entry.attempt not in self.layouts:
                self.layouts[entry.attempt] = layout(entry)
            self.committed[entry.step] = entry.attempt

    def stretches(self) -> tuple[Stretch, ...]:
        found: list[Stretch] = []
        for until, attempt in sorted(self.committed.items()):
            if found and found[-1].layout == self.layouts[attempt]:
                found.pop()
            found.append(Stretch(until, self.layouts[attempt]))
        return tuple(found)

    def trained_by(self, iteration: int) -> int | None:
        """The attempt whose iteration of that number counts; None beyond the last checkpoint."""
        steps = sorted(self.committed)
        at = bisect_left(steps, iteration)
        return self.committed[steps[at]] if at < len(steps) else None

    def left_at(self, attempt: int, start: int, iteration: int) -> int:
        """Last iteration that counts of an attempt that began at `start`, before one that does not."""
        own = [step for step, by in self.committed.items() if by == attempt and step < iteration]
        return max([start, *own])

    def is_all(self, layout: Layout, after: int, upto: int) -> bool:
        """Whether that layout trained every iteration that counts of those beyond `after`, up to and with `upto`."""
        began = 0
        for stretch in self.stretches():
            if began < upto and stretch.until > after and stretch.layout != layout:
                return False
            began = stretch.until
        return upto <= began
