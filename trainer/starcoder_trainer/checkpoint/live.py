"""The live tensors of one rank that make up its part of a checkpoint: saving copies from them, loading fills them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from starcoder_trainer.model.shards import shards_of
from starcoder_trainer.optimizer import Optimizer

from .names import STATES, TensorName


@dataclass(frozen=True, eq=False)
class LivePiece:
    """Elements [start, start + data.numel()) of the flattened tensor `name`."""

    name: TensorName
    global_shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    data: torch.Tensor
    """fp32, 1-D, on the training device."""
    saved: bool
    """False for a copy that another tensor rank or pipeline stage saves."""


def live_pieces(model: Any, optimizer: Optimizer) -> list[LivePiece]:
    """By state, then in the model's order, so that a state's pieces are neighbours in the file."""
    shards = {id(s.parameter): s for s in shards_of(model)}
    pieces = []
    for part in optimizer.parts:
        for parameter, start in _owned(part):
            shard = shards[id(parameter)]
            tensors = part._get_main_param_and_optimizer_states(parameter)
            for state in STATES:
                data = tensors[state].detach().view(-1)
                if data.dtype is not torch.float32:
                    raise RuntimeError(f"{state} of {shard.name} is {data.dtype}, expected float32")
                name = TensorName(state, shard.name, shard.offset, shard.shape)
                pieces.append(LivePiece(name, shard.global_shape, start, data, shard.main_copy))
    return sorted(pieces, key=lambda p: STATES.index(p.name.state))


def _owned(part: Any) -> list[tuple[torch.nn.Parameter, int]]:
    """Parameters of which this data rank owns a range, and where the range starts."""
    return [
        (parameter, ranges["param"].start)
        for buffer in part.gbuf_ranges
        for buckets in buffer.values()
        for bucket in buckets
        for parameter, ranges in bucket["param_map"].items()
    ]
