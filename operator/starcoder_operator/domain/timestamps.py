"""Differences and sums of the operator's own RFC 3339 timestamps. Never used on another machine's clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


def seconds_between(earlier: str, later: str) -> float:
    """Seconds from `earlier` to `later`; 0 where the clock went back."""
    return max(0.0, (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds())


def is_before(one: str, other: str) -> bool:
    return datetime.fromisoformat(one) < datetime.fromisoformat(other)


def whole_seconds(text: str) -> str:
    """As Kubernetes writes metav1.Time; what is below a second is cut off."""
    return after(text, 0)


def milliseconds(text: str) -> int:
    """Since 1970."""
    return round(datetime.fromisoformat(text).timestamp() * 1000)


def at_millisecond(number: int) -> str:
    """RFC 3339 of what `milliseconds` gives."""
    moment = datetime.fromtimestamp(number // 1000, UTC).replace(microsecond=number % 1000 * 1000)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def after(now: str, seconds: float) -> str:
    """The time `seconds` after `now`, whole seconds."""
    moment = datetime.fromisoformat(now) + timedelta(seconds=seconds)
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
