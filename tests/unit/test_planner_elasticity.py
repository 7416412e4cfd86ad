"""Spares take lost members' places; without them a run shrinks and grows again; a changed spec is taken as planned."""

from __future__ import annotations

from typing import Any

import pytest

from starcoder_operator.domain import reasons
from starcoder_operator.domain.plan import EmitEvent, EnsureGang, EnsureLeases, WriteAssignment
from starcoder_operator.domain.sizing import STARTING
from starcoder_operator.domain.timestamps import seconds_between
from starcoder_trainer.agent.machine import NOT_READY_SECONDS
from starcoder_trainer.agent.messages import Ticked, WorkersReady
from tests.support.scenarios import Scenario, make_run


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


def fork_server_hangs(run: Scenario, member: int) -> Scenario:
    """It has not answered for longer than preloading takes."""
    machine = run.pod(member).agent.machine
    machine._ready, machine._waiting_since = False, run.cluster.world.now - NOT_READY_SECONDS
    machine.handle(Ticked(run.cluster.world.now))
    return run


@pytest.mark.parametrize("member", [0, 1])
def test_a_member_whose_workers_can_t_start_gives_its_place_to_one_that_stands_by(member: int) -> None:
    run = make_run().workers(2).spares(1).on_nodes(3).with_spec(training__iterations=10**6).training()
    fork_server_hangs(run.worker_fails(member), member)
    run.until(lambda s: s.restarts.total == 1).training()
    assert run.at_work == [2 if i == member else i for i in range(2)]
    assert run.status.restarts.total == 1


def test_members_whose_workers_can_t_start_keep_their_places_where_nobody_stands_by() -> None:
    run = make_run().workers(2).training()
    fork_server_hangs(run.worker_fails(1), 1).until_quiet(20)
    attempt = run.status.attempt
    assert run.said("Training") == ("False", "WorkerNotReady")
    run.pod(1).agent.tell(WorkersReady(run.cluster.world.now))
    assert run.training().status.attempt == attempt


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


# Shrink


def shrunk(replicas: int = 3, least: int = 1, **more: Any) -> Scenario:
    """One node of as many as there are members is lost and stays away; the run trains on without it."""
    run = make_run().workers(replicas).at_least(least, **more).with_spec(training__iterations=10000).training()
    return run.failed(run.pod(replicas - 1).view.node).until(lambda s: s.state == "Running" and s.attempt > 1)


def test_lost_members_are_waited_for_and_then_the_run_goes_on_without_them() -> None:
    run = make_run().workers(3).at_least(2, patience="30s").with_spec(training__iterations=10000).training()
    run.failed(run.pod(1).view.node)
    began = run.cluster.world.now
    assert run.status.waiting_since is not None
    assert "the run goes on with 2 at" in run.condition("Training").message
    run.training()
    assert 30 <= run.cluster.world.now - began < 40
    assert run.at_work == [0, 2]
    assert run.status.layout is not None
    assert run.status.layout.data == 2
    assert (run.status.attempt, run.status.restarts.by_cause, run.status.waiting_since) == (2, {"NodeLost": 1}, None)


def test_a_shrunk_run_says_with_how_much_it_trains_and_when_it_may_grow() -> None:
    run = shrunk(4, 2)
    assert run.said("Degraded") == ("True", reasons.SHRUNK)
    message = run.condition("Degraded").message
    assert "trains with 3 of 4 Pods, DP3 of DP4: 6 of 8 GPUs (75%) on the same global batch" in message
    assert "not before " in message
    assert (run.status.state, run.status.reason) == ("Running", reasons.SHRUNK)
    workers = run.status.workers
    assert (workers.ready, workers.desired, workers.training) == (3, 4, 3)
    assert run.told.count(("Warning", reasons.SHRUNK)) == 1
    assert run.said("Scheduled") == ("False", reasons.UNSCHEDULABLE), "why the fourth is missing"
    writes = run.cluster.status_writes
    run.until(lambda s: s.iteration > 500)
    assert run.status.tokens_per_second_per_gpu == round(1000 / 6)
    assert run.cluster.status_writes - writes < 200


