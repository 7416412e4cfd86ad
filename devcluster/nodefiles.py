"""Configuration files of a node: pure functions. Paths are those that the node itself sees (node-init.sh)."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from .addresses import CONTROL_PLANE, PODS, NodeAddress
from .imagefiles import PAUSE
from .options import NodeMonitor

CLUSTER = PurePosixPath("/run/cluster")
PKI = CLUSTER / "pki"
SOCKET = "/run/containerd/containerd.sock"
FAST_KUBELET = {"nodeLeaseDurationSeconds": 4, "nodeStatusUpdateFrequency": "5s"}


def etc(node: NodeAddress) -> PurePosixPath:
    return CLUSTER / "nodes" / node.name / "etc"


def files(node: NodeAddress, node_monitor: NodeMonitor, runc: Path) -> dict[str, str]:
    """Name to content, of the node's `etc`."""
    return {
        "cni.conflist": cni(node),
        "containerd.toml": containerd(runc),
        "kubelet.yaml": kubelet(node, node_monitor),
        "proxy.yaml": kube_proxy(node),
        "resolv.conf": f"nameserver {CONTROL_PLANE}\n",
    }


def cni(node: NodeAddress) -> str:
    """A bridge a node; no masquerade, since every node has a route to every other's Pods."""
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": node.pods}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    return json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]}, indent=2)


def containerd(runc: Path) -> str:
    """Without what needs a capability or a kernel module that a machine in a container lacks."""
    disabled = ",\n".join(
        f'  "io.containerd.{plugin}"'
        for plugin in (
            "differ.v1.erofs",
            "internal.v1.tracing",
            "mount-handler.v1.erofs",
            "nri.v1.nri",
            "snapshotter.v1.blockfile",
            "snapshotter.v1.erofs",
            "snapshotter.v1.native",
            "tracing.processor.v1.otlp",
        )
    )
    runtime = "plugins.'io.containerd.cri.v1.runtime'"
    return f"""\
version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = [
{disabled},
]
[grpc]
  address = "{SOCKET}"
[debug]
  level = "warn"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{PAUSE}"
[{runtime}]
  restrict_oom_score_adj = true
  tolerate_missing_hugetlb_controller = true
  disable_hugetlb_controller = true
  disable_apparmor = true
[{runtime}.cni]
  bin_dirs = ["/usr/lib/cni"]
  conf_dir = "/run/cni"
[{runtime}.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[{runtime}.containerd.runtimes.runc.options]
  BinaryName = "{runc}"
  SystemdCgroup = false
"""


def kubelet(node: NodeAddress, node_monitor: NodeMonitor) -> str:
    return json.dumps(
        {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "failCgroupV1": False,
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{node.cgroup}",
            "enforceNodeAllocatable": ["pods"],
            "failSwapOn": False,
            "oomScoreAdj": 0,
            "containerRuntimeEndpoint": f"unix://{SOCKET}",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(PKI / "ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(PKI / f"{node.name}.crt"),
            "tlsPrivateKeyFile": str(PKI / f"{node.name}.key"),
            "clusterDNS": [CONTROL_PLANE],
            "clusterDomain": "cluster.local",
            "resolvConf": str(etc(node) / "resolv.conf"),
            # The nodes share one disk with whatever else is on it: how full that is says nothing about them.
            "evictionHard": {
                "memory.available": "200Mi",
                "nodefs.available": "0%",
                "nodefs.inodesFree": "0%",
                "imagefs.available": "0%",
                "imagefs.inodesFree": "0%",
            },
            "imageGCHighThresholdPercent": 100,
            **(FAST_KUBELET if node_monitor == "fast" else {}),
        },
        indent=2,
    )


def kube_proxy(node: NodeAddress) -> str:
    return json.dumps(
        {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "hostnameOverride": node.name,
            "clientConnection": {"kubeconfig": str(PKI / "kube-proxy.conf")},
            "detectLocalMode": "ClusterCIDR",
            "clusterCIDR": PODS,
            # The limits of connection tracking belong to the whole machine: left as they are.
            "conntrack": {
                "maxPerCore": 0,
                "min": 0,
                "tcpEstablishedTimeout": "0s",
                "tcpCloseWaitTimeout": "0s",
                "udpTimeout": "0s",
                "udpStreamTimeout": "0s",
            },
            "metricsBindAddress": "127.0.0.1:10249",
        },
        indent=2,
    )
