"""Failures in the planner's scenarios: what they are put down to, what is replaced, what is avoided."""

from __future__ import annotations

from dataclasses import replace

import pytest

from starcoder_operator.api.v1alpha1 import StarCoderRunStatus
from starcoder_operator.domain import reasons
from starcoder_operator.domain.hearing import USUAL
from starcoder_operator.domain.patience import AWAIT_CAUSE
from starcoder_operator.domain.plan import EmitEvent, WriteAssignment
from starcoder_operator.domain.planner import plan
from starcoder_operator.domain.snapshot import ContainerView
from starcoder_trainer.contract import names
from starcoder_trainer.contract.report import Problem
from tests.support.scenarios import Scenario, make_run


@pytest.mark.parametrize("member", [0, 2])
def test_a_lost_connection_is_put_down_to_the_member_that_misses_its_heartbeats(member: int) -> None:
    run = make_run().workers(3).on_nodes(4).training()
    node = run.pod(member).view.node
    run.node_dies(node, noticed=False).until(lambda s: s.restarts.total == 1)
    assert run.status.restarts.by_cause == {"AgentUnresponsive": 1}
    assert run.status.restarts_without_progress == 0
    assert run.training().status.restarts.total == 1


@pytest.mark.parametrize("member", [0, 2])
def test_a_lost_connection_is_put_down_to_the_node_that_is_found_lost_later(member: int) -> None:
    run = make_run().workers(3).on_nodes(4).without_relay().training()
    node = run.pod(member).view.node
    run.node_dies(node, noticed=False).until(lambda s: s.restarts.total == 1)
    assert run.status.restarts.by_cause == {"Peer": 1}
    assert run.status.restarts_without_progress == 1
    run.until(lambda s: s.last_failure is not None and s.last_failure.cause == "AgentUnresponsive")
    assert run.status.restarts.by_cause == {"AgentUnresponsive": 1}
    assert run.status.restarts_without_progress == 0
    assert run.training().status.restarts.total == 1


def test_a_gang_that_does_not_form_is_put_down_to_the_member_that_is_lost_meanwhile() -> None:
    run = make_run().workers(2).on_nodes(3).training().stands_still(0, "FormationTimeout", "connection reset").passes()
    assert run.status.restarts.total == 0
    run.node_dies(run.pod(1).view.node).until(lambda s: s.restarts.total == 1)
    assert (run.status.restarts.by_cause, run.status.restarts_without_progress) == ({"NodeLost": 1}, 0)


def test_a_lost_connection_is_put_down_to_the_lost_node_where_the_operator_died_before_it_held_the_next() -> None:
    run = make_run().workers(3).on_nodes(4).training()
    node = run.pod(1).view.node
    run.node_dies(node, noticed=False).until(lambda s: "PeerLost" in [c.reason for c in s.conditions])
    run.waits(AWAIT_CAUSE)
    snapshot = run.snapshot
    run.cluster.write_status(snapshot, plan(snapshot).status)
    assert (run.status.attempt, run.status.restarts.by_cause, run.phase) == (2, {"Peer": 1}, "run")
    run.waits(USUAL.stale).training()
    assert run.status.restarts.by_cause == {"AgentUnresponsive": 1}


def test_a_lost_connection_is_put_down_to_the_node_that_has_restarted_meanwhile() -> None:
    run = make_run().workers(2).training().worker_fails(1, "Peer").passes().waits(AWAIT_CAUSE).passes()
    assert run.status.restarts.by_cause == {"Peer": 1}
    went = ContainerView(names.CONTAINER_AGENT, False, 1, exit_code=255, terminated_reason="Unknown")
    before = run.snapshot

    def after(seconds: float | None, watched: float = 600.0) -> StarCoderRunStatus:
        first, *others = before.pods
        first = replace(first, containers=(went,), agent_changed=seconds, age=watched)
        return plan(replace(before, pods=(first, *others))).status

    assert after(60.0).restarts.by_cause == {"Peer": 1}, "a restart of long ago explains nothing"
    assert after(None).restarts.by_cause == {"Peer": 1}, "nor does one that was there before"
    assert after(None, watched=1.0).restarts.by_cause == {"NodeRestarted": 1}, "an operator that came later"
    assert after(1.0).restarts.by_cause == {"NodeRestarted": 1}
    assert after(1.0).restarts_without_progress == 0


