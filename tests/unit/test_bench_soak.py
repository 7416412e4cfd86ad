"""The verdict over a soak."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from bench.soak.judge import History, judge, unaccounted

NOW = datetime(2026, 1, 1, 0, 1, 40, tzinfo=UTC)
CALM = {1: {"5.0"}, 2: {"4.5"}, 3: {"4.0"}}


def test_a_run_that_lost_nothing_and_has_every_loss_is_good() -> None:
    history = History(verified=[0, 10, 10, 20], layouts={"TP2 x PP1 x DP2"})
    verdict = judge(history, [0, 0, 10, 10], {1: {"5.0"}, 2: {"4.5"}}, CALM, workers=2)
    assert verdict.good
    assert verdict.compared == 2


def test_a_checkpoint_that_goes_back_is_lost() -> None:
    assert judge(History(verified=[10, 20, 10]), [], {1: {"5.0"}}, CALM, workers=2).lost == 1


def test_a_restart_at_zero_after_a_checkpoint_is_seen() -> None:
    verdict = judge(History(verified=[10]), [0, 0, 0, 10], {1: {"5.0"}}, CALM, workers=2)
    assert verdict.restarts_at_zero == 1
    assert not verdict.good


def test_in_one_layout_losses_are_equal_to_the_last_digit() -> None:
    one = History(verified=[10], layouts={"TP1 x PP1 x DP2"})
    assert judge(one, [], {1: {"5.0000001"}}, CALM, workers=2).different
    assert judge(one, [], {1: {"5.0", "5.1"}}, CALM, workers=2).different


def test_across_layouts_losses_may_differ_by_rounding_alone() -> None:
    several = History(verified=[10], layouts={"TP1 x PP1 x DP2", "TP1 x PP1 x DP1"})
    assert judge(several, [], {1: {"5.00001", "5.0"}}, CALM, workers=2).good
    assert judge(several, [], {1: {"5.001"}}, CALM, workers=2).different


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
