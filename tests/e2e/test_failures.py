"""Workers, Pods, nodes and the operator are lost; the run goes on from its newest verified checkpoint by itself."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from devcluster.cluster import Cluster
from starcoder_operator.domain.timestamps import seconds_between
from starcoder_trainer.contract import names
from tests.support.cluster import Run, local_share, manifest, resumed, started_at, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

LONG: dict[str, Any] = {"training__iterations": 5000}
"""Does not end while a test looks at it."""
OUTAGE = 60.0
"""Seconds that API server or S3 is away; several times what a heartbeat may miss."""


def losses(run: Run, *pods: str) -> dict[int, str]:
    """Iteration to loss, all digits, as the workers' logs tell."""
    found: dict[int, str] = {}
    for pod in pods:
        log = run.kubectl("logs", pod, "-c", names.CONTAINER_WORKER, "--tail=-1")
        found |= {int(i): loss for i, loss in re.findall(r"iteration\s+(\d+)/\d+ \| loss (\S+)", log)}
    return found


def files(run: Run) -> dict[str, str]:
    """Name to SHA-256 of the newest checkpoint's files: masters and optimizer state of every rank."""
    head = run.head()
    newest = head.entries[-1]
    return {f.name.rpartition("/")[2]: f.sha256 for f in run.checkpoint(newest).files}


def tells_its_story(run: Run, node: str) -> None:
    """What `kubectl describe scr` says of a run that lost a node and came to its end: no log is needed."""
    end, created = run.status, run.get()["metadata"]["creationTimestamp"]
    (record,) = end["recoveries"]
    assert record["node"] == node
    assert record["cause"] in ("NodeLost", "AgentUnresponsive")
    assert record["iterationsLost"] == record["iteration"] - record["resumedAt"]
    assert {"detecting", "placing", "forming", "loading", "firstStep"} <= record["seconds"].keys()
    assert record["total"] == pytest.approx(sum(record["seconds"].values()))
    buckets, lived = end["goodput"]["buckets"], seconds_between(created, end["completedAt"])
    assert sum(buckets.values()) == pytest.approx(lived, rel=0.01, abs=2)
    assert buckets["training"] > 0
    assert buckets["placing"] == record["seconds"]["placing"]
    assert (buckets["retraining"] > 0) == (record["iterationsLost"] > 0)
    told = {e["reason"]: e["message"] for e in run.events()}
    assert f"after {record['cause']} of node {node}" in told["Recovered"]
    described = run.kubectl("describe", "scr", run.name)
    for words in ("Recoveries:", "Goodput:", "Conditions:", node, told["Recovered"], "CheckpointVerified"):
        assert words in described


def test_after_a_killed_worker_the_survivors_keep_their_pods_and_train_from_the_checkpoint(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("worker-killed", **LONG)).apply()
    before, pods = run.until_checkpoint(), run.pod_names()
    run.kill_worker(member=1)
    status = resumed(run, before)
    assert run.pod_names() == pods
    assert started_at(run) >= before["checkpoint"]["iteration"] > 0
    assert status["restarts"]["total"] == 1
    assert status["lastFailure"]["cause"] == "Crash"
    assert status["lastFailure"]["exitCode"] == -9
    assert [local_share(run, member) for member in (0, 1)] == [1.0, 1.0], "what their disks hold was read from S3"
    run.delete()


def test_a_worker_container_that_is_killed_starts_again_in_its_pod_and_training_resumes(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("container", **LONG)).apply()
    before, pods = run.until_checkpoint(), run.pod_names()
    run.kill_container(1, names.CONTAINER_WORKER)
    status = resumed(run, before)
    assert run.pod_names() == pods
    (worker,) = (c for c in run.pod_of(1)["status"]["containerStatuses"] if c["name"] == names.CONTAINER_WORKER)
    assert worker["restartCount"] == 1
    assert status["restarts"]["byCause"] == {"ContainerCrashed": 1}, status["lastFailure"]
    assert started_at(run) >= before["checkpoint"]["iteration"] > 0
    run.delete()


def test_a_run_without_gangs_replaces_a_lost_pod_and_resumes(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("gangless", **LONG, scheduling__gang="None")).apply()
    before = run.until_checkpoint()
    assert run.kubectl("get", "podgroups", "-l", f"{names.LABEL_RUN}=gangless", "-o", "name") == ""
    assert not any("schedulingGroup" in pod["spec"] for pod in run.pods())
    run.kubectl("delete", "pod", "gangless-w1-0", "--wait=false")
    status = resumed(run, before)
    assert run.pod_names() == ["gangless-w0-0", "gangless-w1-1"]
    assert status["restarts"]["byCause"] == {"PodDeleted": 1}
    run.delete()


