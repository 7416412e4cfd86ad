"""Where the time of a run went: every second in one bucket, whoever looked and whoever was away."""

from __future__ import annotations

from dataclasses import replace

import pytest

from starcoder_operator.api.v1alpha1 import StarCoderRunStatus
from starcoder_operator.domain.goodput import without_time
from starcoder_operator.domain.hearing import USUAL
from starcoder_operator.domain.snapshot import NodeView
from starcoder_operator.domain.timestamps import milliseconds
from tests.support.scenarios import Scenario, make_run

MINUTE, HOUR = 60, 3600


def long_run() -> Scenario:
    return make_run().workers(2).on_nodes(3).with_spec(training__iterations=100_000)


def more(run: Scenario, before: dict[str, float]) -> dict[str, float]:
    """Seconds by bucket that came since."""
    return {k: s - before.get(k, 0.0) for k, s in run.seconds.items() if s != before.get(k, 0.0)}


def span(run: Scenario) -> float:
    """Seconds that the account goes over."""
    return (milliseconds(run.goodput.as_of) - milliseconds(run.goodput.since)) / 1000


def test_a_run_that_is_over_has_every_second_of_its_life_in_a_bucket() -> None:
    run = make_run().workers(2).on_nodes(3).training()
    run.failed(run.pod(1).view.node).over()
    assert run.status.completed_at is not None
    assert milliseconds(run.goodput.since) == milliseconds(run.snapshot.created_at)
    assert milliseconds(run.goodput.as_of) == milliseconds(run.status.completed_at)
    assert sum(run.seconds.values()) == pytest.approx(span(run))
    assert run.goodput.bucket is None
    account = run.goodput
    run.waits(HOUR).until_quiet(5)
    assert run.goodput == account, "what comes after the end is no part of its life"


def test_a_run_without_room_is_queued() -> None:
    run = make_run().workers(2).on_nodes(1).round().waits(10 * MINUTE).round()
    assert run.goodput.bucket == "queued"
    run.cluster.nodes["late"] = NodeView("late", True, False, ())
    run.round().training()
    assert run.seconds["queued"] == pytest.approx(10 * MINUTE, abs=5)


def test_pods_that_have_nodes_and_pull_their_images_are_starting() -> None:
    run = make_run().workers(2)
    run.cluster.pullable = set()
    run.until(lambda s: s.goodput is not None and s.goodput.bucket == "starting").waits(2 * MINUTE).round()
    run.cluster.pullable = None
    run.training()
    assert run.seconds["starting"] == pytest.approx(2 * MINUTE, abs=3)


def test_forming_and_loading_are_told_apart_by_the_leaders_report() -> None:
    run = make_run().workers(2)
    run.cluster.world.loading = 0.75
    run.training()
    assert run.seconds["loading"] == 0.75


def test_seconds_of_iterations_are_divided_as_the_leader_says() -> None:
    run = make_run().workers(2).training()
    run.cluster.world.data_wait, run.cluster.world.checkpoint_stall = 0.25, 0.125
    before = run.until(lambda s: s.iteration >= 10).seconds
    run.until(lambda s: s.iteration >= 50)
    assert more(run, before) == {"dataWait": 2.0, "checkpointStall": 1.0, "training": 5.0}


def test_iterations_that_were_lost_are_trained_again_until_the_highest_is_reached() -> None:
    run = make_run().workers(2).until(lambda s: s.iteration >= 28)
    run.worker_fails(1).until(lambda s: s.restarts.total == 1).training()
    (recovery,) = run.status.recoveries
    assert recovery.resumed_at is not None
    lost = recovery.iteration - recovery.resumed_at
    assert recovery.iterations_lost == lost > 0
    assert run.goodput.bucket == "retraining"
    run.until(lambda s: s.iteration >= 60)
    assert run.seconds["retraining"] == pytest.approx(lost / 5)
    assert run.seconds["training"] == pytest.approx(60 / 5, abs=1)
    assert (run.goodput.bucket, run.goodput.reached) == ("training", 60)


