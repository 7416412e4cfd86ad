"""A StarCoderRun on the dev cluster, as a test sees and disturbs it: through kubectl, the nodes and S3."""

from __future__ import annotations

import copy
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from devcluster.cluster import Cluster
from examples.demo import stages
from starcoder_trainer.contract import names
from starcoder_trainer.contract.ledger import HEAD_KEY, Entry, Head, Manifest, checkpoint_prefix

NAMESPACE = stages.NAMESPACE
PATIENCE = 240.0
"""Seconds; a condition that is not met by then never will be."""
SHARE = float(os.environ.get("PATIENCE_SHARE", "1"))
"""Of all such times; less where a test is to fail (tests/mutation)."""

Document = dict[str, Any]


def until[T](found: Callable[[], T], what: str, seconds: float = PATIENCE, dump: Callable[[], str] | None = None) -> T:
    """The first truthy answer. Fails with `what` and what `dump` says."""
    seconds *= SHARE
    end = time.monotonic() + seconds
    while not (answer := found()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:.0f} s: {what}" + (f"\n{dump()}" if dump else ""))
        time.sleep(0.25)
    return answer


def manifest(name: str, **changes: Any) -> Document:
    """The demo's run under another name, short, with fields set: `manifest("a", workers__replicas=3)`."""
    document = copy.deepcopy(stages.run_manifest())
    document["metadata"]["name"] = name
    changes = {
        "checkpoint__uri": f"s3://{stages.CHECKPOINTS}/{name}",
        "checkpoint__everyIterations": 10,
        "training__iterations": 60,
        "data__sequenceLength": 128,
        "training__globalBatchSize": 4,
        "training__microBatchSize": 2,
        "training__optimizer__warmupIterations": 5,
        **changes,
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = document["spec"]
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        if isinstance(place, list):
            place[int(last)] = value
        else:
            place[last] = value
    return document


def _condition(status: Document, kind: str) -> Document:
    return next((c for c in status.get("conditions") or [] if c["type"] == kind), {})


class Run:
    def __init__(self, cluster: Cluster, document: Document) -> None:
        self.cluster = cluster
        self.document = document
        self.name: str = document["metadata"]["name"]
        self.bucket, _, self.prefix = document["spec"]["checkpoint"]["uri"].removeprefix("s3://").partition("/")

    # what a user does

    def apply(self, **changes: Any) -> Run:
        for path, value in changes.items():
            *parents, last = path.split("__")
            place = self.document["spec"]
            for part in parents:
                place = place.setdefault(part, {})
            place[last] = value
        self.cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(self.document))
        return self

    def delete(self) -> None:
        self.kubectl("delete", "scr", self.name, "--ignore-not-found", "--wait=true", timeout=120)

    # what can be seen

    def kubectl(self, *args: str, **options: Any) -> str:
        return self.cluster.kubectl("-n", NAMESPACE, *args, **options).stdout

    def get(self) -> Document:
        found: Document = json.loads(self.kubectl("get", "scr", self.name, "-o", "json"))
        return found

    @property
    def status(self) -> Document:
        return self.get().get("status") or {}

    def condition(self, kind: str) -> Document:
        return _condition(self.status, kind)

    def pods(self) -> list[Document]:
        """Pods of the run that are not being deleted, by name."""
        found = json.loads(self.kubectl("get", "pods", "-l", f"{names.LABEL_RUN}={self.name}", "-o", "json"))["items"]
        return sorted(
            (p for p in found if "deletionTimestamp" not in p["metadata"]), key=lambda p: str(p["metadata"]["name"])
        )

    def pod_names(self) -> list[str]:
        return [p["metadata"]["name"] for p in self.pods()]

    def all_pod_names(self) -> list[str]:
        """Of the run, those that are being deleted included."""
        found = json.loads(self.kubectl("get", "pods", "-l", f"{names.LABEL_RUN}={self.name}", "-o", "json"))["items"]
        return sorted(str(p["metadata"]["name"]) for p in found)

    def assignment(self) -> Document:
        """As the agents read it."""
        text = self.kubectl("get", "configmap", names.assignment_name(self.name), "-o", "json")
        found: Document = json.loads(json.loads(text)["data"][names.ASSIGNMENT_KEY])
        return found

    def members(self) -> list[int]:
        """Indexes of the members that take part in the attempt, in rank order."""
        return [int(m["index"]) for m in self.assignment()["members"]]

    def pod_of(self, member: int) -> Document:
        """The one that is not being deleted."""
        return next(p for p in self.pods() if p["metadata"]["labels"][names.LABEL_MEMBER] == str(member))

    def node_of(self, member: int) -> str:
        pods = [p for p in self.pods() if p["metadata"]["labels"][names.LABEL_MEMBER] == str(member)]
        return str(pods[-1]["spec"]["nodeName"])

    def nodes_ready(self) -> bool:
        """Every node of the cluster is Ready."""
        nodes = json.loads(self.cluster.kubectl("get", "nodes", "-o", "json").stdout)["items"]
        ready = [c["status"] for n in nodes for c in n["status"]["conditions"] if c["type"] == "Ready"]
        return len(nodes) == len(self.cluster.nodes) and all(status == "True" for status in ready)

    def events(self) -> list[Document]:
        found: Document = json.loads(self.kubectl("get", "events", "-o", "json"))
        return [e for e in found["items"] if e["involvedObject"].get("name") == self.name]

    def describe(self) -> str:
        """For a test that fails."""
        parts = [
            self.kubectl("describe", "scr", self.name, check=False),
            self.kubectl("get", "pods", "-o", "wide", check=False),
            self.kubectl(
                "logs", "-l", f"{names.LABEL_RUN}={self.name}", "--all-containers", "--prefix", "--tail=15", check=False
            ),
            self.cluster.kubectl(
                "logs", "-n", stages.OPERATOR_NAMESPACE, "-l", "app.kubernetes.io/component=operator", "--prefix",
                "--tail=25", check=False,
            ).stdout,
        ]  # fmt: skip
        return "\n---\n".join(parts)

    # waiting

    def until(self, found: Callable[[Document], Any], what: str, seconds: float = PATIENCE) -> Document:
        """Status as soon as `found` says yes to it."""
        last: Document = {}

        def look() -> bool:
            nonlocal last
            last = self.status
            return bool(found(last))

        until(look, f"{self.name}: {what}", seconds, self.describe)
        return last

    def until_state(self, *states: str, seconds: float = PATIENCE) -> Document:
        return self.until(lambda s: s.get("state") in states, f"state {' or '.join(states)}", seconds)

    def until_reason(self, kind: str, reason: str, seconds: float = PATIENCE) -> Document:
        """The condition, as soon as it has that reason."""
        has = self.until(
            lambda s: _condition(s, kind).get("reason") == reason, f"condition {kind} with reason {reason}", seconds
        )
        return _condition(has, kind)

    def until_checkpoint(self, after: int = 0) -> Document:
        """Status once a checkpoint of a later iteration than `after` is verified and iterations pass."""
        return self.until(
            lambda s: s.get("state") == "Running" and (s.get("checkpoint") or {}).get("iteration", 0) > after,
            f"a verified checkpoint after iteration {after}",
        )

    # S3

    def head(self) -> Head:
        with self.cluster.inside():
            body = stages.s3_client(self.cluster).get_object(Bucket=self.bucket, Key=f"{self.prefix}/{HEAD_KEY}")
            return Head.from_json(body["Body"].read())

    def checkpoint(self, entry: Entry) -> Manifest:
        with self.cluster.inside():
            key = f"{self.prefix}/{checkpoint_prefix(entry.attempt, entry.step)}/manifest.json"
            body = stages.s3_client(self.cluster).get_object(Bucket=self.bucket, Key=key.replace("//", "/"))
            return Manifest.from_json(body["Body"].read())

    def objects(self, prefix: str = "") -> list[str]:
        """Keys below `checkpoint.uri`, relative to it, that begin so."""
        root = f"{self.prefix}/" if self.prefix else ""
        with self.cluster.inside():
            pages = stages.s3_client(self.cluster).get_paginator("list_objects_v2")
            found = [
                o["Key"]
                for p in pages.paginate(Bucket=self.bucket, Prefix=root + prefix)
                for o in p.get("Contents", ())
            ]
        return [key.removeprefix(root) for key in found]

    # faults

    def kill_worker(self, member: int, rank_process: int = -1, signal: str = "KILL") -> None:
        """A signal to one worker process of that member, from the node."""
        self.worker_killer(member, rank_process, signal)()

    def worker_killer(self, member: int, rank_process: int = -1, signal: str = "KILL") -> Callable[[], object]:
        """The process is looked up now, and killed when what is returned is called."""
        pod = self.pod_of(member)
        node = next(n for n in self.cluster.nodes if n.name == pod["spec"]["nodeName"])
        pids = worker_pids(node.ctr, pod)
        return lambda: node.run("kill", f"-{signal}", str(pids[rank_process]))

    def kill_container(self, member: int, container: str) -> None:
        """SIGKILL to the first process of that member's container."""
        pod = self.pod_of(member)
        node = next(n for n in self.cluster.nodes if n.name == pod["spec"]["nodeName"])
        statuses = [*pod["status"]["initContainerStatuses"], *pod["status"]["containerStatuses"]]
        found = next(c for c in statuses if c["name"] == container)
        node.ctr("tasks", "kill", "--signal", "SIGKILL", found["containerID"].removeprefix("containerd://"))

    def operators_node(self) -> str:
        """Where the replica of the operator that leads is."""
        space = ("-n", stages.OPERATOR_NAMESPACE, "-o", "jsonpath={.spec.nodeName}")
        return self.cluster.kubectl("get", "pod", self._leader(), *space).stdout

    def _leader(self) -> str:
        """Name of the operator's Pod that leads."""
        space = ("-n", stages.OPERATOR_NAMESPACE, "-o", "jsonpath={.spec.holderIdentity}")
        return self.cluster.kubectl("get", "lease", "starcoder-operator", *space).stdout.partition("_")[0]

    def hand_over_leadership(self) -> None:
        """To the other replica; a new one comes for the one that has led."""
        before = self._leader()
        self.cluster.kubectl("delete", "pod", before, "-n", stages.OPERATOR_NAMESPACE, "--wait=true", timeout=120)
        until(lambda: self._leader() not in ("", before) and self.operators_ready(), "another replica leads")

    def operators_ready(self) -> bool:
        """All replicas are, and none is on its way out."""
        space = ("-n", stages.OPERATOR_NAMESPACE, "-o", "json")
        wanted = json.loads(self.cluster.kubectl("get", "deployment", "starcoder-operator", *space).stdout)["spec"]
        labels = "app.kubernetes.io/component=operator"
        pods = json.loads(self.cluster.kubectl("get", "pods", "-l", labels, *space).stdout)["items"]
        ready = [c["status"] == "True" for p in pods for c in p["status"].get("conditions", ()) if c["type"] == "Ready"]
        return len(pods) == len(ready) == wanted["replicas"] and all(ready)

    def kill_operator(self) -> None:
        """All replicas at once, without grace, as with a node each."""
        self.cluster.kubectl(
            "delete", "pods", "-n", stages.OPERATOR_NAMESPACE, "-l", "app.kubernetes.io/component=operator",
            "--grace-period=0", "--force", "--wait=false",
        )  # fmt: skip


