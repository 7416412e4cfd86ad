"""Nodes that a run keeps away from: which, for how long, and never at the price of waiting."""

from __future__ import annotations

from dataclasses import replace

import pytest

from starcoder_operator.api.v1alpha1 import StarCoderRunStatus
from starcoder_operator.domain import avoidance, reasons
from starcoder_operator.domain.failure import CAUSES, Cause, Failure
from starcoder_operator.domain.timestamps import after, seconds_between
from tests.support.scenarios import Scenario, make_run

NOW = "2026-01-01T00:00:00Z"
TTL = 6 * 3600


def noted(*failures: tuple[Cause, str], at: float = 0, status: StarCoderRunStatus | None = None) -> StarCoderRunStatus:
    signs = [Failure(cause, i, "p", node, "why") for i, (cause, node) in enumerate(failures)]
    return avoidance.noted(status or StarCoderRunStatus(), signs, ttl=TTL, now=after(NOW, at))


def device_fails(run: Scenario, member: int) -> Scenario:
    """The member's worker meets an error of its GPU while it trains, and the run trains again."""
    run.until(lambda s: s.state == "Running")
    return run.worker_fails(member, "DeviceError", "CUDA error").passes()


def is_at(run: Scenario, member: int, iteration: int) -> bool:
    agent = run.pod(member).agent
    return agent is not None and agent.running is not None and agent.iteration == iteration


def avoided(run: Scenario) -> set[str]:
    return {a.node for a in run.status.avoided_nodes}


def test_two_failures_that_blame_a_node_within_an_hour_are_enough() -> None:
    status = noted((Cause.NODE_LOST, "n1"))
    assert avoidance.avoided(status) == set()
    status = noted((Cause.DEVICE_ERROR, "n1"), (Cause.NODE_LOST, "n2"), at=3599, status=status)
    assert avoidance.avoided(status) == {"n1"}
    (entry,) = status.avoided_nodes
    assert (entry.failures, entry.reason) == (2, "2 failures within an hour: NodeLost, DeviceError")
    assert seconds_between(entry.since, entry.until) == TTL


def test_failures_an_hour_apart_are_not() -> None:
    status = noted((Cause.NODE_LOST, "n1"), at=3600, status=noted((Cause.NODE_LOST, "n1")))
    assert avoidance.avoided(status) == set()
    assert len(status.node_failures) == 1


def test_one_event_on_many_members_of_a_node_is_one_failure() -> None:
    assert avoidance.avoided(noted((Cause.NODE_LOST, "n1"), (Cause.NODE_LOST, "n1"))) == set()


@pytest.mark.parametrize("cause", [c for c in Cause if not CAUSES[c].blames_node])
def test_what_does_not_blame_the_node_is_not_held_against_it(cause: Cause) -> None:
    status = noted((cause, "n1"), status=noted((cause, "n1")))
    assert status == StarCoderRunStatus()


def test_the_memory_is_bounded() -> None:
    status = StarCoderRunStatus()
    for i in range(avoidance.MOST_REMEMBERED + 5):
        status = noted((Cause.NODE_LOST, f"n{i}"), status=status)
    assert len(status.node_failures) == avoidance.MOST_REMEMBERED
    assert status.node_failures[-1].node == f"n{avoidance.MOST_REMEMBERED + 4}"


def test_a_member_on_a_node_that_failed_twice_moves_and_its_pods_stay_away() -> None:
    run = make_run().workers(2).on_nodes(3).training()
    bad = run.pod(1).view.node
    device_fails(run, 1)
    assert run.training().pod(1).view.node == bad
    device_fails(run, 1)
    assert avoided(run) == {bad}
    assert ("Warning", reasons.NODE_AVOIDED) in run.told
    run.training()
    assert run.pod(1).view.node not in ("", bad)
    assert run.pod(1).view.avoided_nodes == (bad,)
    assert run.pod(0).view.incarnation == 0


