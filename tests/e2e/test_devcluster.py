"""The dev cluster is a Kubernetes like others: DNS, Services, gangs, nodes that die and return; and it goes whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from devcluster import kubeapi, leftovers
from devcluster.cluster import Cluster, ClusterError, Options
from devcluster.imagefiles import BUSYBOX
from devcluster.process import Daemon

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

Document = dict[str, Any]


def until[T](found: Callable[[], T], what: str, seconds: float = 180) -> T:
    end = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)
    return answer


class Namespace:
    """A namespace of one test."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.name = f"devcluster-{uuid.uuid4().hex[:8]}"
        cluster.kubectl("create", "namespace", self.name)

    def kubectl(self, *arguments: str, **options: Any) -> str:
        return self.cluster.kubectl("-n", self.name, *arguments, **options).stdout

    def apply(self, *objects: Document) -> None:
        self.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))

    def pod(self, name: str) -> Document:
        return dict(json.loads(self.kubectl("get", "pod", name, "-o", "json")))

    def phases(self) -> list[str]:
        return self.kubectl("get", "pods", "-o", "jsonpath={.items[*].status.phase}").split()

    def wait(self, name: str, condition: str) -> None:
        self.kubectl("wait", f"pod/{name}", f"--for={condition}", "--timeout=180s", timeout=200)


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[Namespace]:
    made = Namespace(cluster)
    yield made
    cluster.kubectl("delete", "namespace", made.name, "--wait=false")


def pod(name: str, script: str, *, node: str = "", gpus: int = 0, group: str = "", restart: str = "Never") -> Document:
    container: Document = {
        "name": "c",
        "image": BUSYBOX,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", script],
    }
    if gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": str(gpus)}}
    spec: Document = {"containers": [container], "restartPolicy": restart, "terminationGracePeriodSeconds": 1}
    if node:
        spec["nodeName"] = node
    if group:
        spec["schedulingGroup"] = {"podGroupName": group}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}}, "spec": spec}


def ready_nodes(cluster: Cluster) -> set[str]:
    return {n["metadata"]["name"] for n in cluster.plane.api.nodes() if kubeapi.is_ready(n)}


def test_nodes_are_ready_and_their_gpus_are_labelled_as_simulated(cluster: Cluster) -> None:
    nodes = cluster.plane.api.nodes()
    assert {n["metadata"]["name"]: kubeapi.gpus(n) for n in nodes} == {"n1": 2, "n2": 2, "n3": 2}
    assert {n["metadata"]["labels"]["starcoder.dev/simulated-gpus"] for n in nodes} == {"true"}


def test_a_pod_finds_a_service_by_name_and_reaches_its_pod_on_another_node(namespace: Namespace) -> None:
    namespace.apply(
        pod(
            "web", "mkdir /www; echo hello from $(hostname) > /www/index.html; exec httpd -f -p 8080 -h /www", node="n1"
        ),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "web"},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
        },
    )
    namespace.wait("web", "condition=Ready")
    namespace.apply(pod("client", f"until wget -qO- http://web.{namespace.name}; do sleep 0.2; done", node="n2"))
    namespace.wait("client", "jsonpath={.status.phase}=Succeeded")
    assert namespace.kubectl("logs", "client").splitlines()[-1] == "hello from web"


def test_names_outside_the_cluster_are_said_not_to_exist(namespace: Namespace) -> None:
    namespace.apply(pod("client", "nslookup registry.example.com; true"))
    namespace.wait("client", "jsonpath={.status.phase}=Succeeded")
    assert "registry.example.com: NXDOMAIN" in namespace.kubectl("logs", "client")


def test_pods_and_tests_reach_the_s3_server_and_its_buckets_outlive_it(namespace: Namespace) -> None:
    cluster = namespace.cluster
    cluster.make_buckets("devcluster-test")
    cluster.stop_component("s3")
    cluster.start_component("s3")
    cluster.make_buckets("devcluster-test")
    assert (cluster.folder / "s3" / "devcluster-test").is_dir()
    namespace.apply(pod("client", f"wget -O- {cluster.s3.endpoint} 2>&1; true", node="n3"))
    namespace.wait("client", "jsonpath={.status.phase}=Succeeded")
    assert "403 Forbidden" in namespace.kubectl("logs", "client"), (
        "a stranger is refused by the server, so it was reached"
    )