def test_a_run_that_is_not_told_how_far_never_shrinks() -> None:
    run = make_run().workers(2).on_nodes(2).training()
    run.failed(run.pod(1).view.node).until_quiet(400)
    assert (run.status.state, run.at_work) == ("Recovering", [0, 1])
    assert run.status.waiting_since is None


def test_members_that_return_in_time_leave_the_run_whole() -> None:
    run = make_run().workers(3).at_least(1).training()
    node = run.pod(1).view.node
    run.failed(node).until_quiet(20).node_returns(node).training()
    assert run.at_work == [0, 1, 2]
    assert run.said("Degraded") == ("False", reasons.WHOLE)
    assert run.status.waiting_since is None


def test_below_the_least_it_waits_says_so_and_goes_on_after_patience_when_there_are_enough_again() -> None:
    run = make_run().workers(4).at_least(2, patience="30s").with_spec(training__iterations=10000).training()
    nodes = [run.pod(i).view.node for i in range(1, 4)]
    for node in nodes:
        run.node_dies(node)
    run.until_quiet(100)
    assert run.status.state == "Recovering"
    assert "1 answer, and elasticity.minReplicas is 2" in run.condition("Training").message
    assert run.said("Scheduled") == ("False", reasons.UNSCHEDULABLE)
    assert "too few nvidia.com/gpu" in run.condition("Scheduled").message
    run.node_returns(nodes[0]).until_quiet(10)
    assert run.status.state == "Recovering", "others may come in a moment"
    run.node_returns(nodes[1]).training()
    assert len(run.at_work) == 3


def test_whole_copies_of_the_model_are_lost_and_who_is_left_over_stands_by() -> None:
    """TP2 x PP2 on Pods of two GPUs: two Pods hold a copy."""
    run = (
        make_run().workers(6).at_least(2).with_spec(parallelism__pipeline=2, training__iterations=10000)
        .on_nodes(6).training()
    )  # fmt: skip
    assert run.status.layout is not None
    assert run.status.layout.summary == "TP2 x PP2 x DP3"
    run.failed(run.pod(0).view.node).training()
    assert run.status.layout.summary == "TP2 x PP2 x DP2"
    assert run.at_work == [1, 2, 3, 4]
    assert run.pod(5).agent.report.state == "idle"
    assert (run.status.workers.ready, run.status.workers.training) == (5, 4)
    run.failed(run.pod(2).view.node).training()
    assert run.at_work == [1, 5, 3, 4], "who stood by takes the place"


def test_a_shrunk_run_that_fails_goes_on_as_it_was_at_once() -> None:
    run = shrunk(3, 1)
    run.worker_fails(0)
    began = run.cluster.world.now
    run.until(lambda s: s.restarts.total == 2).training()
    assert run.cluster.world.now - began < 15
    assert run.at_work == [0, 1]


def test_a_shrunk_run_that_fails_takes_all_that_are_there_again() -> None:
    run = shrunk(3, 1)
    run.node_returns("node-2").until(lambda s: s.workers.ready == 3)
    assert run.at_work == [0, 1], "growth waits for its interval"
    run.worker_fails(0).until(lambda s: s.restarts.total == 2).training()
    assert run.at_work == [0, 1, 2]
    assert run.said("Degraded") == ("False", reasons.WHOLE)


def test_a_gang_that_may_be_smaller_is_placed_with_what_there_is_room_for() -> None:
    run = make_run().workers(4).at_least(2, patience="30s").on_nodes(3).passes()
    assert run.last is not None
    assert EnsureGang("a-p1", 2) in run.last.actions
    run.training()
    assert len(run.at_work) == 3
    assert run.cluster.world.now >= 30
    assert ("Warning", reasons.SHRUNK) in run.told


def pulling(**elasticity: Any) -> Scenario:
    """Member 0 answers, member 1's Pod has a node and no image yet."""
    run = make_run().workers(2).at_least(1, **elasticity).passes()
    run.cluster.pods["a-w1-0"].image = "big"
    return run


def test_pods_that_have_a_node_and_pull_their_image_are_waited_for_longer() -> None:
    run = pulling(patience="5s")
    run.cluster.slow = {"big"}
    run.until_quiet(100)
    assert run.status.state == "Starting"
    run.cluster.slow = set()
    run.training()
    assert run.at_work == [0, 1]