def test_until_a_dead_node_is_noticed_nothing_trains() -> None:
    run = long_run().until(lambda s: s.iteration >= 50)
    before = run.seconds
    node = run.pod(1).view.node
    run.node_dies(node, noticed=False).round().round().node_dies(node).passes()
    (recovery,) = run.status.recoveries
    assert recovery.cause == "NodeLost"
    assert recovery.seconds.detecting == pytest.approx(2 + USUAL.heard, abs=1)
    assert more(run, before)["detecting"] == recovery.seconds.detecting
    assert more(run, before).get("training", 0.0) <= 2


def test_what_trained_while_the_operator_was_away_trained() -> None:
    run = long_run().training().round()
    before = run.seconds
    run.operator_away(10 * MINUTE).passes()
    assert more(run, before) == {"training": pytest.approx(10 * MINUTE, abs=2)}


def test_what_failed_while_the_operator_was_away_failed_when_the_reports_end() -> None:
    run = long_run().training().round().operator_away(5 * MINUTE)
    before = run.seconds
    run.worker_fails(1).operator_away(5 * MINUTE).passes()
    assert run.status.restarts.by_cause == {"Crash": 1}
    assert more(run, before) == {
        "training": pytest.approx(5 * MINUTE, abs=3),
        "detecting": pytest.approx(5 * MINUTE, abs=3),
    }


def test_what_formed_and_trained_while_the_operator_was_away_is_as_the_reports_say() -> None:
    run = long_run()
    run.until(lambda s: s.goodput is not None and s.goodput.bucket == "forming")
    run.until(lambda s: run.phase == "run")
    before = run.seconds
    run.operator_away(10 * MINUTE).passes()
    assert more(run, before) == {
        "forming": pytest.approx(2, abs=2),
        "training": pytest.approx(10 * MINUTE, abs=3),
    }


def test_an_operator_that_dies_in_a_recovery_leaves_its_time_to_the_next() -> None:
    run = make_run().workers(2).on_nodes(2).training().round()
    node = run.pod(1).view.node
    run.failed(node).round()
    run.operator_away(10 * MINUTE)
    run.node_returns(node).training()
    (recovery,) = run.status.recoveries
    assert recovery.seconds.placing == pytest.approx(10 * MINUTE, abs=3)
    run.round()
    (recovery,) = run.status.recoveries
    assert recovery.total == pytest.approx(sum(recovery.seconds.to_dict().values()))


def test_hours_of_suspension_are_no_hours_of_the_ratio() -> None:
    run = make_run().workers(2).until(lambda s: s.iteration >= 30)
    before = run.goodput
    run.suspended().until(lambda s: s.state == "Suspended").waits(3 * HOUR)
    run.suspended(False).passes()
    assert run.seconds["suspended"] == pytest.approx(3 * HOUR, abs=5)
    assert run.goodput.ratio == pytest.approx(before.ratio, abs=0.15)
    run.over()
    assert sum(run.seconds.values()) == pytest.approx(span(run))


def test_of_each_training_second_the_share_of_the_missing_copies_is_degraded() -> None:
    run = make_run().workers(3).at_least(2, patience="30s").with_spec(training__iterations=100_000).training()
    run.failed(run.pod(2).view.node).until(lambda s: s.state == "Running" and s.goodput.bucket == "training")
    (record,) = run.status.recoveries
    assert record.seconds.placing == pytest.approx(30, abs=5), "it waited for room as long as it was told to"
    before = run.seconds
    run.until_quiet(9)
    assert more(run, before) == {"training": pytest.approx(6, abs=0.5), "degraded": pytest.approx(3, abs=0.5)}


def test_a_clock_that_went_back_adds_nothing_and_loses_nothing() -> None:
    run = long_run().training().until_quiet(5)
    account, now = run.goodput, run.cluster.world.now
    early = replace(run.snapshot, instant="2026-01-01T00:00:01.000Z")
    from starcoder_operator.domain.planner import plan

    held = plan(early).status.goodput
    assert held is not None
    assert (held.as_of, held.buckets, held.reported) == (account.as_of, account.buckets, account.reported)
    run.until_quiet(5)
    assert run.seconds["training"] == pytest.approx(10, abs=1)
    assert run.cluster.world.now > now


