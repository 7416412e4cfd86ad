"""One line of a benchmark's output."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

Unit = Literal["s", "%", "MB", "MB/s", "tokens/s", "%-of-raw", "MFU%", "ratio-up", "iterations"]


@dataclass(frozen=True)
class Sample:
    """Trials of one measurement. A trial that did not end in time counts with the time it was given, and is told."""

    values: tuple[float, ...]
    censored: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Baseline:
    name: str
    sample: Sample


def line(
    bench: str, unit: Unit, sample: Sample, *, goal: float | None = None, baseline: Baseline | None = None, **more: Any
) -> str:
    """`{"bench": …, "unit": …, "n": …, "median": …, "max": …}` and what is known beside it, as JSON."""
    document: dict[str, Any] = {"bench": bench, "unit": unit, **_figures(sample)}
    if goal is not None:
        document["goal"] = goal
    if baseline is not None:
        document["baseline"] = {"name": baseline.name, **_figures(baseline.sample)}
    document |= more
    document["load"] = round(os.getloadavg()[0], 1)
    document["date"] = datetime.now(UTC).date().isoformat()
    return json.dumps(document)


def _figures(sample: Sample) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "n": len(sample.values),
        "median": round(sample.median, 2),
        "max": round(max(sample.values), 2),
        "values": [round(v, 2) for v in sample.values],
    }
    if sample.censored:
        figures["censored"] = sample.censored
    return figures


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Median of each key over the rows that have it."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: round(statistics.median(row[key] for row in rows if key in row), 2) for key in keys}
