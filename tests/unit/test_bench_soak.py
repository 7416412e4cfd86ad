"""The verdict over a soak."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from bench.soak.judge import History, judge, unaccounted
from bench.soak.undisturbed import Stretch, stretches
from starcoder_trainer.contract.assignment import Layout

NOW = datetime(2026, 1, 1, 0, 1, 40, tzinfo=UTC)
CALM = {1: "5.0", 2: "4.5", 3: "4.0"}
WHOLE, HALF = Layout(2, 1, 2), Layout(2, 1, 1)


def test_a_run_that_lost_nothing_and_has_every_loss_is_good() -> None:
    history = History(verified=[0, 10, 10, 20])
    verdict = judge(history, [0, 0, 10, 10], {1: {"5.0"}, 2: {"4.5"}}, CALM, workers=2)
    assert verdict.good
    assert verdict.compared == 2


def test_a_checkpoint_that_goes_back_is_lost() -> None:
    assert judge(History(verified=[10, 20, 10]), [], {1: {"5.0"}}, CALM, workers=2).lost == 1


def test_a_restart_at_zero_after_a_checkpoint_is_seen() -> None:
    verdict = judge(History(verified=[10]), [0, 0, 0, 10], {1: {"5.0"}}, CALM, workers=2)
    assert verdict.restarts_at_zero == 1
    assert not verdict.good


def test_the_loss_that_training_went_on_from_is_equal_to_the_last_digit() -> None:
    history = History(verified=[10])
    assert judge(history, [], {1: {"5.0000001"}}, CALM, workers=2).different
    assert judge(history, [], {1: {"5.0", "5.0000001"}}, CALM, workers=2).good


def test_an_iteration_that_is_done_again_may_differ_by_rounding_alone() -> None:
    history = History(verified=[10])
    assert judge(history, [], {1: {"5.00001", "5.0"}}, CALM, workers=2).good
    assert judge(history, [], {1: {"5.001", "5.0"}}, CALM, workers=2).different


def test_what_lies_between_two_checkpoints_was_trained_by_the_attempt_that_committed_the_later_one() -> None:
    committed = {20: 1, 40: 1, 57: 4, 60: 4, 80: 6, 100: 7}
    layouts = {1: WHOLE, 4: HALF, 6: WHOLE, 7: WHOLE}
    assert stretches(committed, layouts) == (Stretch(40, WHOLE), Stretch(60, HALF), Stretch(100, WHOLE))


def test_nothing_compared_is_not_good() -> None:
    assert not judge(History(verified=[10]), [], {}, CALM, workers=2).good


def test_seconds_that_are_in_no_bucket_or_in_two_are_not_good() -> None:
    def run(**buckets: float) -> dict[str, object]:
        return {"metadata": {"creationTimestamp": "2026-01-01T00:00:00Z"}, "status": {"goodput": {"buckets": buckets}}}

    assert unaccounted(run(queued=10.0, training=90.0), NOW) == 0
    assert unaccounted(run(queued=10.0, training=85.0), NOW) == pytest.approx(0.05)
    assert unaccounted(run(queued=10.0, training=95.0), NOW) == pytest.approx(0.05)
    assert judge(History(verified=[10]), [], {1: {"5.0"}}, CALM, workers=2, unaccounted=0.009).good
    assert not judge(History(verified=[10]), [], {1: {"5.0"}}, CALM, workers=2, unaccounted=0.05).good
