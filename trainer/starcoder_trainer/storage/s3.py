"""S3 and servers that speak its protocol, by boto3."""

from __future__ import annotations

import base64
import hashlib
import tempfile
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from starcoder_trainer.contract.config import StorageConfig

from .credentials import fingerprint, read_keys
from .s3_client import connect
from .s3_errors import RAISED, translate
from .store import Found, NotFound, PreconditionFailed, Stat, StorageError, Uploaded

PART_BYTES = 16 << 20
PARTS_AT_ONCE = 8
"""In flight of one file. One connection is capped by the service, so parallel parts are the only lever."""
MOST_PARTS = 10_000


@dataclass(frozen=True)
class _Clients:
    fingerprint: tuple[tuple[int, int, int], ...]
    normal: Any
    once: Any
    """Never repeats a request: after a lost answer the second try of a conditional write would meet the first one's
    object and report a defeat that was a victory."""


class S3Store:
    """`uri` is `s3://bucket` or `s3://bucket/prefix`; credentials are taken up anew whenever their files change."""

    def __init__(self, uri: str, storage: StorageConfig, credentials_dir: Path | None, attempts: int) -> None:
        parts = urllib.parse.urlsplit(uri)
        if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
            raise StorageError(f"{uri}: found no bucket, expected s3://bucket/prefix")
        self.uri = uri.rstrip("/")
        self._bucket = parts.netloc
        self._prefix = parts.path.strip("/")
        self._storage = storage
        self._credentials_dir = credentials_dir
        self._attempts = attempts
        self._lock = threading.Lock()
        self._clients: _Clients | None = None
        self._ca_file: Any = None

    # Reading

    def get(self, key: str) -> Found:
        return self._fetch(key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        data = self._fetch(key, Range=f"bytes={start}-{start + length - 1}").data
        if len(data) != length:
            raise StorageError(
                f"read {self._name(key)}: found {len(data)} bytes at {start}, expected {length}; the object is shorter "
                "than what refers to it says"
            )
        return data

    def stat(self, key: str) -> Stat:
        answer = self._try("stat", key, lambda c: c.normal.head_object(
            Bucket=self._bucket, Key=self._key(key), ChecksumMode="ENABLED"
        ))  # fmt: skip
        return Stat(key, answer["ContentLength"], answer["ETag"], answer.get("ChecksumSHA256", ""))

    def list(self, prefix: str = "") -> Iterator[Stat]:
        root = f"{self._prefix}/" if self._prefix else ""
        token: str | None = None
        while True:
            asked = {"Bucket": self._bucket, "Prefix": root + prefix} | ({"ContinuationToken": token} if token else {})
            page = self._try("list", prefix, partial(_list_page, asked=asked))
            for item in page.get("Contents", ()):
                yield Stat(item["Key"][len(root) :], item["Size"], item["ETag"])
            if not page.get("IsTruncated"):
                return
            token = page["NextContinuationToken"]

    # Writing

    def put(self, key: str, data: bytes) -> str:
        answer = self._try("write", key, lambda c: c.normal.put_object(
            Bucket=self._bucket, Key=self._key(key), Body=data, ChecksumSHA256=_b64(hashlib.sha256(data).digest())
        ))  # fmt: skip
        return str(answer["ETag"])

    def put_if_absent(self, key: str, data: bytes) -> str:
        return self._put_once(key, data, IfNoneMatch="*")

    def put_if_match(self, key: str, data: bytes, version: str) -> str:
        try:
            return self._put_once(key, data, IfMatch=version)
        except NotFound as e:
            # S3 answers 404 where the object to match is gone.
            raise PreconditionFailed(str(e)) from e

    def upload_file(self, key: str, path: Path) -> Uploaded:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= PART_BYTES:
                return self._upload_whole(key, file.read())
            return self._upload_parts(key, file, max(PART_BYTES, -(-size // MOST_PARTS)))

    def delete(self, key: str) -> None:
        try:
            self._try("delete", key, lambda c: c.normal.delete_object(Bucket=self._bucket, Key=self._key(key)))
        except NotFound:
            return

    # How

    def _upload_whole(self, key: str, data: bytes) -> Uploaded:
        digest = hashlib.sha256(data)
        self._try("write", key, lambda c: c.normal.put_object(
            Bucket=self._bucket, Key=self._key(key), Body=data, ChecksumSHA256=_b64(digest.digest())
        ))  # fmt: skip
        return Uploaded(len(data), digest.hexdigest(), _b64(digest.digest()))

    def _upload_parts(self, key: str, file: BinaryIO, part_bytes: int) -> Uploaded:
        """The server checks each part against its SHA-256, and keeps the SHA-256 of those (`<base64>-<parts>`)."""
        target = {"Bucket": self._bucket, "Key": self._key(key)}
        upload = self._try("start the upload of", key, lambda c: c.normal.create_multipart_upload(
            **target, ChecksumAlgorithm="SHA256"
        ))  # fmt: skip
        target["UploadId"] = upload["UploadId"]

        def send(number: int, data: bytes) -> tuple[int, str, bytes]:
            digest = hashlib.sha256(data).digest()
            answer = self._try("write", key, lambda c: c.normal.upload_part(
                **target, PartNumber=number, Body=data, ChecksumSHA256=_b64(digest)
            ))  # fmt: skip
            return number, answer["ETag"], digest

        whole, size, number = hashlib.sha256(), 0, 0
        waiting: set[Future[tuple[int, str, bytes]]] = set()
        sent: list[tuple[int, str, bytes]] = []
        try:
            with ThreadPoolExecutor(PARTS_AT_ONCE, "upload") as pool:
                try:
                    while data := file.read(part_bytes):
                        number += 1
                        size += len(data)
                        waiting.add(pool.submit(send, number, data))
                        whole.update(data)
                        if len(waiting) >= PARTS_AT_ONCE:
                            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                            sent += [f.result() for f in finished]
                    sent += [f.result() for f in waiting]
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
            sent.sort()
            parts = [{"PartNumber": n, "ETag": tag, "ChecksumSHA256": _b64(digest)} for n, tag, digest in sent]
            self._try("finish the upload of", key, lambda c: c.normal.complete_multipart_upload(
                **target, MultipartUpload={"Parts": parts}
            ))  # fmt: skip
        except BaseException:
            self._abort(key, target)
            raise
        composite = hashlib.sha256(b"".join(digest for _, _, digest in sent)).digest()
        return Uploaded(size, whole.hexdigest(), f"{_b64(composite)}-{len(sent)}")

    def _abort(self, key: str, target: dict[str, str]) -> None:
        try:
            self._try("abandon the upload of", key, lambda c: c.once.abort_multipart_upload(**target))
        except StorageError:
            return  # what made the upload fail is the error to report; the bucket's lifecycle rule removes the parts

    def _put_once(self, key: str, data: bytes, **condition: str) -> str:
        answer = self._try("write", key, lambda c: c.once.put_object(
            Bucket=self._bucket, Key=self._key(key), Body=data, **condition
        ))  # fmt: skip
        return str(answer["ETag"])

    def _fetch(self, key: str, **what: str) -> Found:
        for tries_left in reversed(range(self._attempts)):
            answer = self._try("read", key, lambda c: c.normal.get_object(
                Bucket=self._bucket, Key=self._key(key), **what
            ))  # fmt: skip
            try:
                return Found(answer["Body"].read(), answer["ETag"])
            except RAISED as e:  # boto3 retries a request, not a body that breaks off
                if not tries_left:
                    raise self._translate(e, "read", key) from e
        raise AssertionError("attempts is at least 1")

    def _try(self, operation: str, key: str, call: Callable[[_Clients], Any]) -> Any:
        try:
            return call(self._client())
        except RAISED as e:
            raise self._translate(e, operation, key) from e

    def _translate(self, error: BaseException, operation: str, key: str) -> StorageError:
        return translate(error, operation, self._name(key), self._storage.endpoint, self._credentials_dir)

    def _client(self) -> _Clients:
        found = fingerprint(self._credentials_dir)
        with self._lock:
            if self._clients is None or self._clients.fingerprint != found:
                self._clients = self._connect(found)
            return self._clients

    def _connect(self, found: tuple[tuple[int, int, int], ...]) -> _Clients:
        keys, ca_file = read_keys(self._credentials_dir), self._ca_bundle()
        normal, once = (connect(self._storage, keys, ca_file, attempts) for attempts in (self._attempts, 1))
        return _Clients(found, normal, once)

    def _ca_bundle(self) -> str | None:
        if not self._storage.ca_bundle:
            return None
        if self._ca_file is None:
            # botocore takes a path only; the file goes with the store.
            self._ca_file = tempfile.NamedTemporaryFile("w", prefix="starcoder-ca-", suffix=".pem")  # noqa: SIM115
            self._ca_file.write(self._storage.ca_bundle)
            self._ca_file.flush()
        return str(self._ca_file.name)

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix and key else self._prefix or key

    def _name(self, key: str) -> str:
        return f"{self.uri}/{key}" if key else self.uri


def _list_page(clients: _Clients, asked: dict[str, str]) -> Any:
    return clients.normal.list_objects_v2(**asked)


def _b64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
