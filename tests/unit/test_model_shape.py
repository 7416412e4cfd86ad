"""The model's shape: parameter counts, and layouts that can't split it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from starcoder_trainer.contract.config import ModelConfig, ParallelismConfig
from starcoder_trainer.failures import ConfigurationError
from starcoder_trainer.model.transformer import parameter_count, transformer_config

STARCODER_15B = ModelConfig(
    preset="starcoder-15b",
    layers=40,
    hidden_size=6144,
    ffn_hidden_size=24576,
    attention_heads=48,
    query_groups=1,
    head_dim=128,
    vocab_size=49152,
    init_std=0.01275,
    dropout=0.1,
)


def test_starcoder_15b_has_its_published_number_of_parameters() -> None:
    assert parameter_count(STARCODER_15B) == 15_517_456_384


@pytest.mark.parametrize(
    ("change", "parallelism", "field"),
    [
        ({}, ParallelismConfig(5, 1), "model.attentionHeads"),
        ({}, ParallelismConfig(1, 3), "model.layers"),
        ({"vocab_size": 49153}, ParallelismConfig(2, 1), "model.vocabSize"),
        ({"ffn_hidden_size": 24577}, ParallelismConfig(2, 1), "model.ffnHiddenSize"),
        ({"query_groups": 5}, ParallelismConfig(1, 1), "model.attentionHeads"),
        ({"query_groups": 16}, ParallelismConfig(24, 1), "model.vocabSize"),
        ({"query_groups": 4, "attention_heads": 12, "vocab_size": 49158}, ParallelismConfig(6, 1), "query"),
    ],
)
def test_a_shape_that_the_layout_can_not_split_is_refused_by_field(
    change: dict[str, int], parallelism: ParallelismConfig, field: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"^{field}"):
        transformer_config(replace(STARCODER_15B, **change), parallelism, "fp32")


def test_sequence_parallelism_is_of_no_meaning_with_one_tensor_rank() -> None:
    assert not transformer_config(STARCODER_15B, ParallelismConfig(1, 1, sequence=True), "bf16").sequence_parallel
    assert transformer_config(STARCODER_15B, ParallelismConfig(4, 1, sequence=True), "bf16").sequence_parallel