def test_a_container_is_told_its_gpus_and_that_it_computes_on_the_cpu(namespace: Namespace) -> None:
    namespace.apply(pod("a", "echo $NVIDIA_VISIBLE_DEVICES $CUDA_VISIBLE_DEVICES", gpus=2))
    namespace.wait("a", "jsonpath={.status.phase}=Succeeded")
    gpus, visible = namespace.kubectl("logs", "a").split()
    assert sorted(gpus.split(",")) == ["0", "1"]
    assert visible == "-1"


def test_a_gang_of_three_with_room_for_two_waits_whole_and_starts_when_a_node_comes_back(namespace: Namespace) -> None:
    cluster = namespace.cluster
    cluster.kill_node("n3")
    until(lambda: "n3" not in ready_nodes(cluster), "n3 is seen to be lost")
    group = {
        "apiVersion": "scheduling.k8s.io/v1beta1",
        "kind": "PodGroup",
        "metadata": {"name": "gang"},
        "spec": {"schedulingPolicy": {"gang": {"minCount": 3}}},
    }
    members = [pod(f"gang-{i}", "sleep 1000", gpus=2, group="gang") for i in range(3)]
    namespace.apply(group, *members)

    def refused() -> bool:
        said = json.loads(namespace.kubectl("get", "podgroup", "gang", "-o", "json"))
        return any(c["status"] == "False" for c in said.get("status", {}).get("conditions", ()))

    until(refused, "the scheduler says that the gang doesn't fit")
    assert namespace.phases() == ["Pending"] * 3
    cluster.start_node("n3")

    def all_run() -> bool:
        """A kubelet that has just started may reject a Pod: it still counts the GPUs of Pods that are gone by now
        (`UpdateAllocatedDevices` does nothing before all its sources are ready). These have no owner to replace them.
        """
        for member in members:
            name = member["metadata"]["name"]
            if namespace.pod(name)["status"].get("reason") == "UnexpectedAdmissionError":
                namespace.kubectl("delete", "pod", name)
                namespace.apply(member)
        return namespace.phases() == ["Running"] * 3

    until(all_run, "the whole gang runs")
    assert {namespace.pod(f"gang-{i}")["spec"]["nodeName"] for i in range(3)} == {"n1", "n2", "n3"}


