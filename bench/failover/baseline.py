"""What one would run without an operator: the same trainer as an Indexed Job under torchrun, Kubernetes' defaults."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from devcluster.cluster import Cluster
from examples.demo import stages
from starcoder_operator.api.v1alpha1 import read_run
from starcoder_operator.domain.training_config import training_config
from starcoder_trainer.contract import names
from tests.support.cluster import manifest, until, worker_pids

from .iterations import Logged, read, resumption
from .ours import EVERY, GIVE_UP, Trial

NAME = "torchrun"
TITLE = "Indexed Job, torchrun c10d, Kubernetes defaults"
SCRIPT = Path(__file__).parents[1] / "torchrun_train.py"
USER = 10001


def objects() -> tuple[dict[str, Any], ...]:
    """Service, ConfigMap and Job: as `starcoder-tiny` in bench/failover/ours.py, 2 Pods x 2 workers."""
    settings = {"training__iterations": 10**6, "checkpoint__everyIterations": EVERY, "checkpoint__keepLast": 2}
    document = manifest(NAME, **settings)
    run = read_run(document)
    config = training_config(NAME, stages.NAMESPACE, f"uid-{NAME}", run.spec).to_json()
    metadata = {"name": NAME, "namespace": stages.NAMESPACE}
    labels = {"app": NAME}
    command = [
        "python", "-m", "torch.distributed.run", f"--nnodes={run.spec.workers.replicas}",
        f"--nproc-per-node={run.spec.workers.gpus_per_worker}", "--rdzv-backend=c10d", f"--rdzv-id={NAME}",
        f"--rdzv-endpoint={NAME}-0.{NAME}:29400", "--max-restarts=1000", "/bench/train.py", "/bench/config.json",
    ]  # fmt: skip
    container = {
        "name": names.CONTAINER_WORKER,
        "image": "localhost/starcoder-trainer:dev",
        "imagePullPolicy": "IfNotPresent",
        "command": command,
        "env": [
            {"name": "TMPDIR", "value": "/scratch"},
            {"name": "GLOO_SOCKET_IFNAME", "value": "eth0"},
            # Without it no restart ever succeeds here: agents count restarts apart, and workers meet in a store whose
            # keys are of the last one (https://github.com/pytorch/pytorch/issues/135712).
            {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"},
        ],
        "resources": {
            "limits": {run.spec.workers.gpu_resource: str(run.spec.workers.gpus_per_worker)},
            "requests": {"cpu": "100m", "memory": "1Gi"},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "scratch", "mountPath": "/scratch"},
            {"name": "bench", "mountPath": "/bench", "readOnly": True},
            {"name": "s3", "mountPath": names.CREDENTIALS_DIR, "readOnly": True},
        ],
    }
    pod = {
        "restartPolicy": "OnFailure",
        "subdomain": NAME,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "scratch", "emptyDir": {}},
            {"name": "bench", "configMap": {"name": NAME}},
            {"name": "s3", "secret": {"secretName": "s3-credentials"}},
        ],
    }
    replicas = run.spec.workers.replicas
    return (
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            # torchrun asks for the name before any Pod is ready
            "spec": {"clusterIP": "None", "selector": labels, "publishNotReadyAddresses": True},
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata,
            "data": {"train.py": SCRIPT.read_text(), "config.json": config},
        },
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": metadata,
            "spec": {
                "completionMode": "Indexed",
                "completions": replicas,
                "parallelism": replicas,
                "backoffLimit": 1000,
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        },
    )


class Torchrun:
    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def start(self) -> None:
        stages.apply(self.cluster, *objects())
        self.whole(0)

    def delete(self) -> None:
        for kind in ("job", "configmap", "service"):
            self.cluster.kubectl(
                "-n", stages.NAMESPACE, "delete", kind, NAME, "--ignore-not-found", "--wait=true", timeout=180
            )

    def pods(self) -> list[dict[str, Any]]:
        found = self.cluster.kubectl("-n", stages.NAMESPACE, "get", "pods", "-l", f"app={NAME}", "-o", "json").stdout
        return [p for p in json.loads(found)["items"] if "deletionTimestamp" not in p["metadata"]]

    def logs(self) -> list[list[Logged]]:
        """Of each Pod, what its container said before it was started again included."""
        return [read(self._log(p, "--previous") + self._log(p)) for p in self.pods()]

    def _log(self, pod: dict[str, Any], *which: str) -> str:
        argv = ("-n", stages.NAMESPACE, "logs", pod["metadata"]["name"], "--timestamps", "--tail=400", *which)
        return self.cluster.kubectl(*argv, check=False, timeout=20).stdout

    def whole(self, since: float) -> None:
        """It trains, and a checkpoint was written since then."""

        def trained() -> bool:
            done = [e for log in self.logs() for e in log if not e.begins and e.at > since]
            return len(done) >= 60 and len(self.pods()) == 2

        until(trained, "the baseline trains", GIVE_UP)

    def kill_worker(self, index: int) -> None:
        pod = self._pod(index)
        node = self.cluster.node(pod["spec"]["nodeName"])
        node.run("kill", "-9", str(worker_pids(node.ctr, pod)[-1]))

    def node_of(self, index: int) -> str:
        return str(self._pod(index)["spec"]["nodeName"])

    def _pod(self, index: int) -> dict[str, Any]:
        label = "batch.kubernetes.io/job-completion-index"
        return next(p for p in self.pods() if p["metadata"]["labels"][label] == str(index))


def crash_trial(job: Torchrun, number: int) -> Trial:
    began = time.time()
    job.kill_worker(number % 2)
    return _outcome(job, began)


def node_trial(job: Torchrun, number: int) -> Trial:
    """The node stays away until training goes on or the trial is given up."""
    node = job.node_of(number % 2)
    began = time.time()
    job.cluster.kill_node(node)
    try:
        return _outcome(job, began, settle=False)
    finally:
        job.cluster.start_node(node)
        job.cluster.mend()


def _outcome(job: Torchrun, began: float, *, settle: bool = True) -> Trial:
    end = time.monotonic() + GIVE_UP
    while time.monotonic() < end:
        if found := resumption(job.logs(), began):
            if settle:
                job.whole(began)
            return Trial(found.at - began, found.iterations_again)
        time.sleep(2)
    return Trial(GIVE_UP, censored=True)
