"""Fixtures: one dev cluster for all tests of a session, whole before each test, its words beside each failure."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from devcluster.cluster import Cluster, Options
from examples.demo import stages
from tests.support.cluster import until

NAME = "e2e"


@pytest.fixture(scope="session")
def up() -> Iterator[Cluster]:
    """3 nodes x 2 simulated GPUs; a silent node is lost after 5 s."""
    cluster = Cluster(NAME)
    cluster.down()  # one that a session which was killed has left is in an unknown state
    cluster.up(Options(nodes=3, gpus_per_node=2, node_monitor="fast"))
    yield cluster
    cluster.down()


@pytest.fixture
def cluster(up: Cluster) -> Iterator[Cluster]:
    """Whole again after each test, whatever the test broke."""
    yield up
    up.mend()


@pytest.fixture(scope="session")
def ready(up: Cluster) -> Cluster:
    """With what the demo has before its run: images on the nodes, the chart installed, data prepared."""
    digests = stages.images_in(up)
    stages.install(up, digests["operator"])
    stages.storage(up)
    stages.start_data(up)
    until(lambda: stages.job_ended(stages.job(up)), "the prepare Job ends", dump=lambda: stages.job_log(up))
    assert stages.job_ended(stages.job(up)) == "Complete", stages.job_log(up)
    return up


@pytest.fixture
def trained_on(ready: Cluster, cluster: Cluster) -> Iterator[Cluster]:
    """The cluster that runs are applied to; what a test leaves of them is deleted, so that the GPUs are free again."""
    stages.images_in(ready)  # costs nothing where they are still there
    yield ready
    ready.mend()
    ready.kubectl("delete", "scr", "--all", "-n", stages.NAMESPACE, "--wait=true", timeout=120)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and Cluster(NAME).running:
        report.sections.append(("dev cluster", describe(Cluster(NAME))))
    return report


def describe(cluster: Cluster) -> str:
    """What one looks at first when a test has failed."""

    def said(*arguments: str) -> str:
        try:
            done: Any = cluster.kubectl(*arguments, check=False, timeout=20)
        except Exception as e:  # the failure that is reported must not be hidden by one of the reporting
            return f"kubectl {' '.join(arguments)}: {e!r}"
        return f"$ kubectl {' '.join(arguments)}\n{done.stdout}{done.stderr}"

    parts = [
        said("get", "nodes,pods,podgroups,starcoderruns", "-A", "-o", "wide"),
        said("get", "events", "-A", "--sort-by=.lastTimestamp"),
    ]
    logs = [log for node in cluster.nodes for log in node.logs()]
    logs += [cluster.plane.daemon(name).log for name in ("apiserver", "controller-manager", "scheduler", "s3")]
    for log in logs:
        if log.exists() and (lines := log.read_text(errors="replace").splitlines()[-10:]):
            parts.append("\n".join([f"== {log.name}", *lines]))
    return "\n".join(parts)
