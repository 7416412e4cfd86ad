"""Series of runs: they grow with the account, never go back, and end with the run."""

from __future__ import annotations

from starcoder_operator.adapters.metrics import Metrics
from starcoder_operator.api.v1alpha1 import StarCoderRunStatus
from starcoder_operator.api.v1alpha1.goodput import Buckets, Goodput, Recovery, StageSeconds

KEY = ("ns", "demo")
RUN = {"namespace": "ns", "name": "demo"}


def status(ratio: float = 0.5, **seconds: float) -> StarCoderRunStatus:
    begin = "2026-01-01T00:00:00.000Z"
    return StarCoderRunStatus(goodput=Goodput(ratio=ratio, buckets=Buckets(**seconds), since=begin, as_of=begin))


def seconds_of(metrics: Metrics, bucket: str) -> float | None:
    return metrics.registry.get_sample_value("starcoder_run_seconds_total", RUN | {"bucket": bucket})


def recovery(lost: int | None = None, **seconds: float) -> Recovery:
    return Recovery(
        cause="NodeLost",
        at="2026-01-01T00:00:00.000Z",
        from_attempt=1,
        to_attempt=2,
        iteration=9,
        iterations_lost=lost,
        seconds=StageSeconds(**seconds),
        total=sum(seconds.values()),
    )


def test_buckets_and_ratio_are_those_of_the_status() -> None:
    metrics = Metrics()
    metrics.of_runs.accounted(KEY, "uid-1", status(0.75, training=30, checkpoint_stall=2.5))
    assert seconds_of(metrics, "training") == 30
    assert seconds_of(metrics, "checkpointStall") == 2.5
    assert seconds_of(metrics, "queued") == 0
    assert metrics.registry.get_sample_value("starcoder_run_goodput_ratio", RUN) == 0.75
    assert b'starcoder_run_seconds_total{bucket="training",name="demo",namespace="ns"} 30.0' in metrics.render()


def test_what_a_later_pass_judges_anew_makes_no_counter_go_back() -> None:
    metrics = Metrics()
    metrics.of_runs.accounted(KEY, "uid-1", status(training=30))
    metrics.of_runs.accounted(KEY, "uid-1", status(training=28, detecting=2))
    assert (seconds_of(metrics, "training"), seconds_of(metrics, "detecting")) == (30, 2)


def test_a_run_of_the_same_name_begins_at_nothing() -> None:
    metrics = Metrics()
    metrics.of_runs.accounted(KEY, "uid-1", status(training=30))
    metrics.of_runs.recovered(KEY, [recovery(detecting=3.0)])
    metrics.of_runs.accounted(KEY, "uid-2", status(training=1))
    assert seconds_of(metrics, "training") == 1
    assert metrics.registry.get_sample_value("starcoder_run_recoveries_total", RUN | {"cause": "NodeLost"}) is None


def test_recoveries_are_counted_by_cause_and_measured_by_stage() -> None:
    metrics = Metrics()
    metrics.of_runs.recovered(KEY, [recovery(detecting=3.0, forming=1.0, first_step=0.5), recovery(detecting=2.0)])
    value = metrics.registry.get_sample_value
    assert value("starcoder_run_recoveries_total", RUN | {"cause": "NodeLost"}) == 2
    assert value("starcoder_run_recovery_seconds_sum", RUN | {"stage": "detecting"}) == 5
    assert value("starcoder_run_recovery_seconds_count", RUN | {"stage": "firstStep"}) == 1
    assert value("starcoder_run_recovery_seconds_sum", RUN | {"stage": "total"}) == 6.5


def test_iterations_that_are_done_again_are_counted_by_cause() -> None:
    metrics = Metrics()
    metrics.of_runs.recovered(KEY, [recovery(7), recovery(0), recovery(None), recovery(5)])
    value = metrics.registry.get_sample_value("starcoder_run_iterations_lost_total", RUN | {"cause": "NodeLost"})
    assert value == 12


def test_series_go_with_their_run() -> None:
    metrics = Metrics()
    metrics.of_runs.accounted(KEY, "uid-1", status(training=30))
    metrics.of_runs.recovered(KEY, [recovery(detecting=3.0)])
    metrics.of_runs.accounted(("ns", "other"), "uid-2", status(training=1))
    metrics.of_runs.forget(KEY)
    text = metrics.render().decode()
    assert 'name="demo"' not in text
    assert 'name="other"' in text
