"""The model: a preset of StarCoder's family, any field of it overridden beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field

from .base import ApiModel

PresetName = Literal["starcoder-15b", "starcoder-7b", "starcoder-3b", "starcoder-1b", "starcoder-tiny"]


@dataclass(frozen=True)
class Shape:
    """All numbers of a transformer of StarCoder's kind."""

    layers: int
    hidden_size: int
    attention_heads: int
    head_dim: int
    ffn_hidden_size: int
    query_groups: int
    """Key/value heads; 1 is multi-query attention."""
    vocab_size: int
    max_sequence_length: int
    """Learned positions, tokens."""
    init_std: float
    dropout: float


@dataclass(frozen=True)
class Preset:
    shape: Shape
    learning_rate: float
    """Peak rate the model was trained with."""


def _starcoder(layers: int, hidden: int, heads: int, init_std: float, learning_rate: float) -> Preset:
    """What the published sizes share: heads of 128, MQA, feed-forward of 4 x hidden, 49,152 tokens, 8,192 positions."""
    return Preset(Shape(layers, hidden, heads, 128, 4 * hidden, 1, 49152, 8192, init_std, 0.1), learning_rate)


PRESETS: dict[PresetName, Preset] = {
    "starcoder-15b": _starcoder(40, 6144, 48, 0.01275, 3e-4),
    "starcoder-7b": _starcoder(42, 4096, 32, 0.015625, 3e-4),
    "starcoder-3b": _starcoder(36, 2816, 22, 0.01884, 5e-4),
    "starcoder-1b": _starcoder(24, 2048, 16, 0.02209, 4e-4),
    # About a million parameters, for demonstrations and tests on CPUs.
    "starcoder-tiny": Preset(Shape(4, 128, 4, 32, 512, 1, 2048, 1024, 0.02, 0.1), 2e-3),
}
assert set(PRESETS) == set(get_args(PresetName))


class Model(ApiModel):
    """Architecture of the model. Immutable."""

    preset: PresetName
    """Published size that gives every number below that is not set."""
    layers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Transformer layers. Default: the preset's."""
    hidden_size: Annotated[int, Field(ge=1, le=131072)] | None = None
    """Width of the residual stream. Default: the preset's."""
    attention_heads: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Query heads. Default: the preset's."""
    head_dim: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Width of one head. Default: the preset's."""
    ffn_hidden_size: Annotated[int, Field(ge=1, le=1048576)] | None = None
    """Width of the feed-forward block. Default: the preset's."""
    query_groups: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Key/value heads; 1 is multi-query attention. Default: the preset's."""
    vocab_size: Annotated[int, Field(ge=1, le=4194304)] | None = None
    """Entries of the vocabulary. Default: the preset's."""
    max_sequence_length: Annotated[int, Field(ge=1, le=4194304)] | None = None
    """Longest sequence the learned positions allow, tokens. Default: the preset's."""
    init_std: Annotated[float, Field(gt=0, le=1)] | None = None
    """Standard deviation of the initial weights. Default: the preset's."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Probability of dropping a hidden state or an attention weight. Default: the preset's."""

    def shape(self) -> Shape:
        """The preset's numbers with this model's overrides."""
        base = PRESETS[self.preset].shape
        return Shape(
            layers=self.layers or base.layers,
            hidden_size=self.hidden_size or base.hidden_size,
            attention_heads=self.attention_heads or base.attention_heads,
            head_dim=self.head_dim or base.head_dim,
            ffn_hidden_size=self.ffn_hidden_size or base.ffn_hidden_size,
            query_groups=self.query_groups or base.query_groups,
            vocab_size=self.vocab_size or base.vocab_size,
            max_sequence_length=self.max_sequence_length or base.max_sequence_length,
            init_std=self.init_std or base.init_std,
            dropout=base.dropout if self.dropout is None else self.dropout,
        )
