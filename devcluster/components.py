"""Command lines and configuration files of the control plane: pure functions of where it lives and what it may."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .addresses import API_PORT, CONTROL_PLANE, DNS_READY_PORT, SERVICES
from .options import NodeMonitor
from .pki import Pki

Argv = tuple[str, ...]
FAST_GRACE = "5s"


@dataclass(frozen=True)
class Site:
    """Where a control plane lives: its state, its namespace (empty: this machine's loopback) and its ports."""

    folder: Path
    netns: str = ""
    address: str = CONTROL_PLANE
    api_port: int = API_PORT
    etcd_port: int = 2379
    etcd_peer_port: int = 2380

    @property
    def pki(self) -> Pki:
        return Pki(self.folder / "pki")

    @property
    def server(self) -> str:
        return f"https://{self.address}:{self.api_port}"


def etcd(site: Site) -> Argv:
    client, peer = f"http://127.0.0.1:{site.etcd_port}", f"http://127.0.0.1:{site.etcd_peer_port}"
    return (
        f"--data-dir={site.folder / 'etcd'}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--log-level=warn",
        "--unsafe-no-fsync",  # survives SIGKILL; a power cut may take it, and the cluster with it
    )


def gates(*, gangs: bool) -> Argv:
    """For API server, controller manager and scheduler alike."""
    return ("--feature-gates=GenericWorkload=true",) if gangs else ()


def apiserver(site: Site, *, gangs: bool) -> Argv:
    pki = site.pki
    # Without nodes nobody reaches the Service `kubernetes`, and loopback would be refused as its endpoint.
    alone = () if site.netns else ("--endpoint-reconciler-type=none",)
    return (
        f"--etcd-servers=http://127.0.0.1:{site.etcd_port}",
        f"--secure-port={site.api_port}",
        f"--bind-address={'0.0.0.0' if site.netns else site.address}",
        f"--advertise-address={site.address}",
        *alone,
        f"--service-cluster-ip-range={SERVICES}",
        f"--client-ca-file={pki.certificate('ca')}",
        f"--tls-cert-file={pki.certificate('apiserver')}",
        f"--tls-private-key-file={pki.key('apiserver')}",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={pki.folder / 'sa.pub'}",
        f"--service-account-signing-key-file={pki.key('sa')}",
        f"--kubelet-client-certificate={pki.certificate('apiserver-kubelet-client')}",
        f"--kubelet-client-key={pki.key('apiserver-kubelet-client')}",
        f"--kubelet-certificate-authority={pki.certificate('ca')}",
        "--kubelet-preferred-address-types=InternalIP",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        "--profiling=false",
        *(("--runtime-config=scheduling.k8s.io/v1beta1=true",) if gangs else ()),
        *gates(gangs=gangs),
    )


def controller_manager(site: Site, *, gangs: bool, node_monitor: NodeMonitor) -> Argv:
    pki = site.pki
    fast = (
        f"--node-monitor-grace-period={FAST_GRACE}",
        "--node-monitor-period=500ms",
        "--node-eviction-rate=100",  # stock: one node in 10 s, so the second of two lost at once waits
        "--secondary-node-eviction-rate=100",
    )
    return (
        f"--kubeconfig={pki.kubeconfig('kube-controller-manager')}",
        "--use-service-account-credentials",
        f"--service-account-private-key-file={pki.key('sa')}",
        f"--root-ca-file={pki.certificate('ca')}",
        f"--cluster-signing-cert-file={pki.certificate('ca')}",
        f"--cluster-signing-key-file={pki.key('ca')}",
        "--leader-elect=false",
        "--bind-address=127.0.0.1",
        "--profiling=false",
        "--kube-api-qps=500",
        "--kube-api-burst=1000",
        *(fast if node_monitor == "fast" else ()),
        *gates(gangs=gangs),
    )


def scheduler(site: Site, *, gangs: bool) -> Argv:
    return (f"--config={site.folder / 'scheduler.yaml'}", "--bind-address=127.0.0.1", *gates(gangs=gangs))


def scheduler_config(site: Site) -> str:
    return json.dumps(
        {
            "apiVersion": "kubescheduler.config.k8s.io/v1",
            "kind": "KubeSchedulerConfiguration",
            # Stock limits make a gang of 64 wait up to 6 s in back-off while its own Pods are still being created.
            "clientConnection": {
                "kubeconfig": str(site.pki.kubeconfig("kube-scheduler")),
                "qps": 1000,
                "burst": 2000,
            },
            "podMaxBackoffSeconds": 2,
            "leaderElection": {"leaderElect": False},
            "enableProfiling": False,
        },
        indent=2,
    )


def dns(site: Site) -> Argv:
    return ("-conf", str(site.folder / "Corefile"))


def corefile(site: Site) -> str:
    """Any name outside the cluster is said not to exist, at once: nothing inside could reach it."""
    pki = site.pki
    return f"""\
cluster.local in-addr.arpa {{
  bind {site.address}
  errors
  ready {site.address}:{DNS_READY_PORT}
  kubernetes {{
    endpoint {site.server}
    tls {pki.certificate("coredns")} {pki.key("coredns")} {pki.certificate("ca")}
    pods verified
    ttl 5
  }}
  loadbalance
}}
. {{
  bind {site.address}
  errors
  template ANY ANY {{
    rcode NXDOMAIN
  }}
}}
"""


def roles() -> str:
    """What CoreDNS and kube-proxy may read, as a List; they run with certificates, so users are bound."""
    group = "rbac.authorization.k8s.io"

    def bound(name: str, role: str, user: str) -> dict[str, object]:
        return {
            "apiVersion": f"{group}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": name},
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": role},
            "subjects": [{"kind": "User", "name": user, "apiGroup": group}],
        }

    read = ["list", "watch"]
    coredns = {
        "apiVersion": f"{group}/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "devcluster:coredns"},
        "rules": [
            {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": read},
            {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": read},
        ],
    }
    items = [
        coredns,
        bound("devcluster:coredns", "devcluster:coredns", "system:coredns"),
        bound("devcluster:kube-proxy", "system:node-proxier", "system:kube-proxy"),
    ]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
