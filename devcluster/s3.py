"""versitygw: an S3 server with conditional writes, its objects plain files in the cluster's state folder."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from . import binaries
from .process import Daemon, Identity


@dataclass(frozen=True)
class S3:
    """How to reach a server."""

    endpoint: str
    access_key: str
    secret_key: str


@dataclass(frozen=True)
class Server:
    """The server of a state folder, listening on address:port inside a network namespace (empty: here)."""

    folder: Path
    address: str
    port: int
    netns: str = ""

    @property
    def daemon(self) -> Daemon:
        return Daemon("s3", self.folder)

    @property
    def credentials(self) -> S3:
        """Made at first use, kept for this machine's user alone."""
        path = self.folder / "s3-credentials.json"
        try:
            return S3(**json.loads(path.read_text()))
        except FileNotFoundError:
            made = S3(f"http://{self.address}:{self.port}", secrets.token_hex(10), secrets.token_urlsafe(30))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            path.write_text(json.dumps(asdict(made)))
            return made

    def start(self) -> Identity:
        """Returns at once; `make_buckets` and clients retry until it answers."""
        objects = self.folder / "s3"
        objects.mkdir(parents=True, exist_ok=True)
        credentials = self.credentials
        return self.daemon.start(
            (binaries.path("versitygw"), "--quiet", "--port", f"{self.address}:{self.port}", "posix", objects),
            netns=self.netns,
            tied=not self.netns,
            env={"ROOT_ACCESS_KEY": credentials.access_key, "ROOT_SECRET_KEY": credentials.secret_key},
        )


def make_buckets(server: S3, names: Iterable[str]) -> None:
    """Buckets that are there once it returns. The calling thread must reach the server (`Cluster.inside`)."""
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        config=Config(
            s3={"addressing_style": "path"},
            proxies={},
            connect_timeout=5,
            read_timeout=10,
            retries={"max_attempts": 10, "mode": "standard"},  # it may still be starting
        ),
    )
    owned = client.exceptions.BucketAlreadyOwnedByYou
    for name in names:
        with suppress(owned):
            client.create_bucket(Bucket=name)
