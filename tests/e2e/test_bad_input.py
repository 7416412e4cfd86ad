"""What is wrong around a run is told in its status and in Events, harms nothing, and is mended with its cause."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest

import devcluster.images
from devcluster.cluster import Cluster, Options
from examples.demo import stages
from starcoder_trainer.contract import names
from tests.support.cluster import NAMESPACE, Document, Run, manifest, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SOON = 60.0
"""Generous; what users are promised is 15 s."""


@pytest.fixture
def start(trained_on: Cluster) -> Iterator[Any]:
    runs: list[Run] = []

    def apply(name: str, **changes: Any) -> Run:
        run = Run(trained_on, manifest(name, **changes))
        runs.append(run)
        return run.apply()

    yield apply
    for run in runs:
        run.delete()


def told(run: Run, kind: str, reason: str) -> Document:
    """The condition, an Event of the same reason beside it, and no container that crashes for it."""
    condition = run.until_reason(kind, reason)
    assert condition["status"] == "False"
    until(lambda: any(e["reason"] == reason for e in run.events()), f"a Warning Event {reason}", SOON)
    event = next(e for e in run.events() if e["reason"] == reason)
    assert event["type"] == "Warning"
    assert restarts(run) == 0, "a container crashed over it"
    assert run.status["restarts"]["total"] == 0
    return condition


def restarts(run: Run) -> int:
    return sum(
        c["restartCount"]
        for pod in run.pods()
        for c in [*pod["status"].get("initContainerStatuses", []), *pod["status"].get("containerStatuses", [])]
    )


def secret(cluster: Cluster, name: str, access: str, key: str) -> None:
    stages.apply(
        cluster,
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "stringData": {"AWS_ACCESS_KEY_ID": access, "AWS_SECRET_ACCESS_KEY": key},
        },
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"workers__replicas": 1, "workers__gpusPerWorker": 3}, "not divisible by parallelism"),
        ({"training__globalBatchSize": 5}, "is not a multiple of microBatchSize"),
        ({"data__tokenizer": "https://x/tokenizer.json"}, "no URI of the form s3://bucket/key"),
    ],
)
def test_what_can_be_seen_in_the_spec_is_refused_at_apply(
    trained_on: Cluster, changes: dict[str, Any], sentence: str
) -> None:
    document = json.dumps(manifest("refused", **changes))
    answer = trained_on.kubectl("apply", "-f", "-", stdin=document, check=False)
    assert answer.returncode != 0
    assert sentence in answer.stderr


def test_a_missing_secret_is_told_and_training_starts_when_it_is_there(start: Any, trained_on: Cluster) -> None:
    run = start("no-secret", storage__credentialsSecret="late")
    condition = told(run, "Training", "CredentialsMissing")
    assert "late" in condition["message"] or names.CREDENTIALS_DIR in condition["message"]
    secret(trained_on, "late", trained_on.s3.access_key, trained_on.s3.secret_key)
    run.until_state("Running", "Succeeded")


def test_a_wrong_key_is_told_without_the_key_and_training_starts_when_it_is_right(
    start: Any, trained_on: Cluster
) -> None:
    secret(trained_on, "wrong", trained_on.s3.access_key, "n0t-the-key")
    run = start("wrong-key", storage__credentialsSecret="wrong")
    told(run, "Training", "StorageAccessDenied")
    assert "n0t-the-key" not in json.dumps(run.get())
    secret(trained_on, "wrong", trained_on.s3.access_key, trained_on.s3.secret_key)
    run.until_state("Running", "Succeeded")


def test_a_missing_bucket_is_told_and_training_starts_when_it_is_made(start: Any, trained_on: Cluster) -> None:
    run = start("no-bucket", checkpoint__uri="s3://not-made-yet/run")
    condition = told(run, "Training", "BucketNotFound")
    assert "not-made-yet" in condition["message"]
    with trained_on.inside():
        stages.s3_client(trained_on).create_bucket(Bucket="not-made-yet")
    run.until_state("Running", "Succeeded")


def test_missing_data_is_told_and_training_starts_when_it_is_there(start: Any, trained_on: Cluster) -> None:
    run = start("no-data", data__sources__0__uri="s3://corpus/later")
    condition = told(run, "Training", "DataNotFound")
    assert "s3://corpus/later" in condition["message"]
    copy_objects(trained_on, "python/", "later/")
    run.until_state("Running", "Succeeded")


def test_a_tokenizer_that_the_data_was_not_made_with_is_told(start: Any, trained_on: Cluster) -> None:
    with trained_on.inside():
        s3 = stages.s3_client(trained_on)
        tokenizer = json.loads(s3.get_object(Bucket="corpus", Key="python/tokenizer.json")["Body"].read())
        tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
        s3.put_object(Bucket="corpus", Key="other/tokenizer.json", Body=json.dumps(tokenizer).encode())
    run = start("wrong-tokenizer", data__tokenizer="s3://corpus/other/tokenizer.json")
    told(run, "Training", "TokenizerMismatch")
    copy_objects(trained_on, "python/tokenizer.json", "other/tokenizer.json")
    run.until_state("Running", "Succeeded")


def test_an_image_that_no_registry_has_is_told_and_training_starts_when_it_is_loaded(
    start: Any, trained_on: Cluster
) -> None:
    run = start("no-image", workers__image="localhost/starcoder-trainer:not-loaded")
    condition = run.until_reason("Training", "ImagePullFailed")
    assert "localhost/starcoder-trainer:not-loaded" in condition["message"]
    until(lambda: any(e["reason"] == "ImagePullFailed" for e in run.events()), "a Warning Event", SOON)
    devcluster.images.load(trained_on, "localhost/starcoder-trainer:dev", tag="localhost/starcoder-trainer:not-loaded")
    run.until_state("Running", "Succeeded")


def test_an_image_named_wrongly_is_mended_by_naming_it_rightly(start: Any) -> None:
    run = start("image-typo", workers__image="localhost/starcoder-trianer:dev")
    run.until_reason("Training", "ImagePullFailed")
    run.apply(workers__image="localhost/starcoder-trainer:dev")
    run.until_state("Running", "Succeeded")


def test_gpus_that_do_not_exist_are_told_with_the_scheduler_s_words_and_mended_by_the_spec(start: Any) -> None:
    run = start("no-gpus", workers__gpuResource="example.com/gpu")
    told(run, "Scheduled", "Unschedulable")
    until(lambda: "example.com/gpu" in run.condition("Scheduled")["message"], "what the nodes lack", SOON)
    run.apply(workers__gpuResource="nvidia.com/gpu")
    run.until_state("Running", "Succeeded")


def test_a_pod_patch_that_the_server_refuses_is_told_before_anything_is_created(start: Any) -> None:
    run = start("bad-patch", workers__podPatch={"spec": {"containers": [{"name": "worker", "ports": "many"}]}})
    condition = run.until_reason("Accepted", "PodInvalid")
    assert condition["status"] == "False"
    assert not run.pods()
    run.apply(workers__podPatch={})
    run.until_state("Running", "Succeeded")


def test_a_secret_of_a_run_stays_out_of_status_logs_and_events(start: Any, trained_on: Cluster) -> None:
    run = start("discreet")
    run.until_state("Running", "Succeeded")
    seen = "".join(
        [
            json.dumps(run.get()),
            json.dumps(run.events()),
            run.kubectl("logs", "-l", f"{names.LABEL_RUN}={run.name}", "--all-containers", "--tail=-1"),
            run.kubectl("get", "pods,configmaps,leases", "-l", f"{names.LABEL_RUN}={run.name}", "-o", "json"),
        ]
    )
    key = trained_on.s3.secret_key
    assert key not in seen
    assert base64.b64encode(key.encode()).decode() not in seen


def test_a_server_without_gangs_is_told_and_the_fallback_that_is_named_works(ready: Cluster) -> None:
    cluster = Cluster("no-gangs")
    try:
        cluster.up(Options(nodes=1, gpus_per_node=4, node_monitor="fast", gangs=False))
        digests = stages.images_in(cluster)
        stages.install(cluster, digests["operator"])
        stages.storage(cluster)
        run = Run(cluster, manifest("ungrouped")).apply()
        condition = run.until_reason("Scheduled", "GangAPIAbsent")
        assert condition["status"] == "False"
        assert "gang: None" in condition["message"]
        assert not run.pods()
        run.apply(scheduling__gang="None")
        until(lambda: len(run.pods()) == 2, "both Pods are created one by one", dump=run.describe)
    finally:
        cluster.down()
        assert ready.running


def copy_objects(cluster: Cluster, source: str, target: str) -> None:
    with cluster.inside():
        s3 = stages.s3_client(cluster)
        for each in s3.list_objects_v2(Bucket="corpus", Prefix=source)["Contents"]:
            body = s3.get_object(Bucket="corpus", Key=each["Key"])["Body"].read()
            s3.put_object(Bucket="corpus", Key=target + each["Key"].removeprefix(source), Body=body)
