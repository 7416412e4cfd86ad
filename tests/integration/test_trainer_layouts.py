"""Any layout trains the same run: same losses and gradient norms, on real process groups of real processes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from starcoder_trainer.contract.assignment import Layout
from starcoder_trainer.model.transformer import parameter_count
from starcoder_trainer.process_group import COLLECTIVE_TIMEOUT
from tests.support.trainer import ONE, collective_timeouts, first_moment, make_config, masters, run_ranks, steps

pytestmark = pytest.mark.slow

ITERATIONS = 10
MICRO_BATCHES = 8


def trained(layout: Layout, **changes: Any) -> list[Any]:
    """Steps of each rank, in rank order. Samples differ in length; their padding is masked."""
    config = make_config(layout, iterations=ITERATIONS, global_batch=MICRO_BATCHES, **changes)
    return run_ranks(layout, steps, config)


@pytest.fixture(scope="module")
def alone() -> list[Any]:
    return trained(ONE)[0]


def test_the_model_learns(alone: list[Any]) -> None:
    assert [done.iteration for done in alone] == list(range(1, ITERATIONS + 1))
    assert alone[-1].loss < alone[0].loss - 0.1
    assert all(done.grad_norm > 0 for done in alone)


LAYOUTS = [
    Layout(1, 1, 3),  # 3, 3 and 2 micro-batches
    Layout(2, 1, 1),
    Layout(1, 2, 1),
    Layout(2, 1, 2, sequence=True),
]


@pytest.mark.parametrize(
    "layout", LAYOUTS, ids=["data 3, uneven", "tensor 2", "pipeline 2", "tensor 2 x data 2, sequence parallel"]
)
def test_another_layout_has_the_same_losses_and_gradient_norms(layout: Layout, alone: list[Any]) -> None:
    ranks = trained(layout)
    for other in ranks[1:]:
        assert [s.loss for s in other] == [s.loss for s in ranks[0]], "every rank is told the same loss"
    assert [s.loss for s in ranks[0]] == pytest.approx([s.loss for s in alone], abs=1e-6, rel=0)
    assert [s.grad_norm for s in ranks[0]] == pytest.approx([s.grad_norm for s in alone], rel=1e-4)
    assert [s.learning_rate for s in ranks[0]] == [s.learning_rate for s in alone]


def test_bf16_follows_fp32_closely_with_uneven_data_ranks(alone: list[Any]) -> None:
    half = trained(Layout(1, 1, 3), precision="bf16")[0]
    assert [s.loss for s in half] == pytest.approx([s.loss for s in alone], abs=2e-2, rel=0)
    assert half[-1].loss < half[0].loss - 0.1


def test_every_step_is_timed_by_phase(alone: list[Any]) -> None:
    for done in alone:
        assert done.seconds.keys() == {"data", "forward_backward", "optimizer", "total"}
        phases = sum(seconds for name, seconds in done.seconds.items() if name != "total")
        assert 0 < phases <= done.seconds["total"]


def test_weights_decay_but_not_biases_and_norms() -> None:
    config = make_config()
    (found,) = run_ranks(ONE, masters, config)
    decay: dict[str, float] = found["decay"]
    assert found["parameters"] == parameter_count(config.model)
    assert {n for n, d in decay.items() if d == 0} == {n for n in decay if n.endswith(".bias") or "layernorm" in n}
    assert {d for d in decay.values() if d} == {config.training.optimizer.weight_decay}
    assert "embedding.position_embeddings.weight" in decay
    assert not any("output_layer" in name for name in decay), "the output layer is the embedding"


def test_gradients_are_clipped_to_the_norm_that_is_set_and_the_norm_before_is_told(alone: list[Any]) -> None:
    norm = alone[0].grad_norm
    config = make_config(global_batch=MICRO_BATCHES)
    for limit in (norm / 4, norm * 4):
        optimizer = dataclasses.replace(config.training.optimizer, clip_grad=limit)
        training = dataclasses.replace(config.training, optimizer=optimizer)
        (found,) = run_ranks(ONE, first_moment, dataclasses.replace(config, training=training))
        told, moment = found
        assert told == pytest.approx(norm, rel=1e-5)
        assert moment == pytest.approx((1 - optimizer.beta1) * min(norm, limit), rel=1e-4)


def test_bf16_weights_have_fp32_masters() -> None:
    found = run_ranks(Layout(1, 1, 2), masters, make_config(precision="bf16"))
    for rank in found:
        assert rank["weights"] == {"torch.bfloat16"}
        assert rank["masters"] == {"torch.float32"}


def test_once_formed_a_gang_waits_longer_for_a_rank_than_while_forming() -> None:
    assert set(run_ranks(Layout(1, 1, 2), collective_timeouts)) == {(COLLECTIVE_TIMEOUT,)}
