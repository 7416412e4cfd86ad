"""How the model is trained: schedule, optimizer and how the work is cut over the GPUs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import ApiModel, Precision

AttentionBackend = Literal["auto", "flash-attn-4", "flash-attn-3", "flash-attn-2", "sdpa"]

WARMUP_ITERATIONS = 2000
"""StarCoder's linear warm-up."""


class Optimizer(ApiModel):
    """AdamW; the learning rate rises linearly, then falls as a cosine from lr to minLr until the last iteration."""

    lr: Annotated[float, Field(gt=0, le=10)] | None = None
    """Peak learning rate. Default: the one the preset was trained with."""
    min_lr: Annotated[float, Field(ge=0, le=10)] | None = None
    """Learning rate at the last iteration. Default: a tenth of lr."""
    warmup_iterations: Annotated[int, Field(ge=0, le=10**9)] | None = None
    """Iterations until lr is reached. Default: 2000, or a tenth of training.iterations where that is less."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1
    """Decoupled weight decay."""
    clip_grad: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """Largest global norm of the gradient; 0 clips nothing."""


class Training(ApiModel):
    """Length, batch and precision."""

    iterations: Annotated[int, Field(ge=1, le=10**9)]
    """Optimizer steps until the run is complete."""
    global_batch_size: Annotated[int, Field(ge=1, le=2**24)]
    """Sequences an iteration, over all GPUs."""
    micro_batch_size: Annotated[int, Field(ge=1, le=2**16)] = 1
    """Sequences a GPU works on at once."""
    precision: Precision = "bf16"
    """Of weights and activations; optimizer state and gradient reduction are fp32 always."""
    optimizer: Optimizer = Optimizer()
    attention_backend: AttentionBackend = "auto"
    """Kernel of the attention; auto takes the newest flash-attn that is installed, else sdpa. One that is asked for
    and absent is an error."""
    log_every_iterations: Annotated[int, Field(ge=1, le=10**6)] = 1
    """Iterations between two reports of loss and rate."""


class Parallelism(ApiModel):
    """Degrees of model parallelism; data parallelism is replicas x gpusPerWorker / (tensor x pipeline). Changed while
    the run trains, the gang takes a checkpoint and forms anew in the new layout."""

    tensor: Annotated[int, Field(ge=1, le=1024)] = 1
    """GPUs that share each layer's matrices."""
    pipeline: Annotated[int, Field(ge=1, le=1024)] = 1
    """Stages that the layers are cut into."""
    sequence: bool = False
    """Sequence parallelism: the tensor-parallel GPUs also share activations along the sequence. Needs tensor > 1."""
