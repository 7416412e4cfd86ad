"""What the status and the Events say of recoveries."""

from __future__ import annotations

import json

import pytest

from starcoder_operator.api.v1alpha1.goodput import Recovery
from starcoder_operator.domain import reasons
from starcoder_operator.domain.backoff import delay
from starcoder_operator.domain.recovery import KEPT, told
from starcoder_operator.domain.timestamps import milliseconds
from tests.support.scenarios import Scenario, make_run


def running() -> Scenario:
    return make_run().workers(2).on_nodes(3).with_spec(training__iterations=100_000).until(lambda s: s.iteration >= 25)


def recovered(run: Scenario) -> Scenario:
    return run.until(lambda s: bool(s.recoveries) and s.recoveries[-1].total is not None)


def crashed(run: Scenario, member: int = 1) -> Scenario:
    count = run.status.restarts.total
    return run.worker_fails(member).until(lambda s: s.restarts.total == count + 1)


def fails_to_form(run: Scenario) -> Scenario:
    run.until(lambda s: run.phase == "run" and run.pod(0).agent.running is not None)
    count = run.status.restarts.total
    return run.worker_fails(0, "FormationTimeout").until(lambda s: s.restarts.total == count + 1)


def test_a_lost_node_is_recorded_with_who_what_when_and_how_long() -> None:
    run = running()
    node = run.pod(1).view.node
    before = run.status.iteration
    recovered(run.failed(node))
    (record,) = run.status.recoveries
    assert (record.cause, record.node, record.pod, record.member) == ("NodeLost", node, "a-w1-0", 1)
    assert (record.from_attempt, record.to_attempt) == (1, 2)
    assert record.iteration >= before
    assert record.resumed_at == 20
    assert record.iterations_lost == record.iteration - 20
    stages = record.seconds.to_dict()
    assert set(stages) == {"detecting", "placing", "forming", "firstStep"} | ({"loading"} & set(stages))
    assert record.total == sum(stages.values())
    assert record.stage is None


@pytest.mark.parametrize(("lost", "said"), [(0, "0 iterations are"), (1, "1 iteration is"), (2, "2 iterations are")])
def test_the_event_says_how_many_iterations_are_done_again(lost: int, said: str) -> None:
    record = Recovery(
        cause="NodeLost", at="2026-01-01T00:00:00Z", from_attempt=1, to_attempt=2, iteration=20 + lost, resumed_at=20,
        iterations_lost=lost, total=7.5,
    )  # fmt: skip
    assert f", {said} done again" in told(record)


def test_the_stage_of_a_recovery_that_goes_on_is_shown() -> None:
    run = make_run().workers(2).on_nodes(2).until(lambda s: s.iteration >= 25)
    node = run.pod(1).view.node
    run.failed(node).until_quiet(3)
    assert run.status.recoveries[-1].stage == "placing"
    run.node_returns(node).until(lambda s: s.recoveries[-1].stage == "forming")
    run.until(lambda s: s.recoveries[-1].stage == "firstStep")
    assert run.status.state == "Running"
    recovered(run)


def test_where_nobody_has_to_come_nothing_is_placed() -> None:
    run = recovered(crashed(running()))
    assert run.status.recoveries[0].seconds.placing is None


def test_where_a_spare_stands_by_nothing_is_placed() -> None:
    run = make_run().workers(2).spares(1).on_nodes(4).training()
    (record,) = recovered(run.failed(run.pod(1).view.node)).status.recoveries
    assert (record.cause, record.seconds.placing) == ("NodeLost", None)


def test_an_attempt_that_fails_before_its_first_iteration_has_a_record_of_its_own() -> None:
    run = fails_to_form(crashed(running()))
    first, second = run.status.recoveries
    assert (first.cause, first.stage, first.total) == ("Crash", None, None)
    assert (second.cause, second.stage) == ("FormationTimeout", "forming")
    assert (second.from_attempt, second.to_attempt) == (2, 3)
    assert second.iterations_lost in (None, 0)
    recovered(run)
    assert run.status.recoveries[0].total is None
    assert run.status.recoveries[1].iterations_lost == 0


def test_a_held_attempt_that_has_to_be_held_anew_is_the_same_recovery() -> None:
    run = crashed(running().hindered("BucketNotFound"))
    run.cluster.agent_restarts(run.pod(0).view.name)
    recovered(run.until_quiet(5).mended())
    (record,) = run.status.recoveries
    assert record.to_attempt == run.status.attempt > 2


