"""A real API server and a real S3 server on loopback, one of each for all tests of a session."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster.controlplane import Standalone
from devcluster.s3 import S3, make_buckets


@pytest.fixture(scope="session")
def kubeconfig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The admin's, of an API server that no controller manager and no node serves: each test has its own namespace."""
    standalone = Standalone(tmp_path_factory.mktemp("api-server"))
    try:
        yield standalone.start_api().site.pki.kubeconfig("admin")
    finally:
        standalone.stop()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    standalone = Standalone(tmp_path_factory.mktemp("s3-server"))
    try:
        yield standalone.start_s3()
    finally:
        standalone.stop()


@pytest.fixture
def bucket(s3_server: S3) -> str:
    """A bucket of the test's own."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    make_buckets(s3_server, [name])
    return name
