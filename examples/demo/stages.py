"""The steps of the demo, each of which can be cut and started again: cluster, images, operator, data, run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import yaml
from botocore.client import Config

import devcluster.images
from devcluster import binaries
from devcluster.cluster import Cluster, Options
from images.build import build

from .paths import PREPARE_FILE, REPOSITORY, RUN_FILE

CHART = REPOSITORY / "helm" / "starcoder-operator"
OPERATOR_NAMESPACE = "starcoder-system"
NAMESPACE = "training"
RUN = "demo"
JOB = "prepare"
CORPUS = "corpus"
CHECKPOINTS = "checkpoints"


class StageFailed(Exception):
    """A step did not come to its end; the message says what was found and where to look."""


def cluster_up(cluster: Cluster, nodes: int = 3, gpus_per_node: int = 2) -> None:
    cluster.up(Options(nodes=nodes, gpus_per_node=gpus_per_node))


def images_in(cluster: Cluster) -> dict[str, str]:
    """Image name to digest, built where needed and on every node."""
    built = build("operator", "trainer")
    for image in built.values():
        devcluster.images.load(cluster, image.reference)
    return {name: image.digest for name, image in built.items()}


def install(cluster: Cluster, operator_digest: str, **values: Any) -> None:
    """`helm install`, or upgrade. The digest is written on the Pods, so that a newer image of the tag is rolled out.

    Args:
        values: of the chart, at its top level.
    """
    values["podAnnotations"] = {"starcoder.dev/image-digest": operator_digest}
    given = [part for name, value in values.items() for part in ("--set-json", f"{name}={json.dumps(value)}")]
    cluster.helm(
        "upgrade", "--install", "starcoder-operator", str(CHART), "--namespace", OPERATOR_NAMESPACE,
        "--create-namespace", "--wait", "--timeout", "5m", *given, timeout=360,
    )  # fmt: skip


def storage(cluster: Cluster) -> None:
    """Namespace, Secret and buckets that the data and the run need."""
    cluster.make_buckets(CORPUS, CHECKPOINTS)
    restricted = {"pod-security.kubernetes.io/enforce": "restricted"}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": restricted}}
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "s3-credentials", "namespace": NAMESPACE},
        "stringData": {
            "AWS_ACCESS_KEY_ID": cluster.s3.access_key,
            "AWS_SECRET_ACCESS_KEY": cluster.s3.secret_key,
        },
    }
    apply(cluster, namespace, secret)


def s3_client(cluster: Cluster) -> Any:
    """To be used inside the cluster's network."""
    return boto3.client(
        "s3",
        endpoint_url=cluster.s3.endpoint,
        aws_access_key_id=cluster.s3.access_key,
        aws_secret_access_key=cluster.s3.secret_key,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )


def apply(cluster: Cluster, *objects: dict[str, Any]) -> None:
    for each in objects:
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps(each))


def start_data(cluster: Cluster) -> None:
    """Starts the prepare Job unless one has run or runs."""
    if job(cluster).get("status", {}).get("failed"):
        cluster.kubectl("delete", "job", JOB, "-n", NAMESPACE, "--wait=true")
    cluster.kubectl("apply", "-f", str(PREPARE_FILE))


def job(cluster: Cluster) -> dict[str, Any]:
    """The prepare Job; empty where there is none."""
    found = cluster.kubectl("get", "job", JOB, "-n", NAMESPACE, "-o", "json", "--ignore-not-found").stdout
    return json.loads(found) if found.strip() else {}


def job_ended(found: dict[str, Any]) -> str:
    """Complete, Failed, or empty while it runs."""
    conditions = found.get("status", {}).get("conditions") or []
    return next((c["type"] for c in conditions if c["type"] in ("Complete", "Failed") and c["status"] == "True"), "")


def job_log(cluster: Cluster, lines: int = 20) -> str:
    return cluster.kubectl("logs", f"job/{JOB}", "-n", NAMESPACE, f"--tail={lines}", check=False).stdout.rstrip()


def run_manifest() -> dict[str, Any]:
    manifest = yaml.safe_load(RUN_FILE.read_text())
    assert isinstance(manifest, dict)
    return manifest


def delete_run(cluster: Cluster, name: str = RUN) -> None:
    """An earlier demo's run and its checkpoints, so that this one starts at iteration 0 and says so."""
    found = cluster.kubectl("get", "scr", name, "-n", NAMESPACE, "-o", "name", "--ignore-not-found").stdout.strip()
    if found:
        cluster.kubectl("delete", "scr", name, "-n", NAMESPACE, "--cascade=foreground", "--wait=true", timeout=120)
    with cluster.inside():
        s3 = s3_client(cluster)
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=CHECKPOINTS, Prefix=f"{name}/"):
            for each in page.get("Contents", []):
                s3.delete_object(Bucket=CHECKPOINTS, Key=each["Key"])


def busy_node(cluster: Cluster) -> str:
    """Node with a Pod of the run, where there is a choice not the one of the operator that leads."""
    pods = json.loads(cluster.kubectl("get", "pods", "-A", "-o", "json").stdout)["items"]
    lease = json.loads(
        cluster.kubectl("get", "lease", "starcoder-operator", "-n", OPERATOR_NAMESPACE, "-o", "json").stdout
    )
    leader = (lease["spec"].get("holderIdentity") or "").partition("_")[0]
    avoided = {p["spec"]["nodeName"] for p in pods if p["metadata"]["name"] == leader and "nodeName" in p["spec"]}
    busy = [
        p["spec"]["nodeName"]
        for p in pods
        if p["metadata"].get("labels", {}).get("starcoder.dev/run") == RUN
        and p["status"].get("phase") == "Running"
        and "deletionTimestamp" not in p["metadata"]
    ]
    return str(next((node for node in busy if node not in avoided), busy[0]))


@contextmanager
def statuses(cluster: Cluster, name: str = RUN) -> Iterator[Iterator[dict[str, Any]]]:
    """The run's status now and after each change, as one `kubectl get --watch` tells it."""
    command = [
        str(binaries.path("kubectl")), "--kubeconfig", str(cluster.kubeconfig), "get", "scr", name, "-n", NAMESPACE,
        "--watch", "-o", 'jsonpath={.status}{"\\n"}',
    ]  # fmt: skip
    with cluster.inside():
        watch = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watch.stdout is not None
    try:
        yield (json.loads(line) for line in watch.stdout if line.strip())
    finally:
        watch.kill()
        watch.wait()
