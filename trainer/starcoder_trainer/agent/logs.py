"""Log lines of an agent: one JSON object a line on stderr, each with run, attempt, member and iteration."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime


class JsonFormatter(logging.Formatter):
    """`context` is read at each line, so that whoever owns it can keep it up to date."""

    def __init__(self, context: Mapping[str, object]) -> None:
        super().__init__()
        self._context = context

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._context,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def log_json(context: Mapping[str, object]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(context))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # They log each request, some with headers, at DEBUG, and each lost connection at INFO.
    for name in ("botocore", "boto3", "urllib3", "kubernetes", "aiohttp"):
        logging.getLogger(name).setLevel(logging.WARNING)
