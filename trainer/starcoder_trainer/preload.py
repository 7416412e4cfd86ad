"""Imports what a worker needs, once, before it is forked: seconds here, milliseconds in each child."""

from starcoder_trainer.environment import set_environment

set_environment()

from starcoder_trainer.model import cpu  # noqa: E402

cpu.hush()

import megatron.core  # noqa: E402
import megatron.core.distributed  # noqa: E402
import megatron.core.models.gpt  # noqa: E402
import megatron.core.models.gpt.gpt_layer_specs  # noqa: E402
import megatron.core.models.mimo.model.base  # noqa: E402
import megatron.core.optimizer  # noqa: E402
import megatron.core.pipeline_parallel  # noqa: E402
import psutil  # noqa: E402
import torch.distributed  # noqa: E402

from starcoder_trainer import assemble, devices, loop, metrics, process_group  # noqa: E402
from starcoder_trainer.checkpoint import load, write  # noqa: E402
from starcoder_trainer.data import dataset  # noqa: E402
from starcoder_trainer.storage import s3_client  # noqa: E402

s3_client.prepare()

__all__ = [
    "assemble",
    "dataset",
    "devices",
    "load",
    "loop",
    "megatron",
    "metrics",
    "process_group",
    "psutil",
    "torch",
    "write",
]
