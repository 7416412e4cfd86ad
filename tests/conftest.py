"""What all tests share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from devcluster import binaries, packages
from images.build import build

# A property that holds holds on a busy machine too: how long an example takes is no part of it.
# In CI the examples are the same each time: a change is judged by what it changed. People's runs go on searching.
settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("untimed")

SERVERS = {"kubeconfig", "s3_server"}
CLUSTER = {"up"}
"""Fixtures that start programs of devcluster."""
IMAGES = {"built", "ready"}
"""Fixtures that need the shipped images."""


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Commands that are run in this process set the root logger up for themselves."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


def pytest_collection_finish(session: pytest.Session) -> None:
    """Programs and images are built before the first test's time begins to run: on a new machine that takes minutes."""
    wanted = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if session.config.option.collectonly or not wanted & (SERVERS | CLUSTER):
        return
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        if wanted & CLUSTER:
            packages.ensure(*packages.CLUSTER)
        binaries.build()
        if wanted & IMAGES:
            build()
