"""Leaving on purpose in the planner's scenarios: suspend, eviction, deletion, taints. No iteration is lost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from starcoder_operator.domain import reasons
from starcoder_operator.domain.leaving import time_left
from starcoder_operator.domain.plan import DeletePod, WriteAssignment
from starcoder_operator.domain.timestamps import after
from starcoder_trainer.agent.messages import StorageTrouble
from starcoder_trainer.contract.report import Problem
from tests.support.scenarios import Scenario, make_run

GRACE = 300


def amid(workers: int = 3, nodes: int = 4, **changes: object) -> Scenario:
    """A run in the middle between two checkpoints."""
    run = make_run().workers(workers).on_nodes(nodes).with_spec(**changes).training()
    return run.until(lambda s: s.iteration % 10 == 5)


def writes(run: Scenario) -> list[tuple[int, str]]:
    """(attempt, phase) of what the last pass wrote."""
    assert run.last is not None
    return [(a.assignment.attempt, a.assignment.phase) for a in run.last.actions if isinstance(a, WriteAssignment)]


def start_of(run: Scenario, attempt: int) -> int:
    (form,) = run.cluster.runs_written[attempt]
    return int(form.partition('"step":')[2].partition("}")[0])


def test_a_suspended_run_leaves_with_a_checkpoint_of_the_iteration_it_was_at_and_goes_on_there() -> None:
    run = amid().suspended().passes()
    assert writes(run) == [(1, "drain")]
    assert run.status.state == "Running"
    assert run.said("Training") == ("False", reasons.SUSPENDING)
    run.until(lambda s: s.state == "Suspended" and s.reason == reasons.SUSPENDED)
    assert run.pods == []
    attempt, step = run.cluster.world.store.commits[-1]
    assert (attempt, step) == (1, run.status.iteration)
    assert step % 10 == 5
    run.suspended(False).training()
    assert (run.status.attempt, start_of(run, 2)) == (2, step)
    assert run.status.restarts.total == 0


def test_a_suspended_run_keeps_its_pods_until_the_last_member_has_left() -> None:
    run = amid().holds_up(2, "upload").suspended().until_quiet(30)
    assert run.phase == "drain"
    assert len(run.pods) == 3
    assert "2 of 3 members have left" in run.condition("Training").message or "1 of 3" in run.status.message


def test_a_suspended_run_whose_workers_do_not_leave_is_stopped_when_the_grace_period_is_over() -> None:
    run = amid().holds_up(1, "workers").suspended().passes().waits(GRACE - 2).passes()
    assert writes(run) == []
    run.waits(3).passes()
    assert writes(run) == [(1, "stop")]
    assert run.said("Training") == ("False", reasons.GRACE_EXCEEDED)
    assert run.condition("Training").message == (
        f"the gang was to leave with a checkpoint within {GRACE} s (workers.terminationGracePeriodSeconds), and 0 of 3 "
        "members have: a-w0-0, a-w1-0, a-w2-0 still save or upload; training starts over, since no checkpoint is "
        "verified"
    )
    run.until(lambda s: s.reason == reasons.SUSPENDED)
    assert ("Warning", reasons.GRACE_EXCEEDED) in run.told


def test_a_suspended_run_whose_checkpoint_s3_does_not_take_says_so_while_it_waits_and_when_it_goes() -> None:
    run = amid().holds_up(1, "upload").suspended().until_quiet(5)
    problem = Problem("StorageUnreachable", "no answer from the endpoint")
    run.pod(1).agent.tell(StorageTrouble(run.cluster.world.now, problem))
    run.until_quiet(5)
    assert run.said("CheckpointVerified") == ("False", "StorageUnreachable")
    assert run.said("Training") == ("False", reasons.SUSPENDING)
    run.waits(GRACE).passes()
    assert "2 of 3 members have: no answer from the endpoint; training goes on" in run.condition("Training").message


def test_a_wall_clock_that_is_set_cuts_no_checkpoint_short() -> None:
    run = amid().holds_up(1, "upload").suspended().until_quiet(5)
    assert run.status.draining is not None
    later = replace(run.snapshot, now=after(run.status.draining.since, 3600))
    assert time_left(later) == time_left(run.snapshot) > GRACE - 30


@pytest.mark.parametrize("state", ["held", "starting"])
def test_a_run_that_has_trained_nothing_yet_is_suspended_at_once(state: str) -> None:
    run = make_run().workers(2).until(lambda s: s.attempt == 1)
    while state == "starting" and run.phase != "run":
        run.cluster.settle_cluster()
        run.passes()
    run.suspended().passes()
    assert writes(run) == [(1, "stop")]


def test_a_run_that_is_wanted_again_while_it_leaves_goes_on_in_the_next_attempt_in_the_same_pods() -> None:
    run = amid().suspended().passes().suspended(False).passes()
    assert run.said("Training") == ("False", reasons.DRAINING)
    run.until(lambda s: s.attempt == 2).training()
    assert run.pods == ["a-w0-0", "a-w1-0", "a-w2-0"]
    assert start_of(run, 2) % 10 == 5
    assert run.status.restarts.total == 0


@pytest.mark.parametrize("member", [0, 2], ids=["leader", "follower"])
@pytest.mark.parametrize(
    ("disruption", "cause"), [("EvictionByEvictionAPI", "Disrupted"), ("PreemptionByScheduler", "Disrupted"),
                              ("", "PodDeleted")]
)  # fmt: skip
def test_a_pod_that_is_evicted_takes_the_gang_out_with_a_checkpoint_and_nothing_is_lost_or_charged(
    member: int, disruption: str, cause: str
) -> None:
    run = amid().evicted(member, disruption).passes()
    assert writes(run) == [(1, "drain")]
    assert run.status.state == "Running"
    assert run.said("Training") == ("False", reasons.DRAINING)
    assert ("Normal", reasons.DRAINING) in run.told
    run.until(lambda s: s.attempt == 2)
    left_at = run.cluster.world.store.commits[-1][1]
    assert left_at % 10 == 5
    run.training()
    assert start_of(run, 2) == left_at
    last = run.status.last_failure
    assert last is not None
    assert last.cause == cause
    assert last.message.endswith(f"the gang left with a checkpoint of iteration {left_at}")
    assert run.status.restarts.by_cause == {cause: 1}
    assert run.status.restarts_without_progress == 0
    assert f"a-w{member}-1" in run.pods


def test_an_attempt_is_not_ended_while_a_pod_that_is_going_still_saves() -> None:
    run = amid().holds_up(1, "upload").evicted(1)
    for _ in range(20):
        run.round()
        assert (run.status.attempt, run.phase) == (1, "drain")
    assert not [a for a in (run.last.actions if run.last else ()) if isinstance(a, DeletePod)]


def test_a_pod_that_shows_as_succeeded_while_its_agent_uploads_is_still_waited_for_and_charged_to_nobody() -> None:
    run = amid().holds_up(1, "upload").evicted(1).round()
    pod = run.pod(1)
    pod.view = replace(pod.view, phase="Succeeded", ready=False)
    run.until_quiet(3)
    assert (run.status.attempt, run.phase) == (1, "drain")
    run.cluster.delete_pod(pod.view.name, 0)
    run.until(lambda s: s.attempt == 2)
    assert run.status.restarts.by_cause == {"Disrupted": 1}


def test_a_pod_that_can_t_leave_within_its_grace_period_says_so_shortly_before_and_not_earlier() -> None:
    run = amid(workers__terminationGracePeriodSeconds=40).holds_up(1, "workers").evicted(1)
    run.until_quiet(29)
    assert run.status.attempt == 1
    run.until_quiet(4)
    assert run.status.attempt == 2
    assert run.status.restarts.by_cause == {"Disrupted": 1}
    last = run.status.last_failure
    assert last is not None
    assert last.message == (
        "Pod a-w1-0 was disrupted (EvictionByEvictionAPI); Pod a-w1-0 ends: the workers have not come to the end of "
        "their iteration after 40 s; training goes on from the newest verified checkpoint. Raise "
        "workers.terminationGracePeriodSeconds"
    )
    assert run.training().status.restarts_without_progress == 0


def test_a_gang_that_does_not_leave_for_a_pod_that_is_long_gone_is_ended_for_its_cause() -> None:
    run = amid(workers__terminationGracePeriodSeconds=40).holds_up(2, "upload").evicted(1)
    run.until(lambda s: s.attempt == 2)
    last = run.status.last_failure
    assert last is not None
    assert last.cause == "Disrupted"
    assert "within 40 s" in last.message
    assert "a-w2-0 still save or upload" in last.message


def test_a_pod_deleted_by_force_is_lost_at_once() -> None:
    run = amid().deleted(1, grace=0).passes()
    assert writes(run) == [(2, "hold")]
    assert run.status.restarts.by_cause == {"PodDeleted": 1}


def test_a_node_that_is_lost_while_its_pod_leaves_ends_the_attempt_at_once() -> None:
    run = amid().holds_up(1, "workers").evicted(1).round()
    assert run.phase == "drain"
    run.node_dies(run.pod(1).view.node).passes()
    assert writes(run) == [(2, "hold")]
    assert run.status.restarts.by_cause == {"NodeLost": 1}


def test_a_lost_connection_while_a_pod_leaves_is_put_down_to_that_pod() -> None:
    run = amid().holds_up(1, "workers").evicted(1).round()
    run.worker_fails(2, "Peer").passes()
    assert writes(run) == [(2, "hold")]
    assert run.status.restarts.by_cause == {"Disrupted": 1}


def test_a_noexecute_taint_has_the_gang_leave_before_its_pod_is_evicted_and_go_on_elsewhere() -> None:
    run = amid()
    node = run.pod(1).view.node
    run.cluster.taint(node, "cloud.example/spot-interruption")
    run.passes()
    assert writes(run) == [(1, "drain")]
    run.until(lambda s: s.attempt == 2)
    left_at = run.cluster.world.store.commits[-1][1]
    run.training()
    assert (left_at % 10, start_of(run, 2)) == (5, left_at)
    assert run.pod(1).view.node != node
    assert run.status.restarts.by_cause == {"NodeLost": 1}


def test_a_whole_gang_that_is_evicted_at_once_leaves_and_is_placed_anew_where_it_was() -> None:
    run = amid(nodes=6).evicted(0).evicted(1).evicted(2).until(lambda s: s.attempt == 2).training()
    assert start_of(run, 2) % 10 == 5
    assert run.status.restarts_without_progress == 0
    assert (run.status.placement, run.pods) == (2, ["a-w0-1", "a-w1-1", "a-w2-1"])


def test_a_run_that_ends_while_it_is_to_leave_has_succeeded() -> None:
    run = make_run().workers(2).with_spec(training__iterations=20).training().until(lambda s: s.iteration == 20)
    run.suspended().until_quiet(10)
    assert run.status.state == "Succeeded" or run.status.checkpoint is not None


def test_an_operator_that_starts_anew_amid_a_drain_waits_for_it_like_the_one_before() -> None:
    run = amid().holds_up(0, "upload").evicted(2).until_quiet(5)
    assert run.phase == "drain"
    run.passes()
    assert writes(run) == []
    assert run.said("Training") == ("False", reasons.DRAINING)


def test_the_disruption_budget_lets_one_member_go_at_a_time_and_is_lowered_when_the_run_ends() -> None:
    run = make_run().workers(3).on_nodes(4).training()
    assert run.cluster.budget == 2
    assert run.over().until_quiet(2).cluster.budget == 0


def test_a_drain_of_two_nodes_takes_one_member_at_a_time_and_no_iteration_is_lost() -> None:
    run = amid(nodes=5)
    first, second = run.pod(1).view.name, run.pod(2).view.name
    for name in (first, second):
        node = run.cluster.pods[name].view.node
        run.cluster.nodes[node] = replace(run.cluster.nodes[node], unschedulable=True)
    assert run.cluster.evict(first)
    assert not run.cluster.evict(second)
    run.round()
    assert not run.cluster.evict(second), "the first is still leaving"
    run.until(lambda s: s.attempt == 2).until(lambda _: run.cluster.evict(second))
    run.until(lambda s: s.state == "Running" and run.pod(2).view.incarnation == 1)
    attempt = run.status.attempt
    assert start_of(run, attempt) == max(step for made, step in run.cluster.world.store.commits if made < attempt)
    assert start_of(run, attempt) % 10 == 5
    assert run.status.restarts_without_progress == 0


def test_a_gang_of_one_may_be_evicted_since_its_replacement_comes_only_then() -> None:
    run = make_run().workers(1).on_nodes(2).training()
    assert run.cluster.budget is None
    assert run.cluster.evict("a-w0-0")


def test_spares_that_stand_by_do_not_let_two_members_go_at_once() -> None:
    run = make_run().workers(2).on_nodes(3).with_spec(elasticity={"spares": 1}).training().until_quiet(3)
    assert run.cluster.budget == 2
    assert run.cluster.evict(run.pod(0).view.name)
    assert not run.cluster.evict(run.pod(1).view.name)


def test_a_suspended_run_keeps_nobody_from_draining_its_nodes() -> None:
    run = amid().suspended().until(lambda s: s.reason == reasons.SUSPENDED)
    assert run.cluster.budget == 0
    assert run.suspended(False).training().cluster.budget == 2


def test_a_gang_leaves_with_the_configuration_that_it_trained_with_and_the_next_attempt_has_the_new_one() -> None:
    run = make_run().workers(2).with_spec(training__iterations=10_000).training()
    assert run.cluster.assignment is not None
    trained_with = run.cluster.assignment.config_json
    storage, parallelism = run.cluster.spec.storage, run.cluster.spec.parallelism
    run.cluster.change_spec(
        storage=storage.model_copy(update={"endpoint": "https://elsewhere"}),
        parallelism=parallelism.model_copy(update={"tensor": 1}),
    )
    run.until(lambda _: run.phase == "drain")
    assert run.cluster.assignment.config_json == trained_with
    run.until(lambda _: run.phase == "hold")
    assert "https://elsewhere" in run.cluster.assignment.config_json
