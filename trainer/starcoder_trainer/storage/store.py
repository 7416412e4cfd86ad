"""One small interface over S3 and a local folder: bytes by key, with conditional writes.

Keys are relative to the store's root URI (`s3://bucket/prefix` or `file:///folder`). A version tag (S3's ETag) is
opaque and only compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class StorageError(Exception):
    """Any failure of the store; subclasses name what to do about it."""


class NotFound(StorageError):
    """The key does not exist."""


class BucketNotFound(StorageError):
    """The bucket (or root folder) does not exist."""


class AccessDenied(StorageError):
    """Credentials are wrong or not allowed to do this."""


class CredentialsMissing(StorageError):
    """No credentials were found where they were expected."""


class Unreachable(StorageError):
    """No answer in time, a connection error, or a server error after retries: the outcome may be unknown."""


class PreconditionFailed(StorageError):
    """Somebody else wrote the key first (HTTP 412, or 409 for a concurrent conditional write)."""


@dataclass(frozen=True)
class Found:
    data: bytes
    version: str


@dataclass(frozen=True)
class Stat:
    key: str
    size: int
    version: str
    checksum: str = ""
    """Of `stat` only: the `Uploaded.checksum` that the store keeps beside the object; empty where it keeps none."""


@dataclass(frozen=True)
class Uploaded:
    """A file as it was read for its upload."""

    size: int
    sha256: str
    """Hex."""
    checksum: str
    """What the store checked the received bytes against and keeps (`Stat.checksum`); empty where it keeps none."""


class ObjectStore(Protocol):
    """Thread-safe. Every method raises a StorageError subclass; the message names URI, operation and what to do."""

    uri: str

    def get(self, key: str) -> Found: ...

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes; a short answer is an error."""

    def stat(self, key: str) -> Stat: ...

    def list(self, prefix: str = "") -> Iterator[Stat]: ...

    def put(self, key: str, data: bytes) -> str:
        """Returns the new version."""

    def put_if_absent(self, key: str, data: bytes) -> str:
        """One try, never retried by the SDK. Raises PreconditionFailed, or Unreachable where the outcome is unknown."""

    def put_if_match(self, key: str, data: bytes, version: str) -> str:
        """As `put_if_absent`, where the key still has `version`."""

    def upload_file(self, key: str, path: Path) -> Uploaded:
        """Multipart in parallel where large; the file is read once."""

    def delete(self, key: str) -> None:
        """Deleting what is not there succeeds."""
