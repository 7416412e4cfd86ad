"""boto3's clients of S3, cheap to make: what boto3 has read of S3's API serves all of a process and of its forks.

Each session of boto3 parses the API's description anew, 50 ms of CPU. A worker asks half a dozen stores as it starts,
so that restarts would spend more time on that than on building a small model.
"""

from __future__ import annotations

import threading
from typing import Any

import boto3
from botocore.config import Config

from starcoder_trainer.contract.config import StorageConfig

from .credentials import Keys

CONNECT_SECONDS = 3.0
READ_SECONDS = 30.0
CONNECTIONS = 32
"""Kept open a client: several files are uploaded at once, each in parts that are (`s3.PARTS_AT_ONCE`)."""

_session = boto3.session.Session()
_making = threading.Lock()
"""Clients may be used by all threads, but a session makes them for one at a time."""


def connect(storage: StorageConfig, keys: Keys | None, ca_file: str | None, attempts: int) -> Any:
    """A client. Nothing is asked yet.

    Args:
        keys: None: the SDK's default chain is asked for credentials.
        ca_file: PEM; None for the system's certificates.
        attempts: Tries of a request that gets no answer.
    """
    with _making:
        return _session.client(
            "s3",
            aws_access_key_id=keys.access_key if keys else None,
            aws_secret_access_key=keys.secret_key if keys else None,
            aws_session_token=keys.session_token if keys else None,
            region_name=storage.region,
            endpoint_url=storage.endpoint or None,
            verify=ca_file,
            config=Config(
                connect_timeout=CONNECT_SECONDS,
                read_timeout=READ_SECONDS,
                retries={"mode": "standard", "total_max_attempts": attempts},
                max_pool_connections=CONNECTIONS,
                s3={"addressing_style": "path" if storage.path_style else "auto"},
            ),
        )


def prepare() -> None:
    """Have the API's description read now, before this process forks. Asks nobody and starts no thread."""
    connect(StorageConfig(), Keys("none", "none"), None, 1)
