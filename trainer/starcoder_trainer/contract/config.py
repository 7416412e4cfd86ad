"""What to train: the run's spec with every preset and default resolved, as the agents and workers get it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .codec import Document


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer (StarCoder: multi-query attention, learned positions, tanh-GELU, tied embeddings)."""

    preset: str
    layers: int
    hidden_size: int
    ffn_hidden_size: int
    attention_heads: int
    query_groups: int
    """Key/value heads: 1 is multi-query attention."""
    head_dim: int
    vocab_size: int
    init_std: float
    dropout: float
    """Of hidden states and attention."""
    layer_norm_epsilon: float = 1e-5
    max_sequence_length: int = 8192
    """Learned positions, tokens; a sample may be shorter."""


@dataclass(frozen=True)
class SourceConfig:
    uri: str
    weight: float


@dataclass(frozen=True)
class FimConfig:
    rate: float = 0.0
    """Share of documents transformed to fill-in-the-middle."""
    spm_rate: float = 0.5
    """Of those, share in suffix-prefix-middle order."""


@dataclass(frozen=True)
class DataConfig:
    tokenizer: str
    sources: tuple[SourceConfig, ...]
    sequence_length: int
    seed: int
    fim: FimConfig = FimConfig()


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay from `lr` to `min_lr` over all iterations."""

    lr: float
    min_lr: float
    warmup_iterations: int
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip_grad: float


@dataclass(frozen=True)
class ScheduleConfig:
    iterations: int
    global_batch_size: int
    """Sequences an iteration."""
    micro_batch_size: int
    precision: Literal["bf16", "fp32"]
    optimizer: OptimizerConfig
    attention_backend: Literal["auto", "flash-attn-4", "flash-attn-3", "flash-attn-2", "sdpa"] = "auto"
    log_every_iterations: int = 1


@dataclass(frozen=True)
class CheckpointConfig:
    uri: str
    every_iterations: int
    keep_last: int
    resume: Literal["Own", "Adopt"] = "Own"


@dataclass(frozen=True)
class StorageConfig:
    endpoint: str = ""
    """Empty: the SDK's default (AWS)."""
    region: str = "us-east-1"
    path_style: bool = False
    ca_bundle: str = ""
    """PEM; empty: the system's certificates."""


@dataclass(frozen=True)
class ParallelismConfig:
    tensor: int
    pipeline: int
    sequence: bool = False


@dataclass(frozen=True)
class HangConfig:
    """Least seconds after which no progress is taken for a hang; what this attempt's own iterations took, several
    times, is allowed in any case (starcoder_trainer.pace)."""

    iteration: float = 120.0
    """Longer than an S3 client keeps trying (about 95 s): where that gives up by itself, its error says more."""
    first_iteration: float = 900.0
    """From the process group's formation: building, loading, compiling, opening the data."""
    checkpoint: float = 600.0
    """An iteration that a checkpoint stands before."""


@dataclass(frozen=True)
class RunIdentity:
    name: str
    namespace: str
    uid: str


@dataclass(frozen=True)
class TrainingConfig(Document):
    run: RunIdentity
    model: ModelConfig
    data: DataConfig
    training: ScheduleConfig
    parallelism: ParallelismConfig
    checkpoint: CheckpointConfig
    storage: StorageConfig
    hang: HangConfig = HangConfig()
