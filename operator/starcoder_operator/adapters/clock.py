"""Time as the operator sees it: one clock for intervals, one for timestamps that people read."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds from an arbitrary start; never goes back."""
        ...

    def now(self) -> str:
        """RFC 3339, UTC, with milliseconds."""
        ...


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def now(self) -> str:
        return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def micro_time() -> str:
    """Now as metav1.MicroTime, which Leases and Events want."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
