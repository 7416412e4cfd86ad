"""Runs whose Pods Kueue admits: groups of a fixed size, quota, and what it does with one Pod too many."""

from __future__ import annotations

from starcoder_operator.domain import reasons
from tests.support.scenarios import Scenario, make_run


def queued(workers: int = 2, nodes: int = 3, **changes: object) -> Scenario:
    kueue = {"scheduling__gang": "Kueue", "scheduling__queue": "team"}
    return make_run().workers(workers).on_nodes(nodes).with_spec(**kueue, **changes)


def groups(run: Scenario) -> dict[str, tuple[str, int]]:
    return {name: (pod.view.scheduling_group, pod.view.group_size) for name, pod in run.cluster.pods.items()}


def test_a_gang_comes_as_one_group_and_trains_when_it_is_admitted() -> None:
    run = queued().training()
    assert groups(run) == {"a-w0-0": ("a-p1", 2), "a-w1-0": ("a-p1", 2)}
    assert run.status.placement == 1


def test_a_gang_without_quota_waits_at_its_gates_and_says_what_for() -> None:
    run = queued()
    run.cluster.kueue.quota = 1
    run.until_quiet(5)
    assert run.said("Scheduled") == ("False", reasons.GATED)
    assert "LocalQueue team" in run.condition("Scheduled").message
    assert "`kubectl describe workload a-p1`" in run.condition("Scheduled").message
    run.cluster.kueue.quota = 2
    assert run.training().status.restarts.total == 0


def test_a_pod_that_ends_on_a_live_node_is_replaced_in_its_group_once_it_has_ended() -> None:
    run = queued().training()
    run.cluster.delete_pod("a-w1-0")
    run.until(lambda s: s.restarts.total == 1).training()
    assert groups(run) == {"a-w0-0": ("a-p1", 2), "a-w1-1": ("a-p1", 2)}
    assert (run.cluster.kueue.excess, run.cluster.kueue.admitted) == ([], {"a-p1": 2})


def test_a_pod_that_never_ends_on_its_lost_node_is_declared_failed_and_replaced_in_its_group() -> None:
    run = queued().training()
    run.failed(run.pod(1).view.node).training()
    assert groups(run) == {"a-w0-0": ("a-p1", 2), "a-w1-1": ("a-p1", 2)}
    assert run.cluster.kueue.excess == []
    assert run.pod(1).view.avoided_nodes


def test_a_lost_gang_is_queued_anew_under_another_group() -> None:
    run = queued(nodes=4).training()
    for member in (0, 1):
        run.node_dies(run.pod(member).view.node)
    run.passes().training()
    assert groups(run) == {"a-w0-1": ("a-p2", 2), "a-w1-1": ("a-p2", 2)}
    assert run.cluster.kueue.admitted == {"a-p2": 2}


def test_a_suspended_run_gives_its_quota_back_and_is_queued_anew() -> None:
    run = queued().training()
    run.suspended().until(lambda s: s.state == "Suspended").until_quiet(3)
    assert (run.pods, run.cluster.kueue.admitted) == ([], {})
    run.suspended(False).training()
    assert {group for group, _ in groups(run).values()} == {"a-p2"}


def test_pods_that_kueue_did_not_take_are_removed_and_it_is_said() -> None:
    run = queued()
    run.cluster.gang_field = False
    run.until_quiet(5)
    assert run.said("Scheduled")[1] == reasons.GANG_FIELD_DROPPED
    assert "integration `pod`" in run.condition("Scheduled").message
    assert run.status.state == "Pending"
    run.cluster.gang_field = True
    assert run.training().cluster.kueue.admitted
