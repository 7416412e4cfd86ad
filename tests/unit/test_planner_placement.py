"""Pods, PodGroup and what the API server, the scheduler and the kubelets have against them."""

from __future__ import annotations

import pytest

from starcoder_operator.domain import reasons
from starcoder_operator.domain.plan import (
    CreatePod,
    EmitEvent,
    EnsureAccess,
    EnsureGang,
    EnsureLeases,
    WriteAssignment,
)
from starcoder_operator.domain.planner import plan
from tests.support.scenarios import Scenario, make_run


def with_image(run: Scenario, image: str) -> Scenario:
    run.cluster.change_spec(workers=run.cluster.spec.workers.model_copy(update={"image": image}))
    return run


def with_gang(run: Scenario, gang: str) -> Scenario:
    run.cluster.change_spec(scheduling=run.cluster.spec.scheduling.model_copy(update={"gang": gang}))
    return run


def test_all_that_pods_need_comes_before_them_and_the_assignment_last() -> None:
    run = make_run().workers(2).passes()
    assert run.last is not None
    kinds = [type(a) for a in run.last.actions if not isinstance(a, EmitEvent)]
    assert kinds == [EnsureAccess, EnsureLeases, EnsureGang, CreatePod, CreatePod, WriteAssignment]
    assert run.last.actions[-4] == EnsureGang("a-p1", 2)


def test_what_is_there_is_not_made_again() -> None:
    run = make_run().workers(2).passes().passes().passes()
    assert run.last is not None
    assert run.last.actions == ()


def test_a_name_is_passed_over_where_the_operator_died_before_it_was_used() -> None:
    run = make_run().workers(2)
    snapshot = run.snapshot
    run.cluster.write_status(snapshot, plan(snapshot).status)
    run.training()
    assert run.pods == ["a-w0-1", "a-w1-1"]
    assert list(run.cluster.groups) == ["a-p2"]


def test_without_the_gang_api_nothing_is_created_and_the_way_out_is_named() -> None:
    run = make_run().workers(2)
    run.cluster.gang_api = False
    run.until_quiet(5)
    assert run.pods == []
    assert run.said("Scheduled") == ("False", reasons.GANG_API_ABSENT)
    assert "`scheduling.gang: None`" in run.status.message
    assert run.last is not None
    assert run.last.look_again is not None, "nobody tells when the API comes"
    with_gang(run, "None").training()
    assert run.cluster.groups == {}


@pytest.mark.parametrize("mended", ["server", "spec"])
def test_pods_that_lost_their_group_on_the_way_are_removed_and_one_is_tried_now_and_then(mended: str) -> None:
    run = make_run().workers(3)
    run.cluster.gang_field = False
    run.until(lambda s: s.reason == reasons.GANG_FIELD_DROPPED).until_quiet(10)
    assert run.pods == []
    assert run.said("Scheduled") == ("False", reasons.GANG_FIELD_DROPPED)
    assert "`scheduling.gang: None`" in run.status.message
    used = len(run.cluster.names_used)
    run.until_quiet(120)
    assert 2 <= len(run.cluster.names_used) - used <= 8, "tried, but not pressed"
    assert run.told.count(("Warning", reasons.GANG_FIELD_DROPPED)) == 1
    if mended == "server":
        run.cluster.gang_field = True
    else:
        with_gang(run, "None")
    run.training()
    assert run.said("Scheduled") == ("True", reasons.ALL_PODS_SCHEDULED)


@pytest.mark.parametrize(
    ("message", "condition", "reason"),
    [
        ('pods "x" is forbidden: exceeded quota: gpus', "Scheduled", reasons.REFUSED),
        ('Pod "x" is invalid: spec.containers[0].image: Required value', "Accepted", reasons.POD_INVALID),
    ],
)
def test_refused_pods_are_told_of_tried_one_at_a_time_and_come_when_they_may(
    message: str, condition: str, reason: str
) -> None:
    run = make_run().workers(3).refused("create pod", message).until_quiet(5)
    assert run.status.condition(condition).reason == reason  # type: ignore[arg-type, union-attr]
    assert run.status.reason == reason
    assert message in run.status.message
    before = run.status.incarnations
    run.until_quiet(120)
    tried = [new - old for new, old in zip(run.status.incarnations, before, strict=True)]
    assert 2 <= tried[0] <= 8, "tried, but not pressed"
    assert tried[1:] == [0, 0]
    assert run.told.count(("Warning", reason)) == 1
    run.cluster.refusing = {}
    run.training()
    assert run.said("Accepted") == ("True", reasons.VALID)


def test_a_refused_pod_is_tried_at_once_when_the_spec_is_changed() -> None:
    run = make_run().workers(2).refused("create pod", "is invalid: podPatch").until_quiet(5)
    run.cluster.refusing = {}
    with_image(run, "good").passes()
    assert len(run.pods) == 1


def test_an_image_that_can_t_be_pulled_is_told_and_mended_by_the_spec() -> None:
    run = make_run().workers(2).with_spec(workers__image="typo")
    run.cluster.pullable = {"good"}
    run.until_quiet(5)
    assert run.said("Training") == ("False", reasons.IMAGE_PULL_FAILED)
    assert "manifest unknown" in run.status.message
    assert ("Warning", reasons.IMAGE_PULL_FAILED) in run.told
    with_image(run, "good").training()
    assert run.pods == ["a-w0-1", "a-w1-1"]
    assert run.status.restarts.total == 0