def test_another_parallelism_is_a_planned_transition_with_a_checkpoint(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("reshaped", **LONG, training__globalBatchSize=8)).apply()
    before = run.until_checkpoint()
    assert (before["layout"]["tensor"], before["layout"]["data"]) == (2, 2)
    pods = run.pod_names()
    run.apply(parallelism__tensor=1)
    status = run.until(
        lambda s: s.get("state") == "Running" and s["layout"]["tensor"] == 1, "it trains in the new layout"
    )
    assert status["layout"]["data"] == 4
    assert run.pod_names() == pods
    assert status["restarts"]["total"] == 0, "a change that was asked for was counted as a failure"
    left = max(entry.step for entry in run.head().entries if entry.attempt == before["attempt"])
    assert started_at(run) == left >= before["checkpoint"]["iteration"]
    run.delete()


def test_another_number_of_pods_is_a_planned_transition_with_a_checkpoint(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("resized", **LONG, training__globalBatchSize=12)).apply()
    before, pods = run.until_checkpoint(), run.pod_names()
    run.apply(workers__replicas=3)
    status = run.until(lambda s: s.get("state") == "Running" and s["layout"]["data"] == 3, "it trains with three")
    assert run.pod_names() == [*pods, "resized-w2-0"]
    assert status["restarts"]["total"] == 0, "a change that was asked for was counted as a failure"
    left = max(entry.step for entry in run.head().entries if entry.attempt < status["attempt"])
    assert started_at(run) == left >= before["checkpoint"]["iteration"]
    run.apply(workers__replicas=2)
    status = run.until(lambda s: s.get("state") == "Running" and s["layout"]["data"] == 2, "it trains with two again")
    until(lambda: len(run.all_pod_names()) == 2, "the third Pod is gone", dump=run.describe)
    assert status["restarts"]["total"] == 0
    run.delete()


def test_a_deleted_pod_is_replaced_under_a_new_name(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("pod-deleted", **LONG)).apply()
    before = run.until_checkpoint()
    run.kubectl("delete", "pod", "pod-deleted-w1-0", "--wait=false")
    status = resumed(run, before)
    assert run.pod_names() == ["pod-deleted-w0-0", "pod-deleted-w1-1"]
    assert started_at(run) >= before["checkpoint"]["iteration"] > 0
    assert status["lastFailure"]["cause"] == "PodDeleted"
    assert status["restartsWithoutProgress"] == 0
    run.delete()


def test_a_run_that_lost_a_node_ends_bitwise_as_one_that_was_never_disturbed(trained_on: Cluster) -> None:
    changes: dict[str, Any] = {
        "training__iterations": 150,
        "checkpoint__everyIterations": 25,
        "model__dropout": 0.1,
    }
    calm = Run(trained_on, manifest("calm", **changes)).apply()
    calm.until_state("Succeeded", "Failed", seconds=600)
    calm_losses = losses(calm, "calm-w0-0")
    assert sorted(calm_losses) == list(range(1, 151))

    run = Run(trained_on, manifest("node-killed", **changes)).apply()
    before = run.until_checkpoint()
    node = run.node_of(1)
    trained_on.kill_node(node)
    try:
        status = resumed(run, before)
        assert status["lastFailure"]["cause"] in ("NodeLost", "AgentUnresponsive")
        assert status["lastFailure"]["node"] == node
        assert started_at(run) >= before["checkpoint"]["iteration"] > 0
        end = run.until_state("Succeeded", "Failed", seconds=600)
        assert end["state"] == "Succeeded", run.describe()
    finally:
        trained_on.start_node(node)
    assert end["restartsWithoutProgress"] == 0, "the loss of a node was charged to the run"
    run_losses = losses(run, run.pods()[0]["metadata"]["name"])
    assert {i: loss for i, loss in run_losses.items() if i in calm_losses} == {
        i: loss for i, loss in calm_losses.items() if i in run_losses
    }
    assert max(run_losses) == 150
    assert files(run) == files(calm)
    tells_its_story(run, node)
    trained_on.kubectl("wait", "node", node, "--for=condition=Ready", "--timeout=120s", timeout=130)


def test_the_gang_waits_whole_when_one_pod_does_not_fit_and_starts_when_room_appears(trained_on: Cluster) -> None:
    node = trained_on.nodes[0].name
    trained_on.kubectl("cordon", node)
    try:
        run = Run(trained_on, manifest("gang", workers__replicas=3, training__globalBatchSize=6)).apply()
        condition = run.until_reason("Scheduled", "Unschedulable")
        assert condition["status"] == "False"
        assert not [p["metadata"]["name"] for p in run.pods() if p["spec"].get("nodeName")], "a part of it was placed"
        assert run.status["state"] == "Pending"
    finally:
        trained_on.kubectl("uncordon", node)
    run.until_state("Running")
    assert len({p["spec"]["nodeName"] for p in run.pods()}) == 3
    run.delete()


