"""What the kernel knows of a process (Linux, /proc)."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcState:
    state: str
    """One letter: R runs, S sleeps, D waits for a device or a disk, T is stopped by a signal, t by a debugger, Z has
    ended; empty where the kernel does not say."""
    waits_in: str
    """The kernel's function that it sleeps in; empty where that is not told."""
    catches: int
    """Bit n - 1: signal n has a handler."""
    blocks: int

    def answers(self, number: signal.Signals) -> bool:
        """The signal has a handler or is waited for; otherwise sending it might end the process."""
        return bool((self.catches | self.blocks) >> (number - 1) & 1)


def proc_state(pid: int, root: Path = Path("/proc")) -> ProcState:
    folder = root / str(pid)
    fields = dict(line.split(":", 1) for line in _text(folder / "status").splitlines() if ":" in line)
    waits_in = _text(folder / "wchan").strip()
    return ProcState(
        state=fields.get("State", "").strip()[:1],
        waits_in="" if waits_in == "0" else waits_in,
        catches=int(fields.get("SigCgt", "0"), 16),
        blocks=int(fields.get("SigBlk", "0"), 16),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
