"""Initial weights and dropout seeds depend on names, shapes and samples, never on the layout."""

from __future__ import annotations

import itertools

import pytest
import torch

from starcoder_trainer.contract.config import ModelConfig
from starcoder_trainer.model import initialisation
from starcoder_trainer.model.initialisation import fill, standard_deviation
from starcoder_trainer.model.randomness import seed_for
from starcoder_trainer.model.shards import Shard
from tests.support.trainer import make_config

MODEL: ModelConfig = make_config(layers=8).model
FC1 = "decoder.layers.1.mlp.linear_fc1.weight"
FC2 = "decoder.layers.1.mlp.linear_fc2.weight"


def part(name: str, rows: range, columns: range, shape: tuple[int, int] = (60, 40), seed: int = 3) -> torch.Tensor:
    """What a rank that holds these rows and columns draws."""
    parameter = torch.nn.Parameter(torch.empty(len(rows), len(columns)))
    fill(Shard(name, shape, (rows.start, columns.start), tuple(parameter.shape), True, parameter), MODEL, seed)
    return parameter.data


@pytest.fixture(autouse=True)
def _many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialisation, "_BLOCK_ELEMENTS", 7 * 40)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_shares_of_rows_or_columns_put_together_are_the_whole(ranks: int) -> None:
    whole = part(FC1, range(60), range(40))
    rows = [range(60 * r // ranks, 60 * (r + 1) // ranks) for r in range(ranks)]
    columns = [range(40 * r // ranks, 40 * (r + 1) // ranks) for r in range(ranks)]
    assert torch.equal(torch.cat([part(FC1, r, range(40)) for r in rows]), whole)
    assert torch.equal(torch.cat([part(FC1, range(60), c) for c in columns], 1), whole)


def test_other_names_shapes_and_seeds_give_other_values() -> None:
    whole = [
        part(FC1, range(60), range(40)),
        part(FC1.replace("1.mlp", "2.mlp"), range(60), range(40)),
        part(FC1, range(60), range(40), seed=4),
        part(FC1, range(60), range(40), shape=(61, 40)),
    ]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(whole, 2))


def test_weights_have_the_configured_spread_and_residual_projections_less_by_depth() -> None:
    assert part(FC1, range(60), range(40)).std().item() == pytest.approx(MODEL.init_std, rel=0.05)
    assert part(FC2, range(60), range(40)).std().item() == pytest.approx(MODEL.init_std / 4, rel=0.05)  # 2 x 8 layers
    assert abs(part(FC1, range(60), range(40)).mean().item()) < MODEL.init_std / 10


def test_biases_start_at_zero_and_gains_of_norms_at_one() -> None:
    for name, value in (("decoder.final_layernorm.weight", 1.0), ("decoder.final_layernorm.bias", 0.0)):
        parameter = torch.nn.Parameter(torch.full((5,), 9.0))
        fill(Shard(name, (5,), (0,), (5,), True, parameter), MODEL, 3)
        assert parameter.tolist() == [value] * 5
    assert standard_deviation("decoder.layers.0.self_attention.linear_qkv.bias", MODEL) is None


def test_each_sample_stage_and_tensor_rank_drops_by_a_seed_of_its_own() -> None:
    places = itertools.product((1, 2), range(5), range(3), (None, 0, 1))
    seeds = [seed_for(*place) for place in places]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**63 for s in seeds)
