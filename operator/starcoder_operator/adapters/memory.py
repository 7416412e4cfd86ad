"""What the operator remembers of runs between passes. Losing it costs API calls, never correctness."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from .nodes import RunKey


@dataclass
class RunMemory:
    uid: str
    problems: dict[str, str] = field(default_factory=dict)
    """What the last pass was refused: what was to be done -> the server's message."""
    access: tuple[int, float] | None = None
    """Generation for which ServiceAccount, Role and RoleBinding were seen to be right, and when [s]."""
    budget: tuple[int | None, float] | None = None
    """minAvailable of the run's PodDisruptionBudget as it was seen or written (None: there is none), and when [s]."""
    dry_run: int | None = None
    """Generation whose Pod the server accepted in a dry run."""
    progress_written: float = float("-inf")
    """When progress figures were last written [s]."""
    warned: set[str] = field(default_factory=set)
    """Objects whose oddity is logged already."""
    state: str = ""
    """As last planned."""


class Memory:
    """One entry a run; a run of another uid under the same name is another run."""

    def __init__(self) -> None:
        self._runs: dict[RunKey, RunMemory] = {}

    def of(self, key: RunKey, uid: str) -> RunMemory:
        memory = self._runs.get(key)
        if memory is None or memory.uid != uid:
            memory = self._runs[key] = RunMemory(uid)
        return memory

    def forget(self, key: RunKey) -> None:
        self._runs.pop(key, None)

    def __iter__(self) -> Iterator[RunKey]:
        return iter(list(self._runs))

    def runs_in(self, state: str) -> int:
        return Counter(m.state for m in self._runs.values())[state]
