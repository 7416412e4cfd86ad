"""Spares: who takes a lost member's place, and what becomes of the members that stand by."""

from __future__ import annotations

import pytest

from starcoder_operator.domain import reasons
from starcoder_operator.domain.plan import EmitEvent, EnsureGang, EnsureLeases, WriteAssignment
from tests.support.scenarios import make_run


def test_a_spare_has_a_pod_and_a_lease_and_no_rank() -> None:
    run = make_run().workers(2).spares(1).training()
    assert run.pods == ["a-w0-0", "a-w1-0", "a-w2-0"]
    assert run.at_work == [0, 1]
    assert sorted(run.cluster.leases) == [0, 1, 2]
    spare = run.pod(2).agent.report
    assert (spare.state, spare.attempt) == ("idle", 0)
    workers = run.status.workers
    assert (workers.ready, workers.desired, workers.summary, workers.spares) == (2, 2, "2/2", 1)
    assert run.condition("Scheduled").message == "all 2 Pods have a node, and 1 of 1 spares"


def test_the_gang_asks_for_those_that_are_to_train_and_a_spare_without_room_holds_nothing_up() -> None:
    run = make_run().workers(2).spares(1).on_nodes(2).passes()
    assert run.last is not None
    assert EnsureGang("a-p1", 2) in run.last.actions
    assert EnsureLeases((0, 1, 2)) in run.last.actions
    run.training()
    assert run.said("Scheduled") == ("True", reasons.ALL_PODS_SCHEDULED)
    assert run.condition("Scheduled").message == "all 2 Pods have a node, and 0 of 1 spares"
    assert run.status.workers.spares == 0
    run.node_returns("node-new").until(lambda s: s.workers.spares == 1)
    assert (run.status.attempt, run.status.state) == (1, "Running")


def test_whoever_found_a_node_trains_whatever_their_index() -> None:
    run = make_run().workers(2).spares(1).on_nodes(3).passes()
    run.cluster.delete_pod("a-w0-0")
    for node in list(run.cluster.nodes)[:1]:
        run.cluster.node_dies(node)
        run.cluster.node_is_unknown(node)
    run.cluster.settle_cluster()
    run.cluster.refusing = {"create pod": "exceeded quota"}
    run.training()
    assert sorted(run.at_work) == [1, 2]


@pytest.mark.parametrize("member", [0, 1, 2])
def test_a_spare_takes_the_place_of_a_lost_member_at_once_and_its_new_pod_stands_by(member: int) -> None:
    run = make_run().workers(3).spares(1).on_nodes(5).training()
    survivors = [i for i in range(3) if i != member]
    before = [run.pod(i).view.name for i in survivors]
    run.failed(run.pod(member).view.node)
    assert run.last is not None
    (first,) = [a.assignment for a in run.last.actions if isinstance(a, WriteAssignment)]
    expected = [3 if i == member else i for i in range(3)]
    assert [place.index for place in first.members] == expected, "survivors keep their places"
    assert all(place.boot_id for place in first.members), "nobody is waited for"
    run.training()
    assert run.at_work == expected
    assert [run.pod(i).view.name for i in survivors] == before
    assert run.status.restarts.by_cause == {"NodeLost": 1}
    run.until(lambda s: s.workers.spares == 1)
    assert run.pod(member).agent.report.state == "idle"
    assert (run.status.attempt, run.status.state) == (2, "Running")


def test_a_place_is_handed_on_when_the_spare_that_took_it_is_lost_too() -> None:
    run = make_run().workers(2).spares(1).on_nodes(5).training()
    run.failed(run.pod(1).view.node).training().until(lambda s: s.workers.spares == 1)
    assert run.at_work == [0, 2]
    run.failed(run.pod(2).view.node).training()
    assert run.at_work == [0, 1]
    assert run.status.attempt == 3


def test_more_losses_than_spares_wait_for_new_pods_whichever_come_first() -> None:
    run = make_run().workers(3).spares(1).on_nodes(4).training()
    for member in (1, 2):
        run.node_dies(run.pod(member).view.node)
    run.until_quiet(5)
    assert run.status.state == "Recovering"
    assert run.at_work[:2] == [0, 3]
    run.node_returns("node-new").training()
    assert run.at_work[:2] == [0, 3]
    assert run.status.restarts.total == 1


def test_a_spare_on_a_node_that_dies_is_replaced_and_no_attempt_ends() -> None:
    run = make_run().workers(2).spares(1).on_nodes(4).training()
    run.failed(run.pod(2).view.node)
    assert run.pod(2).view.name == "a-w2-1"
    assert run.status.state == "Running"
    run.until(lambda s: s.workers.spares == 1).until_quiet(3)
    assert (run.status.attempt, run.status.restarts.total) == (1, 0)
    assert not [e for e in run.told if e[0] == "Warning"]


@pytest.mark.parametrize("event", ["deleted", "restarted", "silent"])
def test_whatever_happens_to_a_spare_ends_no_attempt(event: str) -> None:
    run = make_run().workers(2).spares(1).on_nodes(3).with_spec(training__iterations=1000).training()
    match event:
        case "deleted":
            run.cluster.delete_pod("a-w2-0")
        case "restarted":
            run.cluster.agent_restarts("a-w2-0")
        case "silent":
            run.cluster.pods["a-w2-0"].agent.vanish()
            run.cluster.pods["a-w2-0"].agent = None
    run.until_quiet(30)
    assert (run.status.state, run.status.attempt, run.status.restarts.total) == ("Running", 1, 0)
    assert run.status.workers.spares == 1
    assert run.pod(2).view.name == ("a-w2-0" if event == "restarted" else "a-w2-1")


def test_a_replacement_of_a_spare_leaves_the_group_s_size_to_those_that_stand() -> None:
    run = make_run().workers(2).spares(1).on_nodes(3).training()
    run.failed(run.pod(2).view.node)
    assert run.last is not None
    assert [a for a in run.last.actions if isinstance(a, EnsureGang)] == []
    assert {g.min_count for g in run.cluster.groups.values()} == {2}


def test_a_whole_gang_that_is_lost_with_its_spares_is_placed_again_as_a_gang() -> None:
    run = make_run().workers(2).spares(1).on_nodes(6).training()
    for node in {run.pod(i).view.node for i in range(3)}:
        run.node_dies(node)
    run.until(lambda s: s.state == "Running" and s.attempt > 1)
    assert run.status.placement == 2
    assert run.cluster.groups["a-p2"].min_count == 2


def test_survivors_are_told_to_hold_before_the_spare_s_successor_is_made() -> None:
    run = make_run().workers(2).spares(1).on_nodes(4).training()
    run.failed(run.pod(1).view.node)
    assert run.last is not None
    first = next(a for a in run.last.actions if not isinstance(a, EmitEvent))
    assert isinstance(first, WriteAssignment)


def test_a_run_with_spares_that_is_suspended_gives_them_back_too() -> None:
    run = make_run().workers(2).spares(1).training()
    run.suspended().until(lambda s: s.reason == reasons.SUSPENDED)
    assert run.pods == []
    run.suspended(False).training().until(lambda s: s.workers.spares == 1)
    assert run.at_work == [0, 1]


def test_spares_end_with_the_run() -> None:
    run = make_run().workers(2).spares(1).over().until_quiet(70)
    assert run.status.state == "Succeeded"
    assert {p.view.phase for p in run.cluster.pods.values()} == {"Succeeded"}
