"""Planned leaving: a checkpoint at the next iteration, committed, then away; nothing is trained twice."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from devcluster.cluster import Cluster
from devcluster.controlplane import KubectlFailed
from examples.demo import stages
from starcoder_trainer.contract import names
from tests.support.cluster import Document, Run, manifest, started_at, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

NEVER: dict[str, Any] = {
    "training__iterations": 100_000,
    "checkpoint__everyIterations": 100_000,
    "workers__terminationGracePeriodSeconds": 60,
}
"""No checkpoint but those of leaving, and no end while a test looks at it."""


def iterations(run: Run, pod: str) -> list[int]:
    """Done, in the order in which a Pod's log tells them, over all its attempts."""
    log = run.kubectl("logs", pod, "-c", names.CONTAINER_WORKER, "--tail=-1")
    return [int(i) for i in re.findall(r"iteration\s+(\d+)/\d+ \| loss", log)]


def training(run: Run, iteration: int = 10) -> Document:
    return run.until(
        lambda s: s.get("state") == "Running" and s.get("iteration", 0) >= iteration, f"iteration {iteration} is done"
    )


def again(run: Run, before: Document) -> Document:
    """Status once a later attempt has done iterations."""
    return run.until(
        lambda s: (
            s.get("state") == "Running" and s["attempt"] > before["attempt"] and s["iteration"] > before["iteration"]
        ),
        "a later attempt trains",
    )


def test_a_drained_node_costs_no_iteration(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("drained", **NEVER)).apply()
    before = training(run)
    stays, node = run.pod_names()[0], run.node_of(1)
    drain = ("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=120s")
    try:
        trained_on.kubectl(*drain, timeout=150)
        status = again(run, before)
    finally:
        trained_on.kubectl("uncordon", node)
    done = iterations(run, stays)
    assert done == list(range(1, len(done) + 1)), "an iteration was trained twice or left out"
    assert status["lastFailure"]["cause"] in ("Disrupted", "PodDeleted")
    assert status["restartsWithoutProgress"] == 0
    assert run.node_of(1) != node
    run.delete()


def test_evictions_take_one_member_at_a_time(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("budget", **NEVER)).apply()
    before = training(run)
    first, second = run.pod_names()
    _evict(run, first)
    with pytest.raises(KubectlFailed, match="disruption budget"):
        _evict(run, second)
    status = again(run, before)
    assert status["restartsWithoutProgress"] == 0
    until(lambda: _evicted(run, second), "the second may go once the first is replaced")
    again(run, status)
    run.delete()
    until(
        lambda: not run.kubectl("get", "pdb", "-l", f"{names.LABEL_RUN}={run.name}", "-o", "name"),
        "the budget goes with the run",
    )


def _evict(run: Run, pod: str) -> None:
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod, "namespace": stages.NAMESPACE},
    }
    path = f"/api/v1/namespaces/{stages.NAMESPACE}/pods/{pod}/eviction"
    run.cluster.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))


def _evicted(run: Run, pod: str) -> bool:
    try:
        _evict(run, pod)
    except KubectlFailed:
        return False
    return True


def test_a_suspended_run_leaves_with_a_checkpoint_and_resumes_at_its_iteration(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("leaves-suspended", **NEVER)).apply()
    training(run)
    run.apply(suspend=True)
    status = run.until(lambda s: s.get("state") == "Suspended", "it is suspended")
    until(lambda: not run.all_pod_names(), "no Pod is left")
    left = run.head().entries[-1].step
    assert left >= 10
    assert status["checkpoint"]["iteration"] == left
    run.apply(suspend=False)
    training(run, left + 1)
    assert started_at(run) == left
    assert run.status["restarts"]["total"] == 0, "a suspension was counted as a failure"
    run.delete()


def test_a_deleted_run_leaves_with_a_checkpoint(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("leaves-deleted", **NEVER)).apply()
    before = training(run)
    run.delete()
    until(lambda: not run.all_pod_names(), "its Pods have ended")
    assert run.head().entries[-1].step >= before["iteration"]


@pytest.fixture
def urgent(trained_on: Cluster) -> Iterator[Cluster]:
    """With a PriorityClass above that of any run."""
    stages.apply(
        trained_on,
        {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "urgent"}, "value": 1000},
    )
    yield trained_on
    trained_on.kubectl("-n", stages.NAMESPACE, "delete", "pod", "urgent", "--ignore-not-found", "--wait=true")
    trained_on.kubectl("delete", "priorityclass", "urgent")


def test_a_preempted_member_has_the_gang_leave_and_the_run_resumes_at_that_iteration(urgent: Cluster) -> None:
    size = {"workers__replicas": 3, "training__globalBatchSize": 6}
    run = Run(urgent, manifest("preempted", **NEVER | size)).apply()
    before = training(run)
    stages.apply(urgent, _pause(urgent))
    run.until(lambda s: s["state"] != "Running", "it has left")
    until(lambda: run.head().entries, "with a checkpoint")
    left = run.head().entries[-1].step
    assert left >= before["iteration"]
    run.kubectl("delete", "pod", "urgent", "--wait=true")
    status = again(run, before)
    assert started_at(run, run.members()[0]) == left
    assert status["restarts"]["byCause"].keys() <= {"Disrupted", "PodDeleted"}
    run.delete()


def _pause(cluster: Cluster) -> Document:
    """A Pod that wants the GPUs of a whole node and may take them."""
    image = cluster.kubectl(
        "get", "pods", "-n", stages.NAMESPACE, "-o", "jsonpath={.items[0].spec.containers[0].image}"
    ).stdout
    unprivileged = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    container = {
        "name": "pause",
        "image": image,
        "command": ["sleep", "3600"],
        "resources": {"limits": {"nvidia.com/gpu": "2"}},
        "securityContext": unprivileged,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "urgent", "namespace": stages.NAMESPACE},
        "spec": {
            "priorityClassName": "urgent",
            "containers": [container],
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
        },
    }