def agent_restarted() -> Scenario:
    """Counted as a restart of the agent alone; the kubelet has said nothing yet."""
    run = make_run().workers(2).on_nodes(3).training()
    run.cluster.agent_restarts("a-w1-0")
    run.until(lambda s: s.restarts.total == 1)
    assert (run.status.restarts.by_cause, run.status.restarts_without_progress) == ({"AgentRestarted": 1}, 1)
    return run


@pytest.mark.parametrize(
    ("changed", "watched", "cause"),
    [(1.0, 600.0, "NodeRestarted"), (None, 1.0, "NodeRestarted"), (None, 600.0, "AgentRestarted")],
    ids=["seen to change", "by an operator that came later", "as it was before"],
)
def test_an_agent_that_was_started_again_is_put_down_to_its_node_once_the_kubelet_says_so(
    changed: float | None, watched: float, cause: str
) -> None:
    before = agent_restarted().snapshot
    went = ContainerView(names.CONTAINER_AGENT, True, 1, exit_code=255, terminated_reason="Unknown")
    pods = (replace(p, containers=(went,), agent_changed=changed, age=watched) for p in before.pods if p.member == 1)
    after = plan(replace(before, pods=(*(p for p in before.pods if p.member != 1), *pods))).status
    assert after.restarts.by_cause == {cause: 1}
    assert after.restarts_without_progress == (cause == "AgentRestarted")


def test_an_agent_that_was_started_again_on_a_node_that_is_gone_a_moment_later_is_put_down_to_the_node() -> None:
    run = agent_restarted()
    run.node_dies(run.pod(1).view.node).until(lambda s: s.restarts.by_cause == {"NodeLost": 1})
    assert (run.status.restarts_without_progress, run.status.restarts.total) == (0, 1)


def test_an_agent_that_was_started_again_and_is_deleted_a_moment_later_stays_one() -> None:
    run = agent_restarted().deleted(1, grace=0).training()
    assert run.status.restarts.by_cause == {"AgentRestarted": 1}


def test_a_lost_connection_waits_a_moment_for_its_cause_and_judges_nothing_meanwhile() -> None:
    run = make_run().workers(2).training().worker_fails(1, "Peer").passes()
    assert run.said("Training") == ("Unknown", reasons.PEER_LOST)
    assert (run.status.restarts.total, run.status.attempt, run.phase) == (0, 1, "run")
    assert run.last is not None
    assert run.last.look_again == pytest.approx(AWAIT_CAUSE)
    run.waits(AWAIT_CAUSE).passes()
    assert run.status.restarts.by_cause == {"Peer": 1}
    assert run.phase == "hold"


def test_a_lost_connection_that_would_end_the_run_waits_longer_than_a_dead_node_takes_to_be_noticed() -> None:
    run = make_run().workers(3).on_nodes(4).with_spec(failurePolicy__maxRestartsWithoutProgress=0).training()
    run.node_dies(run.pod(1).view.node, noticed=False).until(lambda s: s.restarts.total == 1)
    assert run.status.restarts.by_cause == {"AgentUnresponsive": 1}
    assert run.training().status.state == "Running"


def test_a_gang_that_hangs_is_put_down_to_the_member_that_keeps_the_others_waiting() -> None:
    run = make_run().workers(3).training().stands_still(0, "Hang", "waits", (4, 9)).passes()
    assert run.said("Training") == ("Unknown", reasons.HANGS)
    assert (run.status.restarts.total, run.phase) == (0, "run")
    run.stands_still(2, "Hang", "is stopped", (0, 9)).passes()
    assert run.status.restarts.by_cause == {"Hang": 1}
    assert run.phase == "hold", "nothing can explain a stopped process but itself"
    last = run.status.last_failure
    assert last is not None
    assert (last.pod, last.node) == ("a-w2-0", run.pod(2).view.node)
    assert "is stopped" in last.message


def test_a_gang_of_which_all_only_wait_is_counted_as_a_hang_after_a_moment() -> None:
    run = make_run().workers(2).training().stands_still(0, "Hang", "waits", (4, 9)).passes()
    run.stands_still(1, "Hang", "waits", (4, 8)).passes()
    assert run.status.restarts.total == 0
    run.waits(AWAIT_CAUSE).passes()
    assert run.status.restarts.by_cause == {"Hang": 1}
    assert run.status.restarts_without_progress == 1
    assert run.status.last_failure is not None
    assert run.status.last_failure.pod == "a-w1-0", "it has come least far"
    run.training()


