"""`python -m devcluster`: the cluster from a shell."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from . import binaries, kubeapi, packages
from .cluster import Cluster, ClusterError
from .controlplane import COMPONENTS, KubectlFailed
from .images import load as load_image
from .leftovers import LeftBehind
from .network import NetworkFailed
from .node import CommandFailed
from .options import NODE_MONITORS, Options
from .process import ProcessFailed, environment

EXPECTED = (
    ClusterError,
    CommandFailed,
    KubectlFailed,
    LeftBehind,
    NetworkFailed,
    ProcessFailed,
    ValueError,
    binaries.BuildFailed,
    packages.PackagesMissing,
)


def parser() -> argparse.ArgumentParser:
    defaults = Options()
    main = argparse.ArgumentParser(prog="devcluster", description="A real Kubernetes on one Linux machine (root).")
    main.add_argument("--name", default="starcoder", help="which cluster; several may live side by side")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    up = commands.add_parser("up", help="bring it up (the first time: build its programs, 8 to 16 minutes on 2 cores)")
    up.add_argument("--nodes", type=int, help=f"number of nodes (default {defaults.nodes})")
    up.add_argument(
        "--gpus-per-node", type=int, help=f"simulated nvidia.com/gpu each (default {defaults.gpus_per_node})"
    )
    up.add_argument("--node-monitor", choices=NODE_MONITORS, help="fast: a silent node is lost after 5 s, not 40 to 50")
    up.add_argument(
        "--without-gangs", action="store_const", const=False, dest="gangs", help="an API server without PodGroup"
    )

    commands.add_parser("down", help="remove it with all its data")
    commands.add_parser("status", help="what runs")
    commands.add_parser("build", help="build its programs and no more")
    kubectl = commands.add_parser("kubectl", help="kubectl as admin", add_help=False)
    kubectl.add_argument("arguments", nargs=argparse.REMAINDER)
    helm = commands.add_parser("helm", help="helm as admin", add_help=False)
    helm.add_argument("arguments", nargs=argparse.REMAINDER)
    load = commands.add_parser("load-image", help="put a built image on every node")
    load.add_argument("reference", nargs="+")
    for name, text in (
        ("kill-node", "power off a node, by one SIGKILL"),
        ("start-node", "power a node on again"),
        ("partition", "unplug a node's network cable"),
        ("heal", "plug it in again"),
    ):
        commands.add_parser(name, help=text).add_argument("node")
    return main


def main(argv: Sequence[str] | None = None) -> int:
    if not hasattr(os, "setns"):
        found = ".".join(map(str, sys.version_info[:3]))
        print(f"devcluster: found Python {found}, needs 3.12 or later; use .venv/bin/python", file=sys.stderr)
        return 2
    arguments = parser().parse_args(argv)
    try:
        run(Cluster(arguments.name), arguments)
        sys.stdout.flush()
    except EXPECTED as e:
        print(f"devcluster: {e}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `status | head`: whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("devcluster: interrupted", file=sys.stderr)
        return 130
    return 0


def run(cluster: Cluster, arguments: argparse.Namespace) -> None:
    """Raises those of EXPECTED."""
    match arguments.command:
        case "up":
            asked = {k: getattr(arguments, k) for k in ("nodes", "gpus_per_node", "node_monitor", "gangs")}
            asked = {key: value for key, value in asked.items() if value is not None}
            began = time.monotonic()
            new = cluster.up(Options(**asked) if asked else None)
            seconds = time.monotonic() - began
            print(f"cluster {cluster.name} is up ({seconds:.1f} s)" if new else f"cluster {cluster.name} runs already")
            status(cluster)
        case "down":
            cluster.down()
            print(f"cluster {cluster.name} is gone")
        case "status":
            status(cluster)
        case "build":
            binaries.build()
        case "kubectl" | "helm" as program:
            become(cluster, program, arguments.arguments)
        case "load-image":
            for reference in arguments.reference:
                load_image(cluster, reference)
        case "kill-node":
            cluster.kill_node(arguments.node)
        case "start-node":
            cluster.start_node(arguments.node)
        case "partition":
            cluster.partition(arguments.node)
        case "heal":
            cluster.heal(arguments.node)


def become(cluster: Cluster, program: str, arguments: Sequence[str]) -> None:
    """Replaces this process, so that terminal, signals and exit code are the program's."""
    kubeconfig = {"KUBECONFIG": str(cluster.kubeconfig)}
    argv = [*cluster.plane.enter(), str(binaries.path(program)), *arguments]
    os.execvpe(argv[0], argv, environment() | kubeconfig)


def status(cluster: Cluster) -> None:
    """Components and nodes as this machine and the API server see them."""
    options, plane = cluster.options, cluster.plane
    print(
        f"{options.nodes} nodes x {options.gpus_per_node} simulated GPUs, node monitor {options.node_monitor}, ", end=""
    )
    print(f"gangs {'on' if options.gangs else 'off'}; state in {cluster.folder}")
    for component in COMPONENTS:
        identity = plane.daemon(component).identity()
        print(f"  {component:<20}{f'pid {identity.pid}' if identity else 'stopped'}")
    ready = {n["metadata"]["name"]: n for n in plane.api.nodes()} if plane.api.ready() else None
    for node in cluster.nodes:
        said = "API server away" if ready is None else _said(ready.get(node.name))
        cable = "" if node.plugged_in else ", unplugged"
        print(f"  {node.name:<20}{f'pid {node.pid}' if node.running else 'off'}{cable}; {said}")
    reached = f"reached by `nsenter --net=/run/netns/{plane.site.netns}`"
    print(f"kubeconfig {cluster.kubeconfig} (server {plane.site.server}, {reached})")
    print(
        f"S3 {cluster.s3.endpoint} from Pods and from that namespace; keys in {cluster.folder / 's3-credentials.json'}"
    )


def _said(node: kubeapi.Json | None) -> str:
    if node is None:
        return "not registered"
    return f"{'Ready' if kubeapi.is_ready(node) else 'NotReady'}, {kubeapi.gpus(node)} GPUs"


if __name__ == "__main__":
    sys.exit(main())
