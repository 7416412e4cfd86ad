"""Network namespaces: one for the control plane with a bridge, one a node, none with a way out of the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .addresses import CONTROL_PLANE, NODES_PREFIX, SERVICES, NodeAddress, control_plane_netns, is_netns_of

NETNS = Path("/run/netns")
_CUT = "cut"
"""Name of the table of rules that cut a node off."""


@contextmanager
def inside(netns: str) -> Iterator[None]:
    """The calling thread, and what it starts, is in a network namespace. Other threads stay where they are.

    Not across an `await`: other tasks of the loop would run in the namespace too.
    """
    with Path("/proc/thread-self/ns/net").open() as before, (NETNS / netns).open() as target:
        os.setns(target.fileno(), os.CLONE_NEWNET)
        try:
            yield
        finally:
            os.setns(before.fileno(), os.CLONE_NEWNET)


def create(cluster: str, nodes: Sequence[NodeAddress]) -> None:
    """Namespaces, links and routes of a cluster. No default route anywhere: nothing inside reaches the outside."""
    control_plane = control_plane_netns(cluster)
    _ip("netns", "add", control_plane)
    _batch(
        control_plane,
        "link set lo up",
        "link add br0 type bridge",
        f"addr add {CONTROL_PLANE}/{NODES_PREFIX} dev br0",
        "link set br0 up",
    )
    for node in nodes:
        _ip("netns", "add", node.netns)
        _ip(
            "link",
            "add",
            node.veth,
            "netns",
            control_plane,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            node.netns,
        )
        _batch(
            control_plane,
            f"link set {node.veth} master br0 up",
            f"route add {node.pods} via {node.ip}",
        )
        _batch(
            node.netns,
            "link set lo up",
            f"addr add {node.ip}/{NODES_PREFIX} dev eth0",
            "link set eth0 up",
            *(f"route add {other.pods} via {other.ip}" for other in nodes if other != node),
            # kube-proxy rewrites the destination, but without a route a node's own packet isn't made to begin with
            f"route add {SERVICES} via {CONTROL_PLANE} dev eth0",
        )
        with inside(node.netns):
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def set_link(node: NodeAddress, *, up: bool) -> None:
    """Plugs a node's cable in or out."""
    _ip("-n", control_plane_netns(node.cluster), "link", "set", node.veth, "up" if up else "down")


def cut_off(node: NodeAddress, but: int) -> None:
    """Drops what a node sends and gets, but for connections to one TCP port of the control plane."""
    _nft(
        node,
        f"""\
add table inet {_CUT}
add chain inet {_CUT} leaves {{ type filter hook postrouting priority filter; }}
add rule inet {_CUT} leaves oifname eth0 ip daddr {CONTROL_PLANE} tcp dport {but} accept
add rule inet {_CUT} leaves oifname eth0 drop
add chain inet {_CUT} comes {{ type filter hook prerouting priority raw; }}
add rule inet {_CUT} comes iifname eth0 ip saddr {CONTROL_PLANE} tcp sport {but} accept
add rule inet {_CUT} comes iifname eth0 drop
""",
    )


def cut_off_from(node: NodeAddress, port: int) -> None:
    """Drops what a node sends to one TCP port of the control plane."""
    _nft(
        node,
        f"""\
add table inet {_CUT}
add chain inet {_CUT} leaves {{ type filter hook postrouting priority filter; }}
add rule inet {_CUT} leaves oifname eth0 ip daddr {CONTROL_PLANE} tcp dport {port} drop
""",
    )


def join_again(node: NodeAddress) -> None:
    """Ends `cut_off` or `cut_off_from`; nothing where there is none."""
    _nft(node, f"add table inet {_CUT}\ndelete table inet {_CUT}\n")


def link_is_up(node: NodeAddress) -> bool:
    said = subprocess.run(
        ["ip", "-n", control_plane_netns(node.cluster), "-oneline", "link", "show", node.veth],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    return "state UP" in said


def existing(cluster: str) -> tuple[str, ...]:
    """Namespaces that the cluster has."""
    return tuple(sorted(p.name for p in NETNS.glob(f"{cluster}-*") if is_netns_of(cluster, p.name)))


def processes(netns: str) -> tuple[int, ...]:
    """Pids of what lives in a namespace, without ourselves."""
    said = subprocess.run(["ip", "netns", "pids", netns], capture_output=True, text=True, check=False).stdout
    return tuple(pid for pid in map(int, said.split()) if pid != os.getpid())


def remove(cluster: str, seconds: float = 30) -> None:
    """Kills what still lives in the cluster's namespaces, and removes them with their links.

    Raises NetworkFailed where a process is still there past the limit.
    """
    end = time.monotonic() + seconds
    for netns in existing(cluster):
        while left := processes(netns):
            if time.monotonic() > end:
                raise NetworkFailed(f"processes {left} in {netns} still live {seconds:.0f} s after SIGKILL")
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        _ip("netns", "delete", netns)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NetworkFailed(f"`ip {' '.join(arguments)}`: {done.stderr.strip()}")


def _batch(netns: str, *lines: str) -> None:
    text = "\n".join(lines)
    done = subprocess.run(["ip", "-n", netns, "-batch", "-"], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NetworkFailed(f"ip in {netns}: {done.stderr.strip()} of\n{text}")


def _nft(node: NodeAddress, rules: str) -> None:
    with inside(node.netns):
        done = subprocess.run(["nft", "-f", "-"], input=rules, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NetworkFailed(f"nft in {node.netns}: {done.stderr.strip()} of\n{rules}")


class NetworkFailed(RuntimeError):
    """`ip` or `nft` refused; the message has its words."""