def test_the_member_of_an_avoided_node_keeps_its_pod_until_its_attempt_ends() -> None:
    run = make_run().workers(2).on_nodes(3).training()
    entry = noted((Cause.NODE_LOST, run.pod(1).view.node), status=noted((Cause.NODE_LOST, run.pod(1).view.node)))
    run.cluster.status = run.status.model_copy(update={"avoided_nodes": entry.avoided_nodes})
    run.until_quiet(3)
    assert (run.status.attempt, run.pod(1).view.incarnation) == (1, 0)


def test_a_node_is_used_again_when_its_time_is_over() -> None:
    run = make_run().workers(2).on_nodes(3).training()
    bad = run.pod(1).view.node
    device_fails(device_fails(run, 1), 1).training()
    run.waits(TTL).round()
    assert avoided(run) == set()
    assert ("Normal", reasons.NODE_FORGIVEN) in run.told
    run.node_dies(run.pod(1).view.node).passes().training()
    assert run.pod(1).view.node == bad


def test_a_run_that_has_no_other_node_stays_where_it_failed_and_says_so() -> None:
    run = make_run().workers(2).on_nodes(2).training()
    device_fails(device_fails(run, 1), 1)
    assert avoided(run) == set()
    assert run.pods == ["a-w0-0", "a-w1-0"]
    said = [e.message for e in run.cluster.events if e.reason == reasons.NODE_FORGIVEN]
    assert said == [
        "node-1 is used in spite of 2 failures within an hour: DeviceError, DeviceError: the other nodes have no room "
        "for 2 Pods"
    ]
    assert run.training().status.restarts.total == 2


def test_nothing_is_forgiven_for_want_of_nodes_that_are_not_listed_yet() -> None:
    """An operator that has just begun, or lists anew, knows few nodes for a moment."""
    run = make_run().workers(2).on_nodes(3).training()
    device_fails(device_fails(run, 1), 1).training()
    seen = run.snapshot
    few = replace(seen, nodes={a.node: seen.nodes[a.node] for a in seen.status.avoided_nodes})
    assert avoidance.forgiven(few, (), few.status)[0].avoided_nodes == ()
    assert avoidance.forgiven(replace(few, nodes_complete=False), (), few.status) == (few.status, ())


def test_the_node_that_was_avoided_first_is_forgiven_when_others_die() -> None:
    run = make_run().workers(2).on_nodes(4).with_spec(failurePolicy__maxRestartsWithoutProgress=9).training()
    first, second = run.pod(0).view.node, run.pod(1).view.node
    device_fails(device_fails(run, 0), 0)
    device_fails(device_fails(run, 1), 1).training()
    assert avoided(run) == {first, second}
    run.node_dies(run.pod(0).view.node).round()
    assert avoided(run) == {second}
    assert run.training().pod(0).view.node == first


def test_a_pod_that_finds_no_place_though_there_seem_to_be_some_gets_an_avoided_node_after_a_while() -> None:
    """Another tenant holds the GPUs that the nodes' figures show."""
    run = make_run().workers(2).on_nodes(3).training()
    bad = run.pod(1).view.node
    run.cluster.full = run.cluster.nodes.keys() - {pod.view.node for pod in run.cluster.pods.values()}
    device_fails(device_fails(run, 1), 1).until_quiet(10)
    assert (avoided(run), run.status.reason) == ({bad}, reasons.UNSCHEDULABLE)
    run.waits(avoidance.FORGIVE_AFTER).training()
    assert avoided(run) == set()
    assert run.pod(1).view.node == bad


def test_no_node_is_avoided_where_the_policy_says_so() -> None:
    run = make_run().workers(2).on_nodes(3).with_spec(failurePolicy__nodeAvoidance__ttl="0s").training()
    device_fails(device_fails(run, 1), 1).training()
    assert (avoided(run), run.pod(1).view.incarnation) == (set(), 0)


