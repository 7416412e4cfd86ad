"""Initial weights as a function of (seed, tensor name, global shape): the same in any layout.

A tensor is drawn in blocks of rows, each from a generator of its own, so that a rank draws only the blocks its part
touches, on the CPU whatever the device.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch

from starcoder_trainer.contract.config import ModelConfig

from .shards import Shard, shards_of

_BLOCK_ELEMENTS = 1 << 20


def initialise(model: Any, config: ModelConfig, seed: int) -> None:
    """Fill all parameters of this rank's model in place."""
    with torch.no_grad():
        for shard in shards_of(model):
            fill(shard, config, seed)


def fill(shard: Shard, config: ModelConfig, seed: int) -> None:
    """One parameter: weights from a normal distribution, biases 0, gains of norms 1."""
    target = shard.parameter.data
    std = standard_deviation(shard.name, config)
    if std is None:
        target.fill_(1.0 if _is_gain(shard.name) else 0.0)
        return
    rows, columns = shard.global_shape
    height = max(1, _BLOCK_ELEMENTS // columns)
    first, last = shard.offset[0], shard.offset[0] + shard.shape[0]
    left, right = shard.offset[1], shard.offset[1] + shard.shape[1]
    for block in range(first // height, math.ceil(last / height)):
        top = block * height
        values = _draw(f"{seed}/{shard.name}/{rows}x{columns}/{block}", (min(height, rows - top), columns))
        lo, hi = max(first, top), min(last, top + values.shape[0])
        part = torch.from_numpy(np.ascontiguousarray(values[lo - top : hi - top, left:right])).mul_(std)
        target[lo - first : hi - first].copy_(part)


def standard_deviation(name: str, config: ModelConfig) -> float | None:
    """None: not random. Projections into the residual stream are scaled by 1/sqrt(2 layers), as Megatron does."""
    if name.endswith(".bias") or _is_gain(name):
        return None
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return config.init_std / math.sqrt(2 * config.layers)
    return config.init_std


def _is_gain(name: str) -> bool:
    return name.endswith("layernorm.weight")


def _draw(key: str, shape: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    digest = hashlib.sha256(key.encode()).digest()
    philox = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8"))
    return np.random.Generator(philox).standard_normal(shape, dtype=np.float32)
