"""From a URI to its store."""

from __future__ import annotations

from pathlib import Path

from starcoder_trainer.contract.config import StorageConfig

from .file import FileStore
from .s3 import S3Store
from .store import ObjectStore, StorageError


def open_store(
    uri: str,
    storage: StorageConfig,
    credentials_dir: Path | None = None,
    allow_file: bool = False,
    *,
    attempts: int = 3,
) -> ObjectStore:
    """Nothing is asked yet: the first operation says whether it can be reached.

    Args:
        uri: `s3://bucket/prefix`, or `file:///folder` where `allow_file`.
        credentials_dir: Mounted Secret; where it holds no keys, or is None, the SDK's default chain is asked.
        attempts: Tries of an operation that gets no answer; a dead endpoint is given up after about 4 s a try.

    Raises:
        StorageError: the URI has another scheme or no bucket.
    """
    scheme = uri.partition("://")[0] if "://" in uri else ""
    match scheme:
        case "s3":
            return S3Store(uri, storage, credentials_dir, attempts)
        case "file" if allow_file:
            return FileStore(uri)
        case "file":
            raise StorageError(f"{uri}: expected s3://bucket/prefix; only local runs may name files")
    raise StorageError(f"{uri}: found scheme {scheme!r}, expected s3://bucket/prefix")


def split_uri(uri: str) -> tuple[str, str]:
    """`s3://bucket/a/b.json` -> (`s3://bucket/a`, `b.json`): store and key of one object.

    Raises:
        StorageError: the URI names no object.
    """
    parent, _, name = uri.rstrip("/").rpartition("/")
    if not name or parent.endswith(":/") or "://" not in parent:
        raise StorageError(f"{uri}: found no object name, expected e.g. s3://bucket/path/tokenizer.json")
    return parent, name
