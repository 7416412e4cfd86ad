"""What the status and the Events say, and when the planner wants to look again."""

from __future__ import annotations

from starcoder_operator.api.v1alpha1 import StarCoderRunStatus
from starcoder_operator.domain import reasons
from starcoder_operator.domain.conditions import Claim, merged
from starcoder_operator.domain.looks import WATCH_PROGRESS
from starcoder_operator.domain.timestamps import seconds_between
from starcoder_trainer.agent import messages as m
from starcoder_trainer.contract.report import Problem
from tests.support.scenarios import make_run


def test_figures_are_the_leaders_while_it_trains() -> None:
    run = make_run().workers(2).until(lambda s: s.iteration >= 20)
    status = run.status
    assert status.progress == f"{status.iteration}%"
    assert status.loss == "2.5000"
    assert (status.tokens_per_second, status.tokens_per_second_per_gpu) == (1000, 250)
    assert status.layout is not None
    assert status.layout.summary == "TP2 x PP1 x DP2"
    assert status.workers.summary == "2/2"
    left = (100 - status.iteration) * 16 * 256 / 1000
    assert status.eta is not None
    assert abs(seconds_between(run.snapshot.now, status.eta) - left) <= 2


def test_a_rate_of_before_is_not_shown_while_nothing_trains_and_what_was_reached_is() -> None:
    run = make_run().workers(2).until(lambda s: s.iteration >= 15)
    reached = run.status.iteration
    run.worker_fails(0).passes()
    assert (run.status.tokens_per_second, run.status.eta) == (None, None)
    assert run.status.iteration == reached


def test_how_an_attempt_ended_is_told_once_and_first_and_then_what_is_waited_for() -> None:
    run = make_run().workers(2).training().worker_fails(0, "Crash", "ValueError: boom")
    run.until(lambda s: s.restarts.total > 0)
    how = "attempt ended by Crash (rank 0: ValueError: boom)"
    assert run.status.message == how
    run.passes()
    assert run.status.state == "Recovering"
    assert run.status.message.startswith(f"{how}; ")
    assert run.status.message.count("boom") == 1


def test_a_spec_that_becomes_invalid_stops_no_iteration_and_says_what_goes_on() -> None:
    run = make_run().workers(2).with_spec(parallelism={"pipeline": 2, "tensor": 2})
    run.until(lambda s: run.cluster.assignment is not None and run.cluster.assignment.assignment.phase == "run")
    assert run.said("Training") == ("False", reasons.FORMING)
    workers = run.cluster.spec.workers
    run.cluster.change_spec(workers=workers.model_copy(update={"replicas": 1}))
    run.until(lambda s: s.iteration >= 15)
    assert run.said("Accepted") == ("False", reasons.INVALID_SPEC)
    assert run.said("Training") == ("True", reasons.TRAINING)
    assert (run.status.state, run.status.reason, run.status.attempt) == ("Running", reasons.INVALID_SPEC, 1)
    assert run.status.tokens_per_second == 1000
    run.worker_fails(0).until_quiet(3)
    assert run.said("Training") == ("False", reasons.INVALID_SPEC)
    assert (run.status.state, run.status.tokens_per_second, run.status.attempt) == ("Pending", None, 1)
    run.cluster.change_spec(workers=workers)
    run.training()
    assert run.status.attempt == 2
    assert run.said("Training") == ("True", reasons.TRAINING)


def test_the_newest_verified_checkpoint_is_shown_and_told() -> None:
    run = make_run().workers(2).until(lambda s: s.checkpoint is not None)
    assert run.status.checkpoint is not None
    assert run.status.checkpoint.iteration == 10
    assert ("Normal", reasons.NEW_CHECKPOINT) in run.told
    assert run.said("CheckpointVerified") == ("True", reasons.VERIFIED)


def test_trouble_with_uploads_shows_while_iterations_pass_and_ends_by_itself() -> None:
    run = make_run().workers(2).training()
    agent = run.pod(0).agent
    agent.tell(m.StorageTrouble(0.0, Problem("StorageUnreachable", "no answer")))
    run.round().passes()
    assert run.said("Training") == ("True", reasons.TRAINING)
    assert run.said("CheckpointVerified") == ("False", "StorageUnreachable")
    assert (run.status.state, run.status.reason) == ("Running", "StorageUnreachable")
    assert ("Warning", "StorageUnreachable") in run.told
    agent.tell(m.StorageTrouble(0.0, None))
    run.round().round().passes()
    assert run.status.reason == reasons.TRAINING


def test_a_condition_keeps_its_time_until_its_status_changes() -> None:
    first = merged((), [Claim("Training", "False", "Forming", "a")], now="2026-01-01T00:00:00Z", generation=1)
    second = merged(first, [Claim("Training", "False", "PeerLost", "b")], now="2026-01-01T00:00:09Z", generation=2)
    third = merged(second, [Claim("Training", "True", "Training", "c")], now="2026-01-01T00:00:10Z", generation=2)
    assert [c[0].last_transition_time[-3:] for c in (first, second, third)] == ["00Z", "00Z", "10Z"]
    assert second[0].observed_generation == 2


def test_a_life_is_told_in_events_once_each() -> None:
    run = make_run().workers(2).on_nodes(3).training()
    run.failed(run.pod(1).view.node).over()
    told = [reason for _, reason in run.told if reason != reasons.NEW_CHECKPOINT]
    assert told == [
        reasons.ALL_PODS_SCHEDULED, reasons.TRAINING, "NodeLost", reasons.ALL_PODS_SCHEDULED, reasons.RECOVERED,
        reasons.SUCCEEDED,
    ]  # fmt: skip
    assert [kind for kind, reason in run.told if reason == "NodeLost"] == ["Warning"]


def test_a_run_that_recovers_says_what_from() -> None:
    run = make_run().workers(2).on_nodes(2).training()
    run.failed(run.pod(1).view.node).passes()
    assert run.status.state == "Recovering"
    assert "NodeLost" in run.status.message
    assert run.status.last_failure is not None
    assert run.status.last_failure.node == "node-1"


def test_progress_is_looked_at_while_it_trains_and_nothing_when_all_is_over() -> None:
    run = make_run().workers(2).training()
    assert run.last is not None
    assert run.last.look_again is not None
    assert run.last.look_again <= WATCH_PROGRESS
    run.over().until_quiet(70)
    assert run.last.look_again is None
    writes = run.cluster.status_writes
    run.until_quiet(5)
    assert run.cluster.status_writes == writes, "a run that is over is written no more"


def test_a_gang_that_waits_for_room_is_not_looked_at_for_nothing() -> None:
    run = make_run().workers(3).on_nodes(2).until_quiet(5)
    assert run.last is not None
    assert run.last.look_again is None


def test_a_status_that_was_lost_costs_no_name_and_no_attempt_is_used_twice() -> None:
    run = make_run().workers(2).on_nodes(3).training()
    run.failed(run.pod(1).view.node).training()
    run.cluster.status = StarCoderRunStatus()
    run.passes()
    assert (run.status.attempt, run.status.incarnations) == (2, (0, 1))
    run.cluster.delete_pod("a-w0-0")
    run.until(lambda s: s.attempt == 3).training()
