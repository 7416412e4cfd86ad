"""Faults done to a StarCoderRun on the dev cluster, and how it comes out of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from devcluster.cluster import Cluster
from examples.demo import stages
from starcoder_trainer.contract import names
from tests.support.cluster import Document, Run, manifest, until

from .iterations import Logged, Resumption, newest, read, resumption

EVERY = 50
"""Iterations between checkpoints."""
GOLDEN = 0.6180339887
"""Multiples of it, less their whole parts, lie evenly between 0 and 1, however many there are."""
GIVE_UP = 600.0
"""Seconds after which a trial is censored."""


@dataclass(frozen=True)
class Trial:
    seconds: float
    """From the fault to the first iteration done after it, or `GIVE_UP`."""
    iterations_again: int | None = None
    """None where it is not known."""
    stages: dict[str, float] | None = None
    """Seconds by stage as `status.recoveries` has them."""
    censored: bool = False


@dataclass(frozen=True)
class Attack:
    """Whom it hits is known already: what is measured begins with `do`."""

    do: Callable[[], object]
    mend: Callable[[], object] = lambda: None


Fault = Callable[[Run, int], Attack]
"""Chooses whom it hits by the trial's number: the leader's member and another one by turns."""


def worker_crash(run: Run, trial: int) -> Attack:
    return Attack(run.worker_killer(run.members()[trial % 2]))


def pod_delete(run: Run, trial: int) -> Attack:
    pod = run.pod_of(run.members()[trial % 2])
    return Attack(lambda: run.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false"))


def node_kill(run: Run, trial: int) -> Attack:
    node = run.node_of(run.members()[trial % 2])
    return Attack(lambda: run.cluster.kill_node(node), lambda: run.cluster.start_node(node))


def operator_and_node(run: Run, trial: int) -> Attack:
    """The node of the operator's leader goes in the same moment as a member's."""
    nodes = [run.cluster.node(n) for n in (run.node_of(run.members()[trial % 2]), run.operators_node())]

    def kill() -> None:
        for node in nodes:
            node.kill()

    def mend() -> None:
        for node in nodes:
            node.start()

    return Attack(kill, mend)


def start(cluster: Cluster, name: str, **changes: Any) -> Run:
    """A run that does not end while it is looked at, training, with a verified checkpoint."""
    stages.delete_run(cluster, name)
    settings = {
        "training__iterations": 10**6,
        "checkpoint__everyIterations": EVERY,
        "checkpoint__keepLast": 2,
        # every node is killed again and again, and none is at fault
        "failurePolicy": {"nodeAvoidance": {"ttl": "0s"}},
    }
    run = Run(cluster, manifest(name, **settings | changes)).apply()
    run.until_checkpoint()
    return run


def trial(run: Run, fault: Fault, number: int) -> Trial:
    """One fault to a run that is whole (`whole`); those of all trials fall evenly between two checkpoints.

    The logs tell how far it is: the status is written every few seconds, in which a tiny model does half an interval.
    """
    at = run.status["checkpoint"]["iteration"] + int(EVERY * (number * GOLDEN % 1))
    until(lambda: newest(_logs(run)) >= at, f"iteration {at} is done")
    before, attack = run.status, fault(run, number)
    began = time.time()
    attack.do()
    try:
        found = _wait(run, began)
    finally:
        attack.mend()
    if found is None:
        return Trial(GIVE_UP, censored=True)

    def told(status: Document) -> bool:
        last = (status.get("recoveries") or [{}])[-1]
        return last.get("toAttempt", 0) > before["attempt"] and "total" in last

    record = run.until(told, "the recovery is told")["recoveries"][-1]
    return Trial(found.at - began, found.iterations_again, record["seconds"])


def whole(run: Run) -> None:
    """All Pods answer and have nobody's end to wait for, it trains, and nothing is counted against it any more: ready
    for the next fault."""
    spec = run.document["spec"]
    replicas, spares = spec["workers"]["replicas"], spec.get("elasticity", {}).get("spares", 0)
    run.until(
        lambda s: (
            s.get("state") == "Running"
            and s["workers"]["ready"] >= s["workers"]["desired"] >= replicas
            and s["workers"].get("spares", 0) >= spares
            and s.get("restartsWithoutProgress", 0) == 0
            and run.all_pod_names() == run.pod_names()
            and run.nodes_ready()
            and run.operators_ready()
        ),
        "the gang is whole again",
        seconds=GIVE_UP,
    )
    run.until_checkpoint(after=run.status["checkpoint"]["iteration"])


def _wait(run: Run, fault: float) -> Resumption | None:
    end = time.monotonic() + GIVE_UP
    while time.monotonic() < end:
        if found := resumption(_logs(run), fault):
            return found
        time.sleep(1)
    return None


def _logs(run: Run) -> list[list[Logged]]:
    """Of Pods on dead nodes none can be read; of those that train again they can."""
    pods = [p["metadata"]["name"] for p in run.pods() if p["status"]["phase"] == "Running"]
    how = ("-c", names.CONTAINER_WORKER, "--timestamps", "--tail=400")
    return [read(run.kubectl("logs", pod, *how, check=False, timeout=20)) for pod in pods]