def test_a_gang_that_waits_for_a_member_that_waits_for_storage_is_charged_nothing() -> None:
    run = make_run().workers(2).training().stands_still(0, "Hang", "waits", (4, 9)).passes()
    run.stands_still(1, "DataStall", "reads", (1, 9)).passes()
    assert run.status.restarts.by_cause == {"DataStall": 1}
    assert run.status.restarts_without_progress == 0
    assert run.status.node_failures == (), "the node of a member that only waited is blamed"
    run.training()


def test_a_pod_whose_workers_can_t_be_ended_is_replaced() -> None:
    run = make_run().workers(2).on_nodes(3).training().worker_fails(0).passes()
    stuck = run.pod(1)
    lease = run.cluster.leases[1]
    assert lease.report is not None
    lease.report = replace(lease.report, problem=Problem("WorkersStuck", "did not end"))
    run.passes()
    assert run.pod(1).view.incarnation == stuck.view.incarnation + 1
    run.training()
    assert run.status.restarts.by_cause == {"Crash": 1}, "the replacement is no failure of its own"


def test_a_better_cause_that_shows_in_time_is_counted_alone() -> None:
    run = make_run().workers(2).training().worker_fails(1, "Peer").passes()
    run.node_dies(run.pod(0).view.node).passes()
    assert run.status.restarts.by_cause == {"NodeLost": 1}


def test_an_attempt_is_counted_once_where_the_operator_dies_before_it_holds_the_next() -> None:
    run = make_run().workers(2).training().worker_fails(0)
    snapshot = run.snapshot
    run.cluster.write_status(snapshot, plan(snapshot).status)
    assert (run.status.attempt, run.phase) == (2, "run")
    run.training()
    assert (run.status.attempt, run.status.restarts.total) == (2, 1)


def test_survivors_are_told_to_hold_before_anything_that_can_be_refused() -> None:
    run = make_run().workers(2).on_nodes(3).training()
    run.failed(run.pod(1).view.node)
    assert run.last is not None
    first = next(a for a in run.last.actions if not isinstance(a, EmitEvent))
    assert isinstance(first, WriteAssignment)
    assert (first.assignment.phase, first.assignment.attempt) == ("hold", 2)
    assert [bool(m.boot_id) for m in first.assignment.members] == [True, False]


def test_the_replacement_avoids_the_lost_node_and_is_built_anew_when_that_is_well_again() -> None:
    run = make_run().workers(2).on_nodes(2).training()
    node = run.pod(1).view.node
    run.failed(node).until_quiet(5)
    assert run.pod(1).view.avoided_nodes == (node,)
    assert run.said("Scheduled") == ("False", reasons.UNSCHEDULABLE)
    assert run.status.state == "Recovering"
    run.node_returns(node).training()
    assert (run.pod(1).view.node, run.pod(1).view.avoided_nodes) == (node, ())


def test_one_of_two_lost_pods_is_placed_where_there_is_room_for_one() -> None:
    """Had the group kept its size, the scheduler would have placed none."""
    run = make_run().workers(3).on_nodes(4).training()
    for member in (1, 2):
        run.node_dies(run.pod(member).view.node)
    run.until_quiet(5)
    assert sum(bool(p.view.node) and run.cluster.counts(p) for p in run.cluster.pods.values()) == 2


def test_a_pod_that_terminates_on_its_dead_node_is_never_waited_for() -> None:
    run = make_run().workers(2).on_nodes(3).training()
    name, node = run.pod(1).view.name, run.pod(1).view.node
    run.failed(node).training()
    assert run.cluster.pods[name].view.deleting
    assert run.status.workers.summary == "2/2"


def test_an_agent_that_was_started_again_ends_the_attempt_and_joins_the_next() -> None:
    run = make_run().workers(2).training()
    run.cluster.agent_restarts("a-w1-0")
    run.until(lambda s: s.restarts.total == 1).training()
    assert run.status.restarts.by_cause == {"AgentRestarted": 1}
    assert run.pods == ["a-w0-0", "a-w1-0"]


def test_agents_that_are_all_silent_are_not_judged() -> None:
    run = make_run().workers(2).training().silent().waits(10 * USUAL.stale).passes()
    assert run.said("Training") == ("Unknown", reasons.AGENTS_SILENT)
    assert (run.status.state, run.status.restarts.total, run.phase) == ("Running", 0, "run")
    assert run.status.tokens_per_second is None
    run.cluster.api_reaches_agents = True
    run.round().training()
    assert (run.status.attempt, run.status.restarts.total) == (1, 0)


