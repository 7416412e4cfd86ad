"""What is done to the cluster, one or two at a time; each knows how to mend what it broke."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from devcluster.cluster import Cluster
from tests.support.cluster import Run


@dataclass(frozen=True)
class Fault:
    what: str
    do: Callable[[], None]
    undo: Callable[[], None] | None = None
    """After `seconds`; None where nothing is left to be mended."""
    seconds: float = 0.0


def draw(rng: random.Random, cluster: Cluster, run: Run, broken: set[str]) -> Fault | None:
    """One that can be done now; None where what was drawn can't.

    Args:
        broken: what is broken still, and is not broken again meanwhile.
    """
    well = {n.name for n in cluster.nodes if n.running and n.plugged_in}
    pods = [p for p in run.pods() if p["status"].get("phase") == "Running" and p["spec"]["nodeName"] in well]
    if not pods:
        return None
    pod = rng.choice(pods)
    name, node = pod["metadata"]["name"], pod["spec"]["nodeName"]
    member = int(pod["metadata"]["labels"]["starcoder.dev/member"])
    away, node_away = rng.uniform(5, 45), rng.uniform(5, 120)
    faults = (
        Fault(f"worker of {name} is killed", lambda: run.kill_worker(member)),
        Fault(f"Pod {name} is deleted", lambda: _delete(run, name)),
        Fault(f"Pod {name} is deleted without grace", lambda: _delete(run, name, "--grace-period=0", "--force")),
        Fault(f"node {node} dies", lambda: cluster.kill_node(node), lambda: cluster.start_node(node), node_away),
        Fault(f"node {node} is cut off", lambda: cluster.partition(node), lambda: cluster.heal(node), node_away),
        Fault("the operator is killed", run.kill_operator),
        Fault("the API server is away", *_component(cluster, "apiserver"), away),
        Fault("S3 is away", *_component(cluster, "s3"), away / 3),
        Fault("the scheduler is away", *_component(cluster, "scheduler"), away),
        Fault("the controller manager is away", *_component(cluster, "controller-manager"), away),
    )
    drawn = rng.choice(faults)
    third_node = drawn.what.startswith("node ") and len(well) < len(cluster.nodes) - 1
    return None if drawn.what in broken or third_node else drawn


def _delete(run: Run, pod: str, *how: str) -> None:
    run.kubectl("delete", "pod", pod, "--wait=false", *how)


def _component(cluster: Cluster, name: str) -> tuple[Callable[[], None], Callable[[], None]]:
    return lambda: cluster.stop_component(name), lambda: cluster.start_component(name)