def test_a_killed_node_is_lost_and_comes_back_with_its_pods(namespace: Namespace) -> None:
    cluster = namespace.cluster
    tolerate_all = {"tolerations": [{"operator": "Exists"}]}
    stays = pod("stays", "sleep 1000", node="n2", restart="Always")
    ends = pod("ends", "sleep 1000", node="n2")
    for each in (stays, ends):
        each["spec"] |= tolerate_all
    namespace.apply(stays, ends)
    for name in ("stays", "ends"):
        namespace.wait(name, "condition=Ready")
    uid = namespace.pod("stays")["metadata"]["uid"]
    init = cluster.node("n2").pid
    cluster.kill_node("n2")
    assert not Path(f"/proc/{init}").exists()
    assert not cluster.node("n2").running
    until(lambda: "n2" not in ready_nodes(cluster), "n2 is seen to be lost")
    cluster.start_node("n2")
    until(lambda: "n2" in ready_nodes(cluster), "n2 is back")

    def restarted() -> bool:
        (status,) = namespace.pod("stays")["status"]["containerStatuses"]
        return bool(status["restartCount"] == 1 and status["ready"])

    until(restarted, "a container that is to run always was started again")
    assert namespace.pod("stays")["metadata"]["uid"] == uid
    namespace.wait("ends", "jsonpath={.status.phase}=Failed")
    assert namespace.pod("ends")["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 255


def test_a_partitioned_node_is_lost_while_its_containers_run_on_and_healed_it_is_ready(namespace: Namespace) -> None:
    cluster = namespace.cluster
    tick = pod("ticks", "i=0; while :; do i=$((i+1)); echo $i > /tmp/ticks; sleep 0.1; done", node="n1")
    tick["spec"]["tolerations"] = [{"operator": "Exists"}]
    namespace.apply(tick)
    namespace.wait("ticks", "condition=Ready")
    node = cluster.node("n1")
    container = namespace.pod("ticks")["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")

    def ticks() -> int:
        said = node.ctr("tasks", "exec", "--exec-id", uuid.uuid4().hex, container, "cat", "/tmp/ticks").stdout.strip()
        return int(said or 0)

    cluster.partition("n1")
    assert not node.plugged_in
    until(lambda: "n1" not in ready_nodes(cluster), "n1 is seen to be lost")
    before = ticks()
    until(lambda: ticks() > before, "its container runs on")
    cluster.heal("n1")
    until(lambda: "n1" in ready_nodes(cluster), "n1 is back")
    assert namespace.pod("ticks")["status"]["containerStatuses"][0]["restartCount"] == 0


def test_what_the_api_server_knows_outlives_it_and_its_etcd(namespace: Namespace) -> None:
    cluster = namespace.cluster
    cluster.stop_component("apiserver")
    cluster.stop_component("etcd")
    refused = cluster.kubectl("get", "namespace", namespace.name, "--request-timeout=5s", check=False)
    assert refused.returncode != 0
    cluster.start_component("etcd")
    cluster.start_component("apiserver")
    assert namespace.name in cluster.kubectl("get", "namespace", namespace.name).stdout


def test_up_again_changes_nothing_and_other_options_are_refused(cluster: Cluster) -> None:
    pids = [n.pid for n in cluster.nodes]
    assert cluster.up() is False
    assert cluster.up(cluster.options) is False
    assert [n.pid for n in cluster.nodes] == pids
    with pytest.raises(ClusterError, match="run `down` before"):
        cluster.up(Options(nodes=1))


@pytest.fixture
def second() -> Iterator[Cluster]:
    """Another cluster beside the first."""
    second = Cluster(f"e2e-second-{uuid.uuid4().hex[:6]}")
    yield second
    second.down()


def test_a_second_cluster_lives_beside_the_first_and_leaves_nothing_behind(cluster: Cluster, second: Cluster) -> None:
    machine = Path("/proc/self/mountinfo").read_text()
    second.up(Options(nodes=1, gpus_per_node=1))
    namespace = Namespace(second)
    namespace.apply(pod("a", "sleep 1000", gpus=1))
    namespace.wait("a", "condition=Ready")
    assert ready_nodes(cluster) == {"n1", "n2", "n3"}
    assert {line.split()[0] for line in leftovers.found(second.name)} >= {"network", "process", "cgroup", "folder"}
    second.down()
    assert leftovers.found(second.name) == ()
    assert Path("/proc/self/mountinfo").read_text() == machine
    assert ready_nodes(cluster) == {"n1", "n2", "n3"}


def test_a_mount_in_its_folder_is_named_by_down_and_not_deleted_through(second: Cluster, tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    mounted = second.folder / "mounted"
    mounted.mkdir(parents=True)
    subprocess.run(["mount", "--bind", tmp_path, mounted], check=True)
    try:
        with pytest.raises(leftovers.LeftBehind, match=f"left are:\n  mount {mounted}"):
            second.down()
        assert (tmp_path / "kept").exists()
    finally:
        subprocess.run(["umount", mounted], check=True)


def test_a_cluster_whose_folder_was_deleted_goes_all_the_same(second: Cluster) -> None:
    second.up(Options(nodes=1))
    shutil.rmtree(second.folder)
    assert leftovers.found(second.name), "nothing was left, so nothing was tested"
    second.down()
    assert leftovers.found(second.name) == ()


def test_an_up_that_was_killed_half_way_is_no_obstacle(second: Cluster) -> None:
    command = [sys.executable, "-m", "devcluster", "--name", second.name, "up", "--nodes", "1"]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL) as half_way:
        until(lambda: Daemon("apiserver", second.folder).identity() and second.nodes[0].running, "it is half-way up")
        os.killpg(half_way.pid, signal.SIGKILL)
    assert not second.running
    assert leftovers.found(second.name), "nothing was there, so nothing was tested"
    assert second.up(Options(nodes=1)) is True
    assert ready_nodes(second) == {"n1"}