@pytest.mark.parametrize("first", [0, 1, 2], ids=["relay", "second", "third"])
@pytest.mark.parametrize("apart", [False, True], ids=["API server away", "whole network away"])
def test_the_first_agent_that_is_heard_again_is_no_witness_against_the_others(first: int, apart: bool) -> None:
    run = make_run().workers(3).with_spec(training__iterations=10_000).training().until_quiet(3)
    run.cluster.cut_off = {0, 1, 2} if apart else set()
    run.silent().until_quiet(int(2 * USUAL.stale))
    assert run.said("Training") == ("Unknown", reasons.AGENTS_SILENT)
    run.cluster.api_reaches_agents, run.cluster.out_of_reach = True, {0, 1, 2} - {first}
    run.until_quiet(4)
    assert (run.status.attempt, run.status.restarts.total) == (1, 0)
    run.cluster.cut_off = run.cluster.out_of_reach = set()
    run.until_quiet(30)
    assert (run.status.attempt, run.status.restarts.total, run.status.state) == (1, 0, "Running")
    assert len(run.pods) == 3


def test_who_stays_away_after_a_silence_of_all_is_lost() -> None:
    run = make_run().workers(3).on_nodes(4).with_spec(training__iterations=10_000).training().until_quiet(3)
    run.silent().until_quiet(int(2 * USUAL.stale))
    run.cluster.api_reaches_agents, run.cluster.out_of_reach, run.cluster.cut_off = True, {2}, {2}
    run.until(lambda s: s.restarts.total > 0)
    assert run.status.last_failure is not None
    assert (run.status.last_failure.cause, run.status.last_failure.member) == ("AgentUnresponsive", 2)


def test_the_cause_of_a_lost_connection_is_waited_for_after_a_silence_of_all_as_well() -> None:
    spec = {"failurePolicy__maxRestartsWithoutProgress": 0, "training__iterations": 10_000}
    run = make_run().workers(2).with_spec(**spec).training()
    run.silent().until_quiet(100)
    assert run.said("Training") == ("Unknown", reasons.AGENTS_SILENT)
    run.worker_fails(1, "Peer")
    run.cluster.api_reaches_agents = True
    run.until_quiet(5)
    assert run.said("Training") == ("Unknown", reasons.PEER_LOST)
    run.node_dies(run.pod(0).view.node).until(lambda s: s.restarts.total > 0)
    assert run.status.restarts.by_cause == {"NodeLost": 1}


def test_head_of_a_higher_attempt_is_passed_over_and_charged_to_nobody() -> None:
    run = make_run().workers(2)
    run.cluster.world.store.attempt = 7
    run.training()
    assert run.status.attempt == 8
    assert run.status.restarts.total == 0


def test_an_attempt_whose_assignment_was_deleted_is_not_held_again() -> None:
    run = make_run().workers(2).training()
    run.cluster.delete_assignment()
    run.training().passes()
    assert run.status.attempt == 2


def test_a_member_that_is_done_may_go_before_the_others_are() -> None:
    run = make_run().workers(2).until(lambda s: s.iteration >= 80)
    report = run.cluster.leases[1].report
    assert report is not None
    run.cluster.leases[1].report = replace(report, state="done")
    run.cluster.pods.pop("a-w1-0")
    run.passes()
    assert (run.status.restarts.total, run.phase) == (0, "run")
    assert run.pods == ["a-w0-0"], "a new agent would end the attempt"


def test_more_iterations_than_the_attempt_knew_of_are_trained_in_another() -> None:
    run = make_run().workers(2).training()
    training = run.cluster.spec.training.model_copy(update={"iterations": 150})
    run.cluster.change_spec(training=training)
    run.over()
    assert (run.status.state, run.status.iteration) == ("Succeeded", 150)
    assert (run.status.attempt, run.status.restarts.total) == (2, 0)


def test_a_failed_run_stops_its_workers_and_keeps_the_pods_that_end_by_themselves() -> None:
    run = make_run().workers(2).training().worker_fails(0, "UserError").over().until_quiet(10)
    assert run.phase == "stop"
    assert {p.view.phase for p in run.cluster.pods.values()} == {"Succeeded"}
    assert run.cluster.groups == {}


def test_pods_that_do_not_end_when_the_run_is_over_are_deleted() -> None:
    run = make_run().workers(2).training().worker_fails(0, "UserError").passes().silent().until_quiet(70)
    assert run.pods == []