def test_pods_that_pull_for_too_long_or_can_t_are_not_waited_for() -> None:
    run = pulling(patience="5s")
    run.cluster.slow = {"big"}
    run.training()
    assert run.at_work == [0]
    assert run.cluster.world.now >= STARTING
    run = pulling(patience="5s")
    run.cluster.pullable = {""}
    run.training()
    assert run.at_work == [0]
    assert run.cluster.world.now < 20


def test_a_least_that_is_raised_above_what_trains_ends_nothing_and_is_told() -> None:
    run = shrunk(3, 1)
    attempt = run.status.attempt
    run.cluster.change_spec(elasticity=run.cluster.spec.elasticity.model_copy(update={"min_replicas": 3}))
    run.until_quiet(10)
    assert (run.status.state, run.status.attempt) == ("Running", attempt)
    assert "elasticity.minReplicas 3 was asked for since, and holds from the next attempt on" in run.status.message
    run.worker_fails(0, "Crash").until_quiet(30)
    assert run.status.state == "Recovering", "two of three would train"


# Grow


def test_it_grows_when_there_is_room_and_not_before_the_interval_and_no_iteration_is_lost() -> None:
    run = shrunk(3, 1, growBack={"interval": "2m"})
    began = run.status.resized_at
    assert began is not None
    run.node_returns("node-2").until(lambda s: s.draining is not None)
    assert seconds_between(began, run.snapshot.now) >= 120
    assert run.status.attempt == 2
    assert "grows from 2 to 3 of 3 Pods" in run.condition("Training").message
    run.until(lambda s: s.attempt == 3)
    assert run.status.state == "Starting"
    assert run.status.checkpoint is not None
    assert run.status.checkpoint.iteration == run.status.iteration == run.cluster.world.store.entries[-1].step
    at = run.status.iteration
    run.training()
    assert run.at_work == [0, 1, 2]
    assert at <= run.status.iteration <= at + 10
    assert (run.status.restarts.total, run.status.attempt) == (1, 3), "nothing has failed"
    assert run.said("Degraded") == ("False", reasons.WHOLE)
    assert ("Normal", reasons.RESIZED) in run.told


def test_a_gang_that_does_not_leave_in_time_to_grow_is_ended_and_says_what_that_cost() -> None:
    run = shrunk(3, 1, growBack={"interval": "2m"}).holds_up(0, "upload")
    run.node_returns("node-2").until(lambda s: s.draining is not None).until(lambda s: s.attempt == 3)
    assert ("Warning", reasons.GRACE_EXCEEDED) in run.told
    assert run.status.restarts.total == 1, "nothing has failed"
    run.training()
    assert run.at_work == [0, 1, 2]


def test_it_grows_by_what_there_is_and_waits_the_interval_for_the_rest() -> None:
    run = (
        make_run().workers(4).at_least(2, growBack={"interval": "1m"}).with_spec(training__iterations=10**6).training()
    )
    assert run.cluster.budget == 3
    nodes = [run.pod(i).view.node for i in (2, 3)]
    for node in nodes:
        run.node_dies(node)
    run.until(lambda s: s.state == "Running" and s.workers.training == 2)
    assert run.until_quiet(2).cluster.budget == 1, "a budget that fewer Pods can't meet lets none go"
    run.node_returns(nodes[0]).until(lambda s: s.workers.training == 3)
    began = run.cluster.world.now
    run.node_returns(nodes[1]).until(lambda s: s.workers.training == 4)
    assert run.cluster.world.now - began >= 59
    assert run.until_quiet(2).cluster.budget == 3


def test_growth_waits_for_pods_that_have_a_node_and_will_answer_soon() -> None:
    run = (
        make_run().workers(4).at_least(2, growBack={"interval": "0s"}).with_spec(training__iterations=10**6).training()
    )
    nodes = [run.pod(i).view.node for i in (2, 3)]
    for node in nodes:
        run.node_dies(node)
    run.until(lambda s: s.state == "Running" and s.workers.training == 2)
    attempt = run.status.attempt
    run.cluster.slow = {""}
    for node in nodes:
        run.node_returns(node)
    run.until_quiet(5)
    assert run.pod(2).view.node
    assert run.pod(3).view.node
    run.pod(2).image = "there already"
    run.until(lambda s: s.workers.ready == 3).until_quiet(30)
    assert run.status.attempt == attempt
    run.cluster.slow = set()
    run.until(lambda s: s.workers.training == 4)
    assert run.status.attempt == attempt + 1


