"""`make demo`: a real Kubernetes on this machine trains a small StarCoder on real code, loses a node and goes on.

Cluster, images, `helm install`, a Job that prepares the data, one StarCoderRun. Started again after Ctrl-C it goes on
where it can. `--down` removes the cluster. Without root, or off Linux, the same spec is trained without Kubernetes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from devcluster.cluster import Cluster

from . import stages
from .embedded import train_embedded
from .follow import Story, View, summary
from .paths import RUN_FILE

NEXT = """What to try next:
  python -m devcluster kubectl get scr -n training -o wide         the run, as `kubectl get` shows it
  python -m devcluster kubectl describe scr demo -n training       its story: conditions, restarts, Events
  python -m devcluster kubectl logs -n training -l starcoder.dev/run=demo -c worker --prefix
  python -m devcluster kill-node n2 | start-node n2                lose a node whenever you like
  $EDITOR examples/demo/run.yaml                                   another model, batch or layout; then make demo again
  make demo-down                                                   remove the cluster
(python is .venv/bin/python.)"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--down", action="store_true", help="remove the cluster and all that runs in it")
    parser.add_argument("--embedded", action="store_true", help="train without Kubernetes, as where root is missing")
    args = parser.parse_args(argv)
    console = Console(stderr=False)
    obstacle = "" if not args.embedded else "asked for"
    if not sys.platform.startswith("linux"):
        obstacle = f"this is {sys.platform}, and a cluster of namespaces needs Linux"
    elif os.geteuid() != 0:
        obstacle = f"this is user {os.geteuid()}, and namespaces, mounts and bridges need root"
    if obstacle:
        if args.down:
            console.print(f"nothing to remove: {obstacle}")
            return 0
        console.print(f"No Kubernetes here ({obstacle}): training the same spec without it.\n", highlight=False)
        return train_embedded()
    cluster = Cluster()
    if args.down:
        cluster.down()
        return 0
    try:
        return _demo(console, cluster)
    except KeyboardInterrupt:
        console.print(
            "\ninterrupted. The cluster still runs; `make demo` goes on with it, `make demo-down` removes it."
        )
        return 130


def _demo(console: Console, cluster: Cluster) -> int:
    began = time.monotonic()
    try:
        with _step(console, "Kubernetes on this machine: 3 nodes of 2 simulated GPUs"):
            stages.cluster_up(cluster)
        with _step(console, "images onto the nodes (built first where needed)"):
            digests = stages.images_in(cluster)
        with _step(console, "helm install starcoder-operator"):
            stages.install(cluster, digests["operator"], settings={"status-interval": "1"})
        stages.storage(cluster)
        with _step(console, "data: a Job tokenizes the Python standard library"):
            _prepare(console, cluster)
        stages.delete_run(cluster)
        console.print("kubectl apply -f examples/demo/run.yaml", highlight=False)
        cluster.kubectl("apply", "-f", str(RUN_FILE))
        story = _follow(console, cluster)
    except (stages.StageFailed, subprocess.CalledProcessError) as e:
        said = getattr(e, "stderr", "") or ""
        console.print(f"\nfailed: {e}\n{said}", style="red", highlight=False, markup=False)
        return 1
    console.print()
    for line in summary(story, time.monotonic() - began):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if story.last.get("state") != "Succeeded":
        described = cluster.kubectl("describe", "scr", stages.RUN, "-n", stages.NAMESPACE, check=False).stdout
        console.print(f"\n{described}", highlight=False, markup=False, soft_wrap=True)
        return 1
    console.print(f"\n{NEXT}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _prepare(console: Console, cluster: Cluster) -> None:
    """Raises StageFailed where the Job does."""
    stages.start_data(cluster)
    while not (ended := stages.job_ended(stages.job(cluster))):
        time.sleep(1)
    log = stages.job_log(cluster)
    if ended == "Failed":
        raise stages.StageFailed(f"the prepare Job failed:\n{log}")
    console.print(f"  {log.replace(chr(10), chr(10) + '  ')}", highlight=False, markup=False, soft_wrap=True)


def _follow(console: Console, cluster: Cluster) -> Story:
    """Until the run is over; half-way a node with a Pod of the run is killed."""
    iterations = stages.run_manifest()["spec"]["training"]["iterations"]
    story, view = Story(), View(console, iterations)
    try:
        with stages.statuses(cluster) as statuses:
            for status in statuses:
                story.saw(status)
                view.show(status)
                if story.over:
                    break
                if not story.killed and _half_way(status):
                    node = stages.busy_node(cluster)
                    view.say(f"  killing node {node} (SIGKILL to all of it, the Pod of the run included)")
                    story.fault(node)
                    cluster.kill_node(node)
        if story.killed:
            cluster.start_node(story.killed)
            view.say(f"  node {story.killed} is started again")
    finally:
        view.close()
    return story


def _half_way(status: dict[str, object]) -> bool:
    iteration, iterations = status.get("iteration", 0), status.get("iterations", 0)
    assert isinstance(iteration, int)
    assert isinstance(iterations, int)
    return status.get("state") == "Running" and bool(status.get("checkpoint")) and iteration >= iterations // 2 > 0


@contextmanager
def _step(console: Console, what: str) -> Iterator[None]:
    began = time.monotonic()
    console.print(what, highlight=False)
    yield
    console.print(f"  {time.monotonic() - began:.1f} s", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