def test_pods_that_wait_for_credentials_are_built_anew_when_the_spec_names_another_secret() -> None:
    run = make_run().workers(2).hindered("CredentialsMissing").until_quiet(10)
    assert run.pods == ["a-w0-0", "a-w1-0"]
    storage = run.cluster.spec.storage
    run.cluster.change_spec(storage=storage.model_copy(update={"credentials_secret": "the-right-one"}))
    run.until_quiet(5)
    assert run.pods == ["a-w0-1", "a-w1-1"]
    run.mended().training()
    assert run.pods == ["a-w0-1", "a-w1-1"]
    assert run.status.restarts.total == 0


def test_an_image_that_appears_is_pulled_by_the_pods_that_wait() -> None:
    run = make_run().workers(2).with_spec(workers__image="late")
    run.cluster.pullable = set()
    run.until_quiet(5)
    run.cluster.pullable = {"late"}
    assert run.training().pods == ["a-w0-0", "a-w1-0"]


def test_a_spec_that_changes_under_running_pods_leaves_them_alone() -> None:
    run = make_run().workers(2).training()
    with_image(run, "other").until_quiet(3)
    assert run.pods == ["a-w0-0", "a-w1-0"]
    assert run.status.attempt == 1


def test_a_gang_without_room_waits_whole_and_starts_when_there_is_some() -> None:
    run = make_run().workers(3).on_nodes(2).until_quiet(10)
    assert run.said("Scheduled") == ("False", reasons.UNSCHEDULABLE)
    assert "0 of 3 Pods" in run.condition("Scheduled").message
    assert "too few nvidia.com/gpu" in run.condition("Scheduled").message
    assert run.status.state == "Pending"
    run.node_returns("node-new").training()
    assert run.pods == ["a-w0-0", "a-w1-0", "a-w2-0"]


def test_pods_that_wait_in_a_podgroup_that_was_deleted_come_again_in_another() -> None:
    run = make_run().workers(2).on_nodes(1).until_quiet(3)
    run.cluster.delete_group("a-p1")
    run.node_returns("node-new").training()
    assert list(run.cluster.groups) == ["a-p2"]
    assert run.pods == ["a-w0-1", "a-w1-1"]


def test_pods_that_run_are_left_alone_when_their_podgroup_is_deleted_and_a_replacement_gets_its_own() -> None:
    run = make_run().workers(3).on_nodes(4).training()
    run.cluster.delete_group("a-p1")
    run.until_quiet(3)
    assert run.status.attempt == 1
    run.failed(run.pod(1).view.node).training()
    assert {name: g.min_count for name, g in run.cluster.groups.items()} == {"a-p2": 1}
    assert run.pod(0).view.name == "a-w0-0"


def test_an_invalid_spec_creates_nothing_and_says_which_rule_it_breaks() -> None:
    run = make_run().workers(2).with_spec(training__optimizer__minLr=0.5).until_quiet(3)
    assert run.said("Accepted") == ("False", reasons.INVALID_SPEC)
    assert "spec.training.optimizer.minLr: 0.5 is larger than lr 0.001" in run.status.message
    assert (run.status.state, run.pods, run.cluster.access) == ("Pending", [], False)
    assert run.told == [("Warning", reasons.INVALID_SPEC)]
    optimizer = run.cluster.spec.training.optimizer.model_copy(update={"min_lr": 0.0001})
    run.cluster.change_spec(training=run.cluster.spec.training.model_copy(update={"optimizer": optimizer}))
    run.training()
    assert run.said("Accepted") == ("True", reasons.VALID)


def test_a_run_that_is_suspended_from_the_start_makes_nothing() -> None:
    run = make_run().workers(2).with_spec(suspend=True).until_quiet(3)
    assert (run.status.state, run.status.reason, run.pods) == ("Suspended", reasons.SUSPENDED, [])
    assert run.cluster.assignment is None


def _replacement(run: Scenario) -> CreatePod:
    for _ in range(60):
        run.round()
        assert run.last is not None
        for action in run.last.actions:
            if isinstance(action, CreatePod):
                return action
    raise AssertionError("no Pod is created")


def test_the_next_pod_is_rather_not_placed_where_an_agent_is_silent_though_its_node_is_called_ready() -> None:
    run = make_run().workers(2).on_nodes(3).training()
    node = run.pod(1).view.node
    coming = _replacement(run.node_dies(node, noticed=False))
    assert run.cluster.nodes[node].ready is True
    assert (coming.avoid_nodes, coming.shun_nodes) == ((), (node,))


def test_a_node_that_kubernetes_calls_lost_is_avoided_whatever_else_has_room() -> None:
    run = make_run().workers(2).on_nodes(3).training()
    node = run.pod(1).view.node
    coming = _replacement(run.node_dies(node))
    assert (coming.avoid_nodes, coming.shun_nodes) == ((node,), ())


def test_a_deleted_pod_says_nothing_against_its_node() -> None:
    coming = _replacement(make_run().workers(2).on_nodes(3).training().deleted(1))
    assert (coming.avoid_nodes, coming.shun_nodes) == ((), ())
