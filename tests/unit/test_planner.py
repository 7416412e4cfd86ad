"""What the planner decides, told as scenarios in a cluster in memory whose agents are the shipped state machine."""

from __future__ import annotations

import pytest

from starcoder_operator.domain import reasons
from starcoder_operator.domain.plan import CreatePod, EnsureGang, WriteAssignment
from tests.support.scenarios import make_run


def test_a_run_that_nothing_happens_to_succeeds_in_its_first_attempt() -> None:
    run = make_run().workers(2).over()
    assert run.status.state == "Succeeded"
    assert (run.status.attempt, run.status.restarts.total) == (1, 0)
    assert run.said("Complete") == ("True", reasons.SUCCEEDED)
    assert run.said("CheckpointVerified") == ("True", reasons.VERIFIED)


def test_the_first_pass_creates_the_gang_before_its_pods() -> None:
    run = make_run().workers(3).passes()
    assert run.last is not None
    kinds = [type(a) for a in run.last.actions if isinstance(a, EnsureGang | CreatePod)]
    assert kinds == [EnsureGang, CreatePod, CreatePod, CreatePod]


def test_incarnations_are_recorded_by_the_pass_that_creates_the_pods() -> None:
    run = make_run().workers(2).passes()
    assert run.status.incarnations == (0, 0)


def test_a_pass_over_a_run_that_trains_does_nothing_when_nothing_has_changed() -> None:
    run = make_run().workers(2).training().passes().passes()
    assert run.last is not None
    assert run.last.actions == ()


def test_a_lost_node_s_pod_is_replaced_under_a_new_name_elsewhere_and_nobody_is_charged() -> None:
    run = make_run("a").workers(3).on_nodes(4).training()
    pod = run.pod(1).view
    run.failed(pod.node)
    assert run.status.state == "Recovering"
    assert run.phase == "hold"
    run.training()
    assert run.pod(1).view.name == "a-w1-1"
    assert run.pod(1).view.node != pod.node
    assert run.status.attempt == 2
    assert run.status.restarts.by_cause == {"NodeLost": 1}
    assert run.status.restarts_without_progress == 0


def test_a_crash_is_charged_survivors_keep_their_pods_and_a_newer_checkpoint_refunds() -> None:
    run = make_run().workers(2).training()
    pods = run.pods
    run.worker_fails(1).until(lambda s: s.restarts.total == 1)
    assert run.status.restarts_without_progress == 1
    assert run.status.last_failure is not None
    assert run.status.last_failure.cause == "Crash"
    run.training()
    assert run.pods == pods
    run.until(lambda s: s.restarts_without_progress == 0)
    assert run.status.restarts.total == 1


def test_crashes_without_progress_end_the_run_when_they_are_more_than_allowed() -> None:
    run = make_run().workers(2).with_spec(failurePolicy__maxRestartsWithoutProgress=1).training()
    run.worker_fails(0).until(lambda s: s.restarts.total == 1).training()
    if run.status.restarts_without_progress == 1:
        run.worker_fails(0)
        run.over()
        assert run.status.state == "Failed"
        assert run.said("Complete") == ("False", reasons.RESTARTS_EXHAUSTED)
        assert ("Warning", reasons.RESTARTS_EXHAUSTED) in run.told
    else:
        pytest.fail("the failure was refunded before a newer checkpoint was verified")


def test_an_error_of_the_user_fails_the_run_at_once_with_its_message() -> None:
    run = make_run().workers(2).training().worker_fails(0, "UserError", "ValueError: no such activation").over()
    assert run.status.state == "Failed"
    assert run.status.attempt == 1
    assert "ValueError: no such activation" in run.status.message
    assert run.phase == "stop"


@pytest.mark.parametrize("reason", ["CredentialsMissing", "BucketNotFound", "DataNotFound", "StorageUnreachable"])
def test_what_hinders_the_leader_is_told_costs_no_attempt_and_is_mended_by_itself(reason: str) -> None:
    run = make_run().workers(2).hindered(reason).until_quiet(30)
    assert run.said("Training") == ("False", reason)
    assert run.status.restarts.total == 0
    assert run.told.count(("Warning", reason)) == 1, "told once, not at each pass"
    run.mended().training()
    assert run.status.attempt == 1