def test_a_cause_that_shows_later_replaces_the_one_of_the_record() -> None:
    run = running()
    node = run.pod(1).view.node
    run.worker_fails(0, "Peer").until(lambda s: s.restarts.total == 1)
    assert run.status.recoveries[-1].cause == "Peer"
    run.node_dies(node).passes()
    assert (run.status.recoveries[-1].cause, run.status.recoveries[-1].node) == ("NodeLost", node)
    assert len(run.status.recoveries) == 1


def test_a_lost_connection_is_detected_from_when_it_was_seen_first() -> None:
    run = running().worker_fails(0, "Peer").until(lambda s: s.restarts.total == 1)
    detecting = run.status.recoveries[-1].seconds.detecting
    assert detecting is not None
    assert 3 <= detecting <= 5


def test_the_last_ten_are_kept() -> None:
    run = make_run().workers(2).with_spec(failurePolicy__maxRestartsWithoutProgress=100, training__iterations=100_000)
    run.training()
    for _ in range(KEPT + 2):
        recovered(crashed(run))
    assert [r.from_attempt for r in run.status.recoveries] == list(range(3, KEPT + 3))
    assert len(json.dumps(run.status.to_dict())) < 8000, "the whole status is written every few seconds"


def test_a_suspension_ends_a_recovery_without_a_total() -> None:
    run = crashed(running()).suspended().passes()
    assert (run.status.recoveries[0].stage, run.status.recoveries[0].total) == (None, None)
    run.until(lambda s: s.state == "Suspended").suspended(False).training().round()
    assert run.status.recoveries[0].total is None
    assert ("Normal", reasons.RESUMED) in run.told


def test_a_run_that_is_given_up_recovers_from_nothing() -> None:
    run = running().worker_fails(0, "UserError").over()
    assert run.status.state == "Failed"
    assert run.status.recoveries == ()
    assert run.goodput.bucket is None


def test_the_fault_is_put_before_the_time_that_it_took_to_notice() -> None:
    run = running().worker_fails(0, "Peer").until(lambda s: s.restarts.total == 1)
    record, noticed = run.status.recoveries[-1], milliseconds(run.goodput.as_of)
    assert record.seconds.detecting is not None
    assert milliseconds(record.at) == noticed - round(1000 * record.seconds.detecting)


def test_a_recovery_is_told_when_iterations_pass_again() -> None:
    run = running()
    node = run.pod(1).view.node
    run.failed(node).until(lambda s: s.state == "Running")
    assert ("Normal", reasons.RECOVERED) not in run.told, "it trains, and no iteration is done"
    recovered(run)
    (event,) = [e for e in run.cluster.events if e.reason == reasons.RECOVERED]
    assert event.message.startswith("attempt 2 trains again ")
    assert f"after NodeLost of node {node}: detecting 5.8 s, placing " in event.message
    assert "it went on from iteration 20, " in event.message
    run.until_quiet(5)
    assert run.told.count(("Normal", reasons.RECOVERED)) == 1


def test_what_hinders_an_attempt_from_beginning_is_no_time_of_forming() -> None:
    run = crashed(running().hindered("StorageUnreachable")).until_quiet(20)
    assert run.status.recoveries[-1].stage == "placing"
    (record,) = recovered(run.mended()).status.recoveries
    assert record.seconds.placing is not None
    assert record.seconds.placing >= 20
    assert record.seconds.forming is not None
    assert record.seconds.forming <= 5


def test_a_wait_between_repeated_failures_is_no_time_of_forming() -> None:
    run = fails_to_form(fails_to_form(crashed(running())))
    wait = delay(run.cluster.spec.failure_policy.backoff, run.cluster.uid, run.status)
    assert wait > 0
    assert run.status.recoveries[-1].stage == "placing"
    placing = recovered(run).status.recoveries[-1].seconds.placing
    assert placing is not None
    assert wait - 1 <= placing <= wait + 2


def test_a_pod_that_was_evicted_costs_no_iteration() -> None:
    run = recovered(running().evicted(1))
    (record,) = run.status.recoveries
    assert (record.cause, record.iterations_lost) == ("Disrupted", 0)
    assert run.seconds.get("retraining", 0.0) == 0
