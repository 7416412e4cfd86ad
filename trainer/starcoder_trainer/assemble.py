"""Model and optimizer of one rank, from the run's configuration."""

from __future__ import annotations

import logging
from typing import Any

from starcoder_trainer.contract.config import TrainingConfig

from .model import attention, cpu, initialisation, transformer
from .optimizer import Optimizer

log = logging.getLogger(__name__)


def attention_backend(config: TrainingConfig) -> tuple[attention.Backend, str]:
    """The kernel that this process uses for this run, and why. Touches CUDA where there is one.

    Raises:
        ConfigurationError: the one asked for is absent.
    """
    needs = attention.demands(config.training.precision == "bf16", config.model.dropout)
    return attention.choose(config.training.attention_backend, needs)


def assemble(config: TrainingConfig, *, fresh: bool) -> tuple[Any, Optimizer]:
    """megatron's DistributedDataParallel around this rank's part, and its optimizer. Process groups must be there.

    Args:
        fresh: Draw the initial weights; False where a checkpoint will fill them.

    Raises:
        ConfigurationError: model and parallelism don't fit, or the attention backend asked for is absent.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    bf16 = config.training.precision == "bf16"
    backend, why = attention_backend(config)
    log.info("attention: %s (%s)", backend, why)
    with cpu.cuda_literals():
        part = transformer.build(config, backend)
        if fresh:
            initialisation.initialise(part, config.model, config.data.seed)
        shape = part.config
        settings = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=bf16)
        model = DistributedDataParallel(shape, settings, part)
    shape.finalize_model_grads_func = finalize_model_grads
    model.train()
    return model, Optimizer(config, model)