def test_training_does_not_notice_that_the_operator_is_deleted(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("operator-gone", **LONG)).apply()
    before = run.until_checkpoint()
    run.kill_operator()
    status = run.until(
        lambda s: s.get("checkpoint", {}).get("iteration", 0) > before["checkpoint"]["iteration"] + 20,
        "checkpoints go on and the new operator tells of them",
    )
    assert status["attempt"] == before["attempt"]
    assert status["restarts"]["total"] == 0
    assert run.pod_names() == ["operator-gone-w0-0", "operator-gone-w1-0"]
    run.delete()


def test_an_operator_that_is_deleted_in_the_middle_of_a_recovery_is_followed_by_one_that_ends_it(
    trained_on: Cluster,
) -> None:
    run = Run(trained_on, manifest("mid-recovery", **LONG)).apply()
    before = run.until_checkpoint()
    run.kubectl("delete", "pod", "mid-recovery-w0-0", "--wait=false")
    run.until(lambda s: s.get("state") == "Recovering", "the failure is recorded")
    run.kill_operator()
    status = resumed(run, before)
    assert run.pod_names() == ["mid-recovery-w0-1", "mid-recovery-w1-0"]
    assert status["restarts"]["total"] == 1, "one failure was counted twice"
    assert status["attempt"] == before["attempt"] + 1
    run.delete()


def test_training_outlasts_an_api_server_that_is_away(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("api-away", **LONG)).apply()
    before, head = run.until_checkpoint(), run.head()
    trained_on.stop_component("apiserver")
    back = time.monotonic() + OUTAGE
    try:
        until(
            lambda: run.head().entries[-1].step >= head.entries[-1].step + 40 and time.monotonic() > back,
            "checkpoints are verified without an API server",
        )
    finally:
        trained_on.start_component("apiserver")
    status = run.until(
        lambda s: s.get("state") == "Running" and s["checkpoint"]["iteration"] > before["checkpoint"]["iteration"] + 40,
        "the operator tells of them once it is back",
    )
    assert status["attempt"] == before["attempt"]
    assert status["restarts"]["total"] == 0
    run.delete()


def test_a_storage_that_is_away_costs_no_attempt(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("s3-away", **LONG)).apply()
    before = run.until_checkpoint()
    trained_on.stop_component("s3")
    back = time.monotonic() + OUTAGE
    try:
        said = run.until(
            lambda s: (
                any(c["reason"] == "StorageUnreachable" for c in s.get("conditions") or []) and time.monotonic() > back
            ),
            "the trouble is told",
        )
    finally:
        trained_on.start_component("s3")
    status = run.until(
        lambda s: (s.get("checkpoint") or {}).get("iteration", 0) > said["iteration"], "checkpoints are verified again"
    )
    assert status["attempt"] == before["attempt"], "an outage of S3 shorter than its retries ended the attempt"
    run.delete()


def test_an_error_of_the_user_s_fails_the_run_at_once_in_python_s_words(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("no-kernel", training__attentionBackend="flash-attn-2")).apply()
    status = run.until_state("Failed", "Succeeded")
    assert (status["state"], status["attempt"]) == ("Failed", 1)
    assert status["lastFailure"]["cause"] == "UserError"
    words = "training.attentionBackend: flash-attn-2 was asked for and can't be used (flash-attn-2: no CUDA device)"
    assert words in status["lastFailure"]["message"]
    assert words in status["message"]
    run.delete()


def test_gpus_that_were_allotted_and_not_injected_are_missed_and_nothing_trains_on_the_cpu(trained_on: Cluster) -> None:
    """As on a node whose container runtime knows nothing of GPUs. The dev cluster's device plugin says that the CPU is
    meant to be used; this Pod is not told so."""
    env = [{"name": "CUDA_VISIBLE_DEVICES", "value": "0,1"}]
    patch = {"spec": {"containers": [{"name": names.CONTAINER_WORKER, "env": env}]}}
    changes = {"workers__podPatch": patch, "failurePolicy__maxRestartsWithoutProgress": 0}
    run = Run(trained_on, manifest("not-injected", **changes)).apply()
    status = run.until_state("Failed", "Succeeded")
    assert status["state"] == "Failed"
    assert status["lastFailure"]["cause"] == "DeviceError"
    assert "set workers.runtimeClassName" in status["lastFailure"]["message"]
    assert status["lastFailure"]["node"]
    run.delete()
