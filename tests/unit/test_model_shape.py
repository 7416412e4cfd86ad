"""The model's shape: parameter counts, and layouts that can't split it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from starcoder_operator.api.v1alpha1 import read_run
from starcoder_operator.api.v1alpha1.model import PresetName
from starcoder_operator.domain.training_config import training_config
from starcoder_trainer.contract.config import ModelConfig, ParallelismConfig
from starcoder_trainer.failures import ConfigurationError
from starcoder_trainer.model.transformer import parameter_count, transformer_config

pytestmark = pytest.mark.filterwarnings("ignore")  # megatron's, about each optional library that is absent


def preset(name: PresetName) -> ModelConfig:
    """As a run that names it and nothing else gets it."""
    run = {
        "apiVersion": "starcoder.dev/v1alpha1",
        "kind": "StarCoderRun",
        "metadata": {"name": "x"},
        "spec": {
            "model": {"preset": name},
            "data": {"tokenizer": "s3://c/tokenizer.json", "sources": [{"uri": "s3://c/code"}]},
            "training": {"iterations": 1, "globalBatchSize": 1},
            "workers": {"replicas": 1, "gpusPerWorker": 1, "image": "x"},
            "checkpoint": {"uri": "s3://c/checkpoints"},
        },
    }
    return training_config("x", "default", "uid", read_run(run).spec).model


STARCODER_15B = preset("starcoder-15b")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("starcoder-1b", 1_137_207_296),
        ("starcoder-3b", 3_043_311_104),
        ("starcoder-7b", 7_327_263_232),
        ("starcoder-15b", 15_517_456_384),
    ],
)
def test_a_preset_has_the_published_models_number_of_parameters(name: PresetName, parameters: int) -> None:
    assert parameter_count(preset(name)) == parameters


def test_positions_do_not_depend_on_the_length_of_samples() -> None:
    assert STARCODER_15B.max_sequence_length == 8192
    assert parameter_count(replace(STARCODER_15B, max_sequence_length=4096)) == 15_517_456_384 - 4096 * 6144


@pytest.mark.slow
def test_the_architecture_is_starcoders() -> None:
    shape = transformer_config(STARCODER_15B, ParallelismConfig(1, 1), "bf16")
    assert (shape.num_layers, shape.hidden_size, shape.num_attention_heads) == (40, 6144, 48)
    assert (shape.num_query_groups, shape.kv_channels, shape.ffn_hidden_size) == (1, 128, 24576)
    assert (shape.normalization, shape.layernorm_epsilon, shape.add_bias_linear) == ("LayerNorm", 1e-5, True)
    assert (shape.gated_linear_unit, shape.hidden_dropout, shape.attention_dropout) == (False, 0.1, 0.1)
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    tanh_gelu = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(shape.activation_func(x), tanh_gelu)
    assert not torch.allclose(tanh_gelu, torch.nn.functional.gelu(x), atol=1e-5, rtol=0), "erf is another function"


@pytest.mark.parametrize(
    ("change", "parallelism", "field"),
    [
        ({}, ParallelismConfig(5, 1), "model.attentionHeads"),
        ({}, ParallelismConfig(1, 3), "model.layers"),
        ({"vocab_size": 49153}, ParallelismConfig(2, 1), "model.vocabSize"),
        ({"ffn_hidden_size": 24577}, ParallelismConfig(2, 1), "model.ffnHiddenSize"),
        ({"query_groups": 5}, ParallelismConfig(1, 1), "model.attentionHeads"),
        ({"query_groups": 6}, ParallelismConfig(4, 1), "model.queryGroups"),
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
