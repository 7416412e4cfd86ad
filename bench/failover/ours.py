"""Faults done to a StarCoderRun on the dev cluster, and how it comes out of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from devcluster.cluster import Cluster
from examples.demo import stages
from starcoder_trainer.contract import names
from tests.support.cluster import Run, manifest

from .iterations import Resumption, read, resumption

GIVE_UP = 600.0
"""Seconds after which a trial is censored."""


@dataclass(frozen=True)
class Trial:
    seconds: float
    """From the fault to the first iteration done after it, or `GIVE_UP`."""
    iterations_again: int = 0
    stages: dict[str, float] | None = None
    """Seconds by stage as `status.recoveries` has them."""
    censored: bool = False


Fault = Callable[[Run, int], Callable[[], None]]
"""Does it (the trial's number says to whom) and returns what mends it afterwards."""


def worker_crash(run: Run, trial: int) -> Callable[[], None]:
    run.kill_worker(member=run.members()[trial % 2])
    return lambda: None


def pod_delete(run: Run, trial: int) -> Callable[[], None]:
    member = str(run.members()[trial % 2])
    pod = next(p for p in run.pods() if p["metadata"]["labels"][names.LABEL_MEMBER] == member)
    run.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")
    return lambda: None


def node_kill(run: Run, trial: int) -> Callable[[], None]:
    """Of the leader and of another member by turns."""
    return _kill(run, run.node_of(run.members()[trial % 2]))


def operator_and_node(run: Run, trial: int) -> Callable[[], None]:
    """The operator's leader goes with the node, in the same moment."""
    node = run.node_of(run.members()[trial % 2])
    lease = run.cluster.kubectl(
        "get", "lease", "starcoder-operator", "-n", stages.OPERATOR_NAMESPACE, "-o", "jsonpath={.spec.holderIdentity}"
    ).stdout.partition("_")[0]
    run.cluster.kubectl(
        "delete", "pod", lease, "-n", stages.OPERATOR_NAMESPACE, "--grace-period=0", "--force", "--wait=false"
    )
    return _kill(run, node)


def _kill(run: Run, node: str) -> Callable[[], None]:
    run.cluster.kill_node(node)
    return lambda: run.cluster.start_node(node)


def start(cluster: Cluster, name: str, **changes: Any) -> Run:
    """A run that does not end while it is looked at, training, with a verified checkpoint."""
    settings = {
        "training__iterations": 10**6,
        "checkpoint__everyIterations": 50,
        "checkpoint__keepLast": 2,
        # every node is killed again and again, and none is at fault
        "failurePolicy": {"nodeAvoidance": {"ttl": "0s"}},
    }
    run = Run(cluster, manifest(name, **settings | changes)).apply()
    run.until_checkpoint()
    return run


def trial(run: Run, fault: Fault, number: int) -> Trial:
    """One fault, and back to a whole gang that trains with a newer checkpoint."""
    before = run.status
    began = time.time()
    mend = fault(run, number)
    try:
        found = _wait(run, began)
    finally:
        mend()
    if found is None:
        return Trial(GIVE_UP, censored=True)
    whole(run, before["checkpoint"]["iteration"])
    recoveries = [r for r in run.status.get("recoveries") or [] if r.get("total") is not None]
    newest = recoveries[-1] if len(recoveries) > len(before.get("recoveries") or []) or len(recoveries) >= 10 else {}
    return Trial(found.at - began, found.iterations_again, newest.get("seconds"))


def whole(run: Run, checkpoint: int) -> None:
    """All Pods answer, it trains, and a checkpoint newer than that iteration is verified: ready for the next fault."""
    desired = run.document["spec"]["workers"]["replicas"]
    run.until(
        lambda s: (
            s.get("state") == "Running"
            and s["workers"]["ready"] >= s["workers"]["desired"] >= desired
            and s["checkpoint"]["iteration"] > checkpoint
            and run.nodes_ready()
        ),
        "the gang is whole again and has a newer checkpoint",
        seconds=GIVE_UP,
    )


def _wait(run: Run, fault: float) -> Resumption | None:
    end = time.monotonic() + GIVE_UP
    while time.monotonic() < end:
        # Logs of a Pod on a dead node can't be read; those that train again can.
        pods = [p["metadata"]["name"] for p in run.pods() if p["status"]["phase"] == "Running"]
        logs = [
            run.kubectl(
                "logs", pod, "-c", names.CONTAINER_WORKER, "--timestamps", "--tail=400", check=False, timeout=20
            )
            for pod in pods
        ]
        if found := resumption((read(log) for log in logs), fault):
            return found
        time.sleep(1)
    return None