def test_the_same_exception_twice_on_one_node_moves_its_member_to_see_whose_fault_it_is() -> None:
    run = make_run().workers(2).on_nodes(3).training()
    node = run.pod(1).view.node
    for attempt in (1, 2, 3):
        run.until(lambda s: is_at(run, 1, 15))
        run.worker_fails(1, message="IndexError: out of range", fingerprint="f").passes()
        assert avoided(run) == (set() if attempt == 1 else {node})
    assert run.pod(1).view.node not in ("", node)
    assert (run.status.state, run.status.reason) == ("Failed", "UserError")
    assert f"on {node} and then on {run.pod(1).view.node}" in run.status.message


def test_an_exception_that_shows_on_several_nodes_at_once_moves_nobody() -> None:
    run = make_run().workers(2).on_nodes(3).training()
    for _ in range(2):
        run.until(lambda s: is_at(run, 0, 15))
        for member in (0, 1):
            run.stands_still(member, "Crash", "DivergedError: the loss is nan", fingerprint="f")
        run.passes()
    assert run.status.restarts.by_cause == {"Crash": 2}
    assert avoided(run) == set()


def test_a_hang_is_held_against_the_node_that_keeps_the_others_waiting_alone() -> None:
    run = make_run().workers(3).on_nodes(4).training()
    guilty = run.pod(2).view.node
    for _ in range(2):
        run.training()
        for member, what, suspicion in ((0, "waits", (4, 9)), (1, "waits", (4, 8)), (2, "is stopped", (0, 9))):
            run.stands_still(member, "Hang", what, suspicion)
        run.passes()
    assert run.status.restarts.by_cause == {"Hang": 2}
    assert {f.node for f in run.status.node_failures} == {guilty} == avoided(run)


def test_a_spare_that_finds_no_place_brings_no_node_back_that_has_failed() -> None:
    run = make_run().workers(2).spares(1).on_nodes(3).training()
    bad = run.pod(1).view.node
    device_fails(device_fails(run, 1), 1).training()
    assert avoided(run) == {bad}
    assert run.waits(2 * avoidance.FORGIVE_AFTER).until_quiet(5).status.state == "Running"
    assert avoided(run) == {bad}
    assert run.status.workers.spares == 0


def stuck(run: Scenario, member: int) -> Scenario:
    """Its Pod has a node and never comes up there."""
    run.cluster.slow = {"stuck"}
    run.cluster.pods[run.passes().pod(member).view.name].image = "stuck"
    return run


def test_a_pod_that_never_comes_up_on_its_node_is_tried_on_another_where_others_have_come_up() -> None:
    run = stuck(make_run().workers(2).on_nodes(3), 1).until_quiet(5)
    node = run.pod(1).view.node
    run.waits(avoidance.NO_ANSWER - 10).until_quiet(2)
    assert (avoided(run), run.pod(1).view.incarnation) == (set(), 0)
    assert run.training().pod(1).view.node not in ("", node)
    assert avoided(run) == {node}
    assert ("Warning", reasons.NODE_AVOIDED) in run.told
    assert "has not answered" in run.status.avoided_nodes[0].reason


def test_a_pod_that_does_not_come_up_keeps_its_node_where_no_other_has_room_or_none_has_come_up() -> None:
    run = stuck(make_run().workers(2).on_nodes(2), 1).until_quiet(5).waits(2 * avoidance.NO_ANSWER).until_quiet(5)
    assert (avoided(run), run.pod(1).view.incarnation) == (set(), 0)
    run = stuck(stuck(make_run().workers(2).on_nodes(4), 0), 1).until_quiet(5)
    run.waits(2 * avoidance.NO_ANSWER).until_quiet(5)
    assert (avoided(run), run.pods) == (set(), ["a-w0-0", "a-w1-0"])


def test_where_nodes_cannot_be_read_none_is_forgiven_for_want_of_room() -> None:
    run = make_run().workers(2).on_nodes(3).training()
    status = noted((Cause.NODE_LOST, "n1"), status=noted((Cause.NODE_LOST, "n1")))
    blind = replace(run.snapshot, nodes={})
    assert avoidance.forgiven(blind, (), status) == (status, ())
