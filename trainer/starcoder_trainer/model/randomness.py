"""Dropout as a function of the sample: no generator's state is ever saved, and a resumed run drops the same."""

from __future__ import annotations

import hashlib

import torch


def seed_for(run_seed: int, sample: int, stage: int, tensor_rank: int | None = None) -> int:
    """63 bits. `tensor_rank` None: the stream that all tensor ranks share."""
    text = f"dropout/{run_seed}/{sample}/{stage}/{'shared' if tensor_rank is None else tensor_rank}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def seed_micro_batch(run_seed: int, sample: int) -> None:
    """Before the forward of the micro-batch whose first sample has the global index `sample`, on every stage.

    Sets torch's generator (equal on tensor ranks: what all of them compute must drop alike) and megatron's tracker
    (different on tensor ranks: each has heads or a part of the sequence of its own).
    """
    from megatron.core import parallel_state, tensor_parallel

    stage = parallel_state.get_pipeline_model_parallel_rank()
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("model-parallel-rng", seed_for(run_seed, sample, stage, tensor_rank))
    torch.manual_seed(seed_for(run_seed, sample, stage))