# A changed spec


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3), (1, 4)])
def test_another_number_of_replicas_is_taken_with_a_checkpoint(before: int, after: int) -> None:
    run = make_run().workers(before).on_nodes(4).with_spec(training__globalBatchSize=96, training__iterations=10**6)
    run.training()
    run.cluster.change_spec(workers=run.cluster.spec.workers.model_copy(update={"replicas": after}))
    run.until(lambda s: s.workers.training == after).training()
    assert run.at_work == list(range(after))
    assert (run.status.attempt, run.status.restarts.total) == (2, 0)
    assert run.said("Degraded") == ("False", reasons.WHOLE)
    run.until_quiet(5)
    assert len(run.pods) == after, "Pods beyond are given back"


def test_names_of_members_that_were_given_up_are_never_used_again() -> None:
    run = make_run().workers(2).on_nodes(3).with_spec(training__iterations=10**6).training()
    for replicas in (1, 2):
        run.cluster.change_spec(workers=run.cluster.spec.workers.model_copy(update={"replicas": replicas}))
        run.until(lambda s, n=replicas: s.workers.training == n)  # type: ignore[misc]
        run.until_quiet(3)
        assert len(run.status.incarnations) == 2
    assert run.pods == ["a-w0-0", "a-w1-1"]


def test_another_layout_is_taken_with_a_checkpoint() -> None:
    run = make_run().workers(2).with_spec(training__iterations=10**6).training()
    parallelism = run.cluster.spec.parallelism.model_copy(update={"tensor": 1, "pipeline": 2})
    run.cluster.change_spec(parallelism=parallelism)
    run.until(lambda s: s.attempt == 2)
    assert run.status.checkpoint is not None
    assert run.status.checkpoint.iteration == run.status.iteration
    run.training()
    assert run.status.layout is not None
    assert run.status.layout.summary == "TP1 x PP2 x DP2"
    assert (run.status.restarts.total, run.pods) == (0, ["a-w0-0", "a-w1-0"])


def test_spares_that_are_asked_for_later_come_and_go_without_a_restart() -> None:
    run = make_run().workers(2).on_nodes(3).with_spec(training__iterations=10**6).training()
    for spares in (1, 0):
        run.cluster.change_spec(elasticity=run.cluster.spec.elasticity.model_copy(update={"spares": spares}))
        run.until(lambda s, n=spares: s.workers.spares == n).until_quiet(3)  # type: ignore[misc]
        assert len(run.pods) == 2 + spares
    assert (run.status.attempt, run.status.restarts.total) == (1, 0)


def test_a_spare_that_trains_gives_way_where_spares_are_no_more_asked_for() -> None:
    run = make_run().workers(2).spares(1).on_nodes(4).with_spec(training__iterations=10**6).training()
    run.failed(run.pod(1).view.node).training().until(lambda s: s.workers.spares == 1)
    assert run.at_work == [0, 2]
    run.cluster.change_spec(elasticity=run.cluster.spec.elasticity.model_copy(update={"spares": 0}))
    run.until(lambda s: s.attempt == 3).training()
    assert run.at_work == [0, 1]
    run.until_quiet(5)
    assert [p for p in run.pods if p.startswith("a-w2")] == []


def test_a_leader_that_a_smaller_run_has_no_place_for_ends_the_attempt_that_forms() -> None:
    run = make_run().workers(2).spares(1).hindered("BucketNotFound").until_quiet(3)
    run.node_dies(run.pod(0).view.node).until_quiet(3)
    held = run.cluster.assignment.assignment
    assert (held.phase, held.attempt, held.leader.index) == ("hold", 2, 2)
    spec = run.cluster.spec
    run.cluster.change_spec(workers=spec.workers.model_copy(update={"replicas": 1}))
    run.passes()
    held = run.cluster.assignment.assignment
    assert (held.attempt, held.leader.index, len(held.members)) == (3, 1, 1)
    assert "has no place for the leader, Pod a-w2-0" in run.condition("Training").message
    run.mended().training()