def test_a_suspended_run_holds_no_pod_and_resumes_in_a_new_attempt_and_placement() -> None:
    run = make_run().workers(2).training()
    placement = run.status.placement
    run.suspended().until(lambda s: s.state == "Suspended" and s.reason == reasons.SUSPENDED)
    assert run.pods == []
    run.suspended(False).training()
    assert run.status.attempt == 2
    assert run.status.placement > placement
    assert run.pods == ["a-w0-1", "a-w1-1"]
    assert run.status.restarts.total == 0


def test_no_room_for_one_pod_keeps_the_whole_gang_pending_with_a_reason() -> None:
    run = make_run().workers(3).on_nodes(2).until_quiet(20)
    assert run.status.state == "Pending"
    assert run.said("Scheduled")[0] == "False"
    assert run.status.attempt <= 1


def test_a_run_that_is_over_stays_so_whatever_is_changed_in_its_spec() -> None:
    run = make_run().workers(2).over().suspended().until_quiet(5).suspended(False).until_quiet(5)
    assert run.status.state == "Succeeded"
    assert run.status.attempt == 1


def test_an_attempt_is_written_once_in_each_phase() -> None:
    run = make_run().workers(2)
    written = []
    for _ in range(40):
        run.round()
        assert run.last is not None
        written += [a.assignment for a in run.last.actions if isinstance(a, WriteAssignment)]
    runs = [a for a in written if a.phase == "run"]
    assert [a.attempt for a in runs] == [1]
    assert runs[0].offer is not None


def test_a_whole_gang_that_is_lost_is_placed_again_as_a_gang() -> None:
    run = make_run().workers(2).on_nodes(4).training()
    nodes = {run.pod(0).view.node, run.pod(1).view.node}
    placement = run.status.placement
    for node in nodes:
        run.node_dies(node)
    run.until(lambda s: s.state == "Running" and s.attempt > 1)
    assert run.status.placement > placement
    assert not nodes & {run.pod(0).view.node, run.pod(1).view.node}
    assert run.status.restarts_without_progress == 0


def test_a_gang_that_is_lost_one_by_one_is_placed_again_as_a_gang() -> None:
    """The Pod that waits for the first one's room would be placed alone, as one that joins a gang that stands."""
    run = make_run().workers(2).on_nodes(2).training()
    nodes, placement = [run.pod(i).view.node for i in (0, 1)], run.status.placement
    run.node_dies(nodes[1]).until_quiet(10)
    assert (run.pod(1).view.name, run.pod(1).view.scheduling_group) == ("a-w1-1", f"a-p{placement}")
    run.node_dies(nodes[0]).until_quiet(10)
    groups = {run.pod(i).view.scheduling_group for i in (0, 1)}
    assert groups == {f"a-p{placement + 1}"}
    assert run.cluster.groups[f"a-p{placement + 1}"].min_count == 2
    for node in nodes:
        run.node_returns(node)
    run.until(lambda s: s.state == "Running" and s.attempt > 1)
    assert run.status.restarts_without_progress == 0


def test_a_spare_that_waits_is_left_alone_while_the_only_member_leaves() -> None:
    run = make_run().workers(1).on_nodes(1).with_spec(elasticity={"spares": 1}).training().until_quiet(3)
    waits = next(name for name in run.pods if name.startswith("a-w1-") or not run.cluster.pods[name].view.scheduled)
    run.holds_up(0, "workers").evicted(0).until_quiet(5)
    assert run.phase == "drain"
    assert waits in run.pods


def test_four_thousand_members_are_planned_in_a_pass_with_a_pod_each() -> None:
    run = make_run().with_spec(
        workers__replicas=4096, training__globalBatchSize=16384, training__microBatchSize=1
    ).on_nodes(1).passes()  # fmt: skip
    assert run.last is not None
    assert sum(isinstance(a, CreatePod) for a in run.last.actions) == 4096
