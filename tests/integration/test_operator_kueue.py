"""What Kueue reads of a Pod, and a Pod declared Failed, on a real API server with the operator's own rights.

Kueue's controller does not run here: its webhook's part is written by the test.
"""

from __future__ import annotations

from starcoder_operator.adapters.kinds import PODS
from starcoder_operator.domain.plan import CreatePod, DeclareFailed, DeletePod, EnsureAccess
from tests.integration.test_operator_act import (
    Bench,
    bench,
    here,
    make_bench,
    operators_kubeconfig,
    pytestmark,  # noqa: F401
)
from tests.support.operator_space import Space

__all__ = ["bench", "here", "make_bench", "operators_kubeconfig"]

NODE = "lost-node"


def queued(make: object, **changes: object) -> Bench:
    found = make(scheduling__gang="Kueue", scheduling__queue="team", **changes)  # type: ignore[operator]
    assert isinstance(found, Bench)
    return found


def stored(run: Bench) -> dict:
    (pod,) = run.here.owned(PODS, run.name)
    return pod


async def test_a_pod_of_a_queue_is_stored_with_all_that_kueue_reads(make_bench) -> None:
    run = queued(make_bench, scheduling__topologyKey="example.com/rack", scheduling__topologyPolicy="Required")
    await run.do(EnsureAccess(), CreatePod(1, 0, f"{run.name}-p1", ("node-7",), 2))
    assert run.problems == {}
    pod = stored(run)
    assert (
        pod["metadata"]["labels"].items()
        >= {
            "kueue.x-k8s.io/queue-name": "team",
            "kueue.x-k8s.io/pod-group-name": f"{run.name}-p1",
            "starcoder.dev/member": "1",
        }.items()
    )
    assert (
        pod["metadata"]["annotations"].items()
        >= {
            "kueue.x-k8s.io/pod-group-total-count": "2",
            "kueue.x-k8s.io/retriable-in-group": "false",
            "kueue.x-k8s.io/pod-group-pod-index-label": "starcoder.dev/member",
        }.items()
    )
    (near,) = pod["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert near["topologyKey"] == "example.com/rack"
    assert pod["spec"]["affinity"]["nodeAffinity"]


async def test_a_pod_that_kueue_has_gated_is_observed_as_a_member_of_its_group(make_bench) -> None:
    run = queued(make_bench, workers__podPatch={
        "metadata": {"labels": {"kueue.x-k8s.io/managed": "true"}},
        "spec": {"schedulingGates": [{"name": "kueue.x-k8s.io/admission"}]},
    })  # fmt: skip
    await run.do(EnsureAccess(), CreatePod(0, 0, f"{run.name}-p1", (), 2))
    (seen,) = (await run.look()).pods
    assert (seen.scheduling_group, seen.group_size, seen.gated) == (f"{run.name}-p1", 2, True)
    assert seen.unschedulable_message == ""


async def test_a_pod_that_terminates_on_a_lost_node_can_be_declared_failed(make_bench, here: Space) -> None:
    run = queued(make_bench)
    await run.do(EnsureAccess(), CreatePod(0, 0, f"{run.name}-p1", (), 1))
    name, uid = stored(run)["metadata"]["name"], stored(run)["metadata"]["uid"]
    bind(here, name)
    await run.do(DeletePod(name, uid, "its node is lost"))
    assert "deletionTimestamp" in stored(run)["metadata"]
    await run.do(DeclareFailed(name, uid, "node lost-node is Unknown"))
    assert run.problems == {}
    assert (stored(run)["status"]["phase"], stored(run)["status"]["reason"]) == ("Failed", "NodeLost")
    assert stored(run)["status"]["message"] == "node lost-node is Unknown"
    (seen,) = (await run.look()).pods
    assert (seen.phase, seen.deleting) == ("Failed", True)


async def test_another_pod_of_the_name_is_not_declared_failed(make_bench, here: Space) -> None:
    run = queued(make_bench)
    await run.do(EnsureAccess(), CreatePod(0, 0, f"{run.name}-p1", (), 1))
    await run.do(DeclareFailed(stored(run)["metadata"]["name"], "another-uid", "node lost-node is Unknown"))
    assert stored(run)["status"]["phase"] == "Pending"


def bind(here: Space, name: str) -> None:
    """As the scheduler does; the node need not be there."""
    from kubernetes import client

    target = client.V1ObjectReference(api_version="v1", kind="Node", name=NODE)
    binding = client.V1Binding(metadata=client.V1ObjectMeta(name=name), target=target)
    client.CoreV1Api(here.api).create_namespaced_binding(here.name, binding, _preload_content=False)
