"""Logs: one JSON object a line in a cluster, one readable line in a terminal."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

STANDARD = frozenset(vars(logging.makeLogRecord({})))
"""What every record has; all else came by `extra=`."""


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    # kopf attaches settings and object references of its own to its records
    return {
        k: v
        for k, v in vars(record).items()
        if k not in STANDARD and k not in ("message", "asctime") and isinstance(v, (str, int, float))
    }


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class LineFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        extras = " ".join(f"{k}={v}" for k, v in _extras(record).items())
        return f"{line}  [{extras}]" if extras else line


def configure(level: str, style: Literal["json", "text", "auto"]) -> None:
    """Log to stderr. `auto`: text in a terminal, else JSON."""
    if style == "auto":
        style = "text" if sys.stderr.isatty() else "json"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else LineFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # kopf tells each handled event at INFO, aiohttp each scrape
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
