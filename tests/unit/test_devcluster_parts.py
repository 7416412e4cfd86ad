"""Addresses, options, command lines, configuration files, certificates and images of the dev cluster."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import subprocess
import tarfile
import tomllib
from pathlib import Path

import pytest

from devcluster import addresses, cgroups, components, nodefiles
from devcluster.__main__ import parser
from devcluster.cluster import Cluster
from devcluster.components import Site
from devcluster.controlplane import ControlPlane, free_ports
from devcluster.imagefiles import TinyImage, write_archive
from devcluster.options import Options
from devcluster.pki import Pki, control_plane_certificates, node_certificate

SITE = Site(Path("/state"), "starcoder-cp")


def test_nodes_share_no_address_and_all_pods_are_in_the_range_that_kube_proxy_knows():
    nodes = addresses.nodes("starcoder", addresses.MAX_NODES)
    pods = [ipaddress.ip_network(n.pods) for n in nodes]
    assert all(p.subnet_of(ipaddress.ip_network(addresses.PODS)) for p in pods)
    assert len({*pods}) == len({n.ip for n in nodes}) == len({n.netns for n in nodes}) == addresses.MAX_NODES
    laboratory = ipaddress.ip_network("198.18.0.0/15")
    assert all(ipaddress.ip_address(n.ip) in laboratory for n in nodes)


@pytest.mark.parametrize(
    ("netns", "ours"),
    [("a-cp", True), ("a-n1", True), ("a-n12", True), ("a-b-cp", False), ("a-n1-cp", False), ("a-node", False)],
)
def test_a_cluster_takes_no_other_for_its_own(netns, ours):
    assert addresses.is_netns_of("a", netns) is ours


@pytest.mark.parametrize("name", ["", "A", "1a", "a/b", "a" * 31])
def test_a_name_that_could_name_something_else_is_refused(name):
    with pytest.raises(ValueError, match="name: found"):
        Cluster(name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nodes": 16}, "nodes: found 16, expected 0 to 15"),
        ({"gpus_per_node": -1}, "gpus_per_node: found -1, expected 0 or more"),
        ({"node_monitor": "slow"}, "node_monitor: found 'slow', expected stock or fast"),
    ],
)
def test_options_out_of_range_are_named(changes, said):
    with pytest.raises(ValueError, match=said):
        Options(**changes)


def test_options_come_back_as_they_were_written():
    options = Options(nodes=1, gpus_per_node=8, node_monitor="fast", gangs=False)
    assert Options.from_json(options.to_json()) == options


def test_gangs_are_a_gate_on_all_three_and_an_api_on_the_server():
    gate, served = "--feature-gates=GenericWorkload=true", "--runtime-config=scheduling.k8s.io/v1beta1=true"

    def flags(gangs: bool) -> list[str]:
        return [
            *components.apiserver(SITE, gangs=gangs),
            *components.controller_manager(SITE, gangs=gangs, node_monitor="stock"),
            *components.scheduler(SITE, gangs=gangs),
        ]

    assert (flags(True).count(gate), flags(True).count(served)) == (3, 1)
    assert (flags(False).count(gate), flags(False).count(served)) == (0, 0)


def test_the_node_monitor_is_kubernetes_own_unless_asked():
    (node,) = addresses.nodes("starcoder", 1)
    stock = components.controller_manager(SITE, gangs=True, node_monitor="stock")
    fast = components.controller_manager(SITE, gangs=True, node_monitor="fast")
    assert not [f for f in stock if "node-monitor" in f or "eviction" in f]
    assert "--node-monitor-grace-period=5s" in fast
    assert "nodeLeaseDurationSeconds" not in json.loads(nodefiles.kubelet(node, "stock"))
    assert json.loads(nodefiles.kubelet(node, "fast"))["nodeLeaseDurationSeconds"] == 4


def test_rbac_and_node_restriction_are_on():
    flags = components.apiserver(SITE, gangs=True)
    assert {"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"} <= {*flags}


def test_no_component_of_an_api_server_alone_listens_beyond_loopback():
    alone = Site(Path("/state"), address="127.0.0.1")
    flags = [*components.apiserver(alone, gangs=True), *components.etcd(alone)]
    assert "--bind-address=127.0.0.1" in flags
    assert not [f for f in flags if "0.0.0.0" in f]


def test_containerd_reads_its_file():
    (node,) = addresses.nodes("starcoder", 1)
    files = nodefiles.files(node, "stock", Path("/usr/sbin/runc"))
    config = tomllib.loads(files["containerd.toml"])
    runc = config["plugins"]["io.containerd.cri.v1.runtime"]["containerd"]["runtimes"]["runc"]["options"]
    assert runc == {"BinaryName": "/usr/sbin/runc", "SystemdCgroup": False}
    assert json.loads(files["cni.conflist"])["plugins"][0]["ipam"]["ranges"] == [[{"subnet": node.pods}]]


def test_an_unknown_component_is_refused_by_name():
    plane = ControlPlane(SITE, Options())
    with pytest.raises(ValueError, match="component: found 'kubelet', expected one of etcd, apiserver"):
        plane.daemon("kubelet")


def test_certificates_are_the_authority_s_and_name_their_server(tmp_path):
    pki = Pki(tmp_path / "pki")
    (node,) = addresses.nodes("starcoder", 1)
    pki.create((*control_plane_certificates("198.18.0.1"), node_certificate(node)), "https://198.18.0.1:6443")

    def openssl(*arguments):
        return subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=True).stdout

    for name, purpose, address in (("apiserver", "sslserver", "198.18.0.1"), ("n1", "sslserver", node.ip)):
        openssl(
            *("verify", "-purpose", purpose, "-verify_ip", address, "-CAfile", pki.certificate("ca")),
            pki.certificate(name),
        )
    openssl("verify", "-purpose", "sslclient", "-CAfile", pki.certificate("ca"), pki.certificate("admin"))
    assert "O = system:nodes, CN = system:node:n1" in openssl(
        "x509", "-noout", "-subject", "-in", pki.certificate("n1")
    )
    secret = [p for p in pki.folder.iterdir() if p.suffix in (".key", ".conf")]
    assert {p.stat().st_mode & 0o077 for p in secret} == {0}


def test_a_tiny_image_holds_its_files_and_is_the_same_each_time(tmp_path):
    program = tmp_path / "program"
    program.write_bytes(b"#!")
    image = TinyImage("localhost/a:1", (("bin/a", program),), (("bin/b", "a"),), ("a", "--flag"), "1:1")
    for name in ("one.tar", "two.tar"):
        write_archive(image, tmp_path / name)
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    with tarfile.open(tmp_path / "one.tar") as archive:

        def read(name: str) -> bytes:
            file = archive.extractfile(name)
            assert file is not None
            return file.read()

        (manifest,) = json.loads(read("manifest.json"))
        assert manifest["RepoTags"] == ["localhost/a:1"]
        config = json.loads(read(manifest["Config"]))
        (layer,) = manifest["Layers"]
        assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(read(layer)).hexdigest()}"]
        assert (config["config"]["Cmd"], config["config"]["User"]) == (["a", "--flag"], "1:1")
        with tarfile.open(fileobj=archive.extractfile(layer)) as files:
            assert files.getmember("bin/a").mode == 0o755
            assert files.getmember("bin/b").linkname == "a"
            assert files.getmember("tmp").mode == 0o1777


MOUNTINFO = """\
30 25 0:26 / /sys/fs/cgroup rw,nosuid - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset
33 30 0:28 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset
34 25 0:29 / /proc rw - proc proc rw
"""


def test_cgroup_hierarchies_are_those_that_the_kernel_lists():
    found = cgroups.hierarchies(MOUNTINFO)
    assert [(h.root.name, h.v2, "cpuset" in h.options) for h in found] == [
        ("unified", True, False),
        ("cpuset", False, True),
    ]


def test_free_ports_differ():
    assert len({*free_ports(8)}) == 8


def test_the_command_line_leaves_kubectl_s_arguments_alone():
    arguments = parser().parse_args(["--name", "x", "kubectl", "get", "pods", "-A", "--watch"])
    assert (arguments.name, arguments.arguments) == ("x", ["get", "pods", "-A", "--watch"])


def test_up_without_flags_asks_for_nothing():
    arguments = parser().parse_args(["up"])
    assert {arguments.nodes, arguments.gpus_per_node, arguments.node_monitor, arguments.gangs} == {None}
    assert parser().parse_args(["up", "--without-gangs"]).gangs is False