def resumed(run: Run, before: Document) -> Document:
    """Status once a later attempt trains, with what must hold after any failure."""
    status = run.until(
        lambda s: s.get("state") == "Running" and s["attempt"] > before["attempt"], "a later attempt trains"
    )
    assert status["checkpoint"]["iteration"] >= before["checkpoint"]["iteration"], "a verified checkpoint regressed"
    assert status["iteration"] >= before["checkpoint"]["iteration"], "training went back behind the checkpoint"
    return status


def _log(run: Run, member: int) -> str:
    pod = run.pod_of(member)["metadata"]["name"]
    return run.kubectl("logs", pod, "-c", names.CONTAINER_WORKER, "--tail=-1")


def started_at(run: Run, member: int = 0) -> int:
    """Iteration at which the workers of the newest attempt began, as the log says."""
    return int(re.findall(r"iteration (\d+) of \d+; attempt", _log(run, member))[-1])


def local_share(run: Run, member: int) -> float:
    """Of the bytes of its checkpoint, those that a worker of the member did not read from S3, the last time."""
    total, local = re.findall(r"read (\d+) bytes, (\d+) of them from local disk", _log(run, member))[-1]
    return int(local) / int(total)


def worker_pids(ctr: Callable[..., Any], pod: Document) -> Sequence[int]:
    """Worker processes of a Pod, in their node's numbering: children of the fork server."""
    worker = next(c for c in pod["status"]["containerStatuses"] if c["name"] == names.CONTAINER_WORKER)
    identity = worker["containerID"].removeprefix("containerd://")
    listing = ctr("tasks", "ps", identity).stdout
    pids = [int(line.split()[0]) for line in listing.splitlines()[1:] if line.split()]
    return sorted(pids)[1:]
