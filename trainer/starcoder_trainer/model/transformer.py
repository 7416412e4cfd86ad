"""StarCoder's transformer out of megatron-core's parts: one pipeline stage and tensor share of it, for this rank."""

from __future__ import annotations

import functools
from typing import Any

import torch

from starcoder_trainer.contract.config import ModelConfig, ParallelismConfig, TrainingConfig
from starcoder_trainer.failures import ConfigurationError

from .attention import Backend, CoreAttention


def transformer_config(model: ModelConfig, parallelism: ParallelismConfig, precision: str) -> Any:
    """megatron's TransformerConfig.

    Raises:
        ConfigurationError: the shape can't be split so; the message says which number to change.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    _check_divides(model, parallelism)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_dim,
        add_bias_linear=True,
        gated_linear_unit=False,
        activation_func=functools.partial(torch.nn.functional.gelu, approximate="tanh"),
        normalization="LayerNorm",
        layernorm_epsilon=model.layer_norm_epsilon,
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        init_method_std=model.init_std,
        # Weights come from `initialisation`; what megatron would draw depends on the layout.
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallelism.tensor,
        pipeline_model_parallel_size=parallelism.pipeline,
        # Of no meaning with one tensor rank, and megatron refuses it there.
        sequence_parallel=parallelism.sequence and parallelism.tensor > 1,
        # Data ranks may have different numbers of micro-batches, and samples different numbers of unmasked tokens.
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=parallelism.pipeline > 1,
        # These need Transformer Engine, apex or a compiler in the image.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )


def _check_divides(model: ModelConfig, parallelism: ParallelismConfig) -> None:
    tensor = parallelism.tensor
    for what, value, divisor, by in (
        ("model.layers", model.layers, parallelism.pipeline, "parallelism.pipeline"),
        ("model.attentionHeads", model.attention_heads, tensor, "parallelism.tensor"),
        ("model.attentionHeads", model.attention_heads, model.query_groups, "model.queryGroups"),
        ("model.ffnHiddenSize", model.ffn_hidden_size, tensor, "parallelism.tensor"),
        ("model.vocabSize", model.vocab_size, tensor, "parallelism.tensor"),
        (
            "query, key and value heads x model.headDim",
            (model.attention_heads + 2 * model.query_groups) * model.head_dim,
            tensor,
            "parallelism.tensor",
        ),
    ):
        if value % divisor:
            raise ConfigurationError(f"{what} is {value}, expected a multiple of {by} ({divisor})")
    groups = model.query_groups
    if groups % tensor and tensor % groups:
        raise ConfigurationError(f"model.queryGroups is {groups}, expected a multiple or divisor of {tensor} (tensor)")


class Norm(torch.nn.LayerNorm):
    """LayerNorm whose gradients megatron sums over tensor ranks where each sees a part of the sequence."""

    def __init__(self, config: Any, hidden_size: int, eps: float, **_megatron: Any) -> None:
        super().__init__(hidden_size, eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def block_spec(config: Any, backend: Backend, layers: int) -> Any:
    """Layer specification of this stage's `layers` layers: megatron's local modules with our norm and attention."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = Norm
    layer.submodules.pre_mlp_layernorm = Norm
    layer.submodules.sharded_state_dict_keys_map = {}  # norms keep their own names, not Transformer Engine's
    layer.submodules.self_attention.submodules.core_attention = functools.partial(CoreAttention, backend=backend)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=Norm)


def build(config: TrainingConfig, backend: Backend) -> Any:
    """This rank's part of the model, in `training.precision`, on its device; weights are not filled yet.

    Process groups must be there: megatron's modules take them when made.

    Raises:
        ConfigurationError: the model's shape and the parallelism don't fit.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    shape = transformer_config(config.model, config.parallelism, config.training.precision)
    if config.data.sequence_length > config.model.max_sequence_length:
        raise ConfigurationError(
            f"data.sequenceLength is {config.data.sequence_length}, expected at most model.maxSequenceLength "
            f"({config.model.max_sequence_length}): positions are learned"
        )
    model = GPTModel(
        shape,
        block_spec(shape, backend, get_num_layers_to_build(shape)),
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.model.max_sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=True,
        position_embedding_type="learned_absolute",
    )
    if torch.cuda.is_available():
        model.cuda(torch.cuda.current_device())
    return Float16Module(shape, model) if shape.bf16 else model


def unwrap(model: Any) -> Any:
    """The GPTModel inside megatron's wrappers (Float16Module, DistributedDataParallel)."""
    while hasattr(model, "module"):
        model = model.module
    return model


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the whole model; tied embeddings count once."""
    h, f = model.hidden_size, model.ffn_hidden_size
    q, kv = model.attention_heads * model.head_dim, 2 * model.query_groups * model.head_dim
    attention = h * (q + kv) + (q + kv) + q * h + h
    mlp = h * f + f + f * h + h
    return (model.vocab_size + model.max_sequence_length) * h + model.layers * (attention + mlp + 4 * h) + 2 * h
