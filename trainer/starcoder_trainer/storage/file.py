"""A local folder behind the same interface, for training without Kubernetes on one machine.

Conditional writes hold a lock file and replace atomically; that is enough for processes of one machine, and not
for a network file system, which is why only local runs may name `file://` URIs.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from .store import BucketNotFound, Found, NotFound, PreconditionFailed, Stat, StorageError, Unreachable, Uploaded

_HIDDEN = ".starcoder-"
"""Prefix of the lock and of files being written; never listed."""
_CHUNK_BYTES = 1 << 20


class FileStore:
    """`uri` is `file:///folder`. The folder is made by the first write."""

    def __init__(self, uri: str) -> None:
        parts = urllib.parse.urlsplit(uri)
        if parts.scheme != "file" or parts.netloc or not parts.path.startswith("/"):
            raise StorageError(f"{uri}: expected file:///absolute/folder")
        self.uri = uri.rstrip("/")
        self.root = Path(urllib.parse.unquote(parts.path))

    def get(self, key: str) -> Found:
        try:
            with self._path(key).open("rb") as file:
                return Found(file.read(), _version(os.fstat(file.fileno())))
        except OSError as e:
            raise self._translate(e, "read", key) from e

    def get_range(self, key: str, start: int, length: int) -> bytes:
        try:
            with self._path(key).open("rb") as file:
                file.seek(start)
                data = file.read(length)
        except OSError as e:
            raise self._translate(e, "read", key) from e
        if len(data) != length:
            raise StorageError(
                f"read {self._name(key)}: found {len(data)} bytes at {start}, expected {length}; the file is shorter "
                "than what refers to it says"
            )
        return data

    def stat(self, key: str) -> Stat:
        try:
            st = self._path(key).stat()
        except OSError as e:
            raise self._translate(e, "stat", key) from e
        return Stat(key, st.st_size, _version(st))

    def list(self, prefix: str = "") -> Iterator[Stat]:
        if not self.root.is_dir():
            raise BucketNotFound(f"list {self.uri}: no such folder; create it, or correct the URI")
        # Only the folder part of the prefix narrows the walk; the rest is compared, as S3 does.
        folder = self.root / prefix.rpartition("/")[0]
        for path in sorted(folder.rglob("*")):
            key = path.relative_to(self.root).as_posix()
            if key.startswith(prefix) and not path.name.startswith(_HIDDEN) and path.is_file():
                try:
                    st = path.stat()
                except FileNotFoundError:
                    continue  # deleted since
                yield Stat(key, st.st_size, _version(st))

    def put(self, key: str, data: bytes) -> str:
        with self._locked(key):
            return self._replace(key, data)

    def put_if_absent(self, key: str, data: bytes) -> str:
        with self._locked(key):
            if self._path(key).exists():
                raise PreconditionFailed(f"write {self._name(key)}: it exists; somebody else wrote it first")
            return self._replace(key, data)

    def put_if_match(self, key: str, data: bytes, version: str) -> str:
        with self._locked(key):
            try:
                found = self.stat(key).version
            except NotFound as e:
                raise PreconditionFailed(f"write {self._name(key)}: it is gone; somebody else deleted it") from e
            if found != version:
                raise PreconditionFailed(f"write {self._name(key)}: it changed; somebody else wrote it first")
            return self._replace(key, data)

    def upload_file(self, key: str, path: Path) -> Uploaded:
        digest, size = hashlib.sha256(), 0
        try:
            with path.open("rb") as source, self._writing(key) as target:
                while data := source.read(_CHUNK_BYTES):
                    digest.update(data)
                    size += len(data)
                    target.write(data)
        except OSError as e:
            raise self._translate(e, "write", key) from e
        return Uploaded(size, digest.hexdigest(), "")

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)
            for folder in path.parents:
                if folder == self.root or any(folder.iterdir()):
                    break
                folder.rmdir()
        except FileNotFoundError:
            return
        except OSError as e:
            raise self._translate(e, "delete", key) from e

    def _replace(self, key: str, data: bytes) -> str:
        try:
            with self._writing(key) as file:
                file.write(data)
            return self.stat(key).version
        except OSError as e:
            raise self._translate(e, "write", key) from e

    @contextmanager
    def _writing(self, key: str) -> Iterator[tempfile._TemporaryFileWrapper[bytes]]:
        """A file that takes the key's place, whole and on disk, when the block ends well."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_HIDDEN, delete=False) as file:
            temporary = Path(file.name)
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / f"{_HIDDEN}lock").open("w")
        except OSError as e:
            raise self._translate(e, "write", key) from e
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _path(self, key: str) -> Path:
        parts = PurePosixPath(key).parts
        if key.startswith("/") or ".." in parts:
            raise StorageError(f"{self.uri}: found key {key!r}, expected one below the folder")
        return self.root.joinpath(*parts)

    def _name(self, key: str) -> str:
        return f"{self.uri}/{key}" if key else self.uri

    def _translate(self, error: OSError, operation: str, key: str) -> StorageError:
        where = f"{operation} {self._name(key)}"
        if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
            return NotFound(f"{where}: no such file")
        return Unreachable(f"{where}: {error.strerror or error}; check the folder's permissions and free space")


def _version(st: os.stat_result) -> str:
    # Each write makes a new inode, so two versions can't share all three.
    return f"{st.st_ino:x}-{st.st_mtime_ns:x}-{st.st_size:x}"