def test_the_iteration_that_was_under_way_at_the_fault_was_training() -> None:
    """One takes a minute here: what nobody reported is the iteration up to the fault, then the time to notice it."""
    run = long_run().with_spec(training__logEveryIterations=5).training()
    for _ in range(20):
        run.round(MINUTE).passes()
    before = run.seconds
    run.waits(40 - MINUTE)
    for lease in run.cluster.leases.values():
        lease.renewed = run.cluster.world.now
    node = run.pod(1).view.node
    run.cluster.node_dies(node)
    run.cluster.leases[0].renewed = run.cluster.world.now = run.cluster.world.now + 8
    run.cluster.node_is_unknown(node)
    run.passes()
    assert run.status.restarts.by_cause == {"NodeLost": 1}
    assert more(run, before) == {"training": pytest.approx(40, abs=1.5), "detecting": pytest.approx(8, abs=1.5)}


def test_a_trainer_that_does_not_say_is_believed_to_train() -> None:
    run = long_run().training().round()
    before = run.seconds
    for _ in range(5):
        run.cluster.settle_cluster()
        lease = run.cluster.leases[0]
        assert lease.report is not None
        assert lease.report.progress is not None
        lease.report = replace(lease.report, progress=replace(lease.report.progress, spent=None))
        run.passes()
        run.cluster.world.now += 1
    assert more(run, before)["training"] == pytest.approx(5, abs=1)


def test_an_account_that_was_lost_begins_anew_and_invents_nothing() -> None:
    run = long_run().training().waits(HOUR)
    run.cluster.status = StarCoderRunStatus()
    run.passes()
    assert run.seconds == {}
    assert milliseconds(run.goodput.since) == milliseconds(run.snapshot.instant)


def test_time_alone_is_no_news_and_a_change_of_what_the_run_is_at_is() -> None:
    run = make_run().workers(2).on_nodes(1).round().round()
    first = run.status
    run.waits(HOUR).passes()
    assert run.status != first
    assert without_time(run.status) == without_time(first)
    run.cluster.nodes["late"] = NodeView("late", True, False, ())
    at_once = run.round().round().status
    assert without_time(at_once) != without_time(first)


def test_a_suspect_was_silent_for_as_many_beats_as_make_it_one() -> None:
    """Iterations take a minute here; the relay's agent said in its last renewal but one that it heard them all."""
    run = long_run().with_spec(training__logEveryIterations=5).training()
    for _ in range(20):
        run.round(MINUTE).passes()
    before = run.seconds
    run.waits(-MINUTE).beats(40)
    node = run.pod(1).view.node
    run.node_dies(node, noticed=False)
    for _ in range(10):
        if run.status.restarts.total:
            break
        run.beats(1).passes()
    assert run.status.restarts.by_cause == {"AgentUnresponsive": 1}
    detecting = run.status.recoveries[-1].seconds.detecting
    assert detecting is not None
    assert USUAL.suspected <= detecting <= USUAL.suspected + 2
    assert more(run, before)["training"] == pytest.approx(40, abs=2)


def test_a_suspended_run_trains_nothing_again() -> None:
    run = make_run().workers(2).until(lambda s: s.iteration % 10 == 5)
    before = run.suspended().until(lambda s: s.state == "Suspended").seconds
    run.waits(HOUR).suspended(False).until(lambda s: s.iteration >= 60)
    assert more(run, before)["suspended"] == pytest.approx(HOUR, abs=2)
    assert "retraining" not in run.seconds


def test_what_a_leaving_gang_waited_for_its_checkpoint_stalled() -> None:
    run = make_run().workers(2).until(lambda s: s.iteration % 10 == 5)
    run.holds_up(1, "upload").suspended()
    before = run.until_quiet(5).seconds
    run.waits(4 * MINUTE).passes().waits(MINUTE).passes()
    assert run.phase == "stop"
    assert more(run, before) == {"checkpointStall": pytest.approx(5 * MINUTE, abs=10)}


def test_a_first_iteration_that_takes_long_is_no_time_of_forming() -> None:
    run = long_run()
    while run.passes().status.state != "Running":
        run.cluster.settle_cluster()
        run.cluster.world.now += 1
    before = run.seconds
    run.waits(10 * MINUTE).passes().waits(MINUTE).round().passes()
    assert more(run, before) == {"training": pytest.approx(11 * MINUTE, abs=2)}
