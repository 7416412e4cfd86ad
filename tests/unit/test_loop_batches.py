"""The split of a global batch, the learning rate and the cost of a step: pure functions."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starcoder_trainer.batches import micro_batches
from starcoder_trainer.contract.config import OptimizerConfig
from starcoder_trainer.failures import ConfigurationError
from starcoder_trainer.metrics import PhaseTimer, flops_per_token, peak_flops, utilisation
from starcoder_trainer.optimizer import learning_rate
from tests.unit.test_model_shape import STARCODER_15B

SCHEDULE = OptimizerConfig(
    lr=3e-4, min_lr=3e-5, warmup_iterations=2000, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1, clip_grad=1.0
)


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 40), st.integers(0, 30))
def test_any_number_of_data_ranks_trains_the_same_samples_once(
    iteration: int, micro_batch: int, data_ranks: int, more: int
) -> None:
    count = data_ranks + more
    shares = [micro_batches(iteration, count * micro_batch, micro_batch, r, data_ranks) for r in range(data_ranks)]
    samples = [i for share in shares for batch in share for i in batch]
    first = iteration * count * micro_batch
    assert samples == list(range(first, first + count * micro_batch))
    assert {len(batch) for share in shares for batch in share} == {micro_batch}
    assert {len(share) for share in shares} <= {count // data_ranks, -(-count // data_ranks)}
    assert min(map(len, shares)) >= 1


@pytest.mark.parametrize(("global_batch", "data_ranks"), [(7, 1), (6, 4)])
def test_a_batch_that_can_not_be_split_is_refused(global_batch: int, data_ranks: int) -> None:
    with pytest.raises(ConfigurationError, match=f"globalBatchSize is {global_batch}, expected a multiple"):
        micro_batches(0, global_batch, 2, 0, data_ranks)


def test_the_learning_rate_warms_up_linearly_and_ends_at_its_minimum() -> None:
    rates = [learning_rate(SCHEDULE, 250_000, i) for i in range(1, 250_001, 249)]
    peak = rates.index(max(rates))
    assert learning_rate(SCHEDULE, 250_000, 1) == pytest.approx(3e-4 / 2000)
    assert learning_rate(SCHEDULE, 250_000, 1000) == pytest.approx(1.5e-4)
    assert learning_rate(SCHEDULE, 250_000, 2000) == pytest.approx(3e-4)
    assert learning_rate(SCHEDULE, 250_000, 126_000) == pytest.approx((3e-4 + 3e-5) / 2)
    assert learning_rate(SCHEDULE, 250_000, 250_000) == pytest.approx(3e-5)
    assert all(a < b for a, b in itertools.pairwise(rates[: peak + 1]))
    assert all(a > b for a, b in itertools.pairwise(rates[peak:]))


def test_a_run_shorter_than_its_warm_up_only_warms_up() -> None:
    assert learning_rate(SCHEDULE, 10, 10) == pytest.approx(3e-4)


def test_flops_of_starcoder_match_the_published_accounting() -> None:
    # 6ND with 15.5B weights is about 93 GFLOP a token; full s x s attention adds 12 x 40 x 6144 x 8192.
    attention = 12 * 40 * 6144 * 8192
    assert flops_per_token(STARCODER_15B, 8192) - attention == pytest.approx(6 * 15.5e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H20", 148e12),
        ("Some Other Device", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_utilisation_is_a_share_of_all_devices_peak_and_unknown_on_a_cpu() -> None:
    assert utilisation(1e9, 1000.0, 4, 1e12) == pytest.approx(0.25)
    assert utilisation(1e9, 1000.0, 4, None) is None


def test_the_timer_sums_phases_and_counts_wall_time_between_steps() -> None:
    now = iter([0.0, 1.0, 3.0, 4.0, 4.5, 10.0, 20.0])
    timer = PhaseTimer(lambda: next(now))
    with timer.phase("data"):
        pass
    with timer.phase("data"):
        pass
    assert timer.take() == {"data": 2.5, "total": 10.0}
    assert timer.take() == {"total": 10.0}
