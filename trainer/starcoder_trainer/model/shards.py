"""Where each local parameter lies in the whole model's tensor of the same name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .transformer import unwrap


@dataclass(frozen=True, eq=False)
class Shard:
    """One parameter of this rank."""

    name: str
    """Of the whole model, the same in any layout: `decoder.layers.7.mlp.linear_fc1.weight`."""
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    """Of the local part's first element in the global tensor."""
    shape: tuple[int, ...]
    """Of the local part."""
    main_copy: bool
    """False where another tensor rank or pipeline stage holds the same values (norms, tied embeddings)."""
    parameter: torch.nn.Parameter


def shards_of(model: Any) -> list[Shard]:
    """All parameters of this rank's model, in the model's order; a parameter that is used twice comes once."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    inner = unwrap(model)
    described = {id(s.data): s for s in nested_values(inner.sharded_state_dict()) if isinstance(s, ShardedTensor)}
    shards = []
    for name, parameter in inner.named_parameters():
        tensor = described.get(id(parameter))
        if tensor is None:
            raise RuntimeError(f"{name}: megatron does not say how this parameter is split over ranks")
        shards.append(_shard(tensor, parameter))
    return shards


def _shard(tensor: Any, parameter: torch.nn.Parameter) -> Shard:
    # Megatron stacks equal layers: the key lacks the layer's number, which is the offset on a prepended axis.
    axes = tensor.prepend_axis_num
    key = tensor.key
    for layer in tensor.global_offset[:axes]:
        key = key.replace("decoder.layers.", f"decoder.layers.{layer}.", 1)
    pipeline_copy, tensor_copy, *_ = tensor.replica_id
    return Shard(
        name=key,
        global_shape=tuple(tensor.global_shape[axes:]),
        offset=tuple(tensor.global_offset[axes:]),
        shape=tuple(tensor.local_shape),
        main_copy=pipeline_copy == 0 and tensor_copy == 0,
        parameter=parameter,
    )
