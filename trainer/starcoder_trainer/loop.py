"""The training loop: iterations over the same samples in any layout, timed by phase."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from starcoder_trainer.contract.config import TrainingConfig

from .batches import micro_batches
from .failures import DivergedError
from .metrics import PhaseTimer
from .model.cpu import cuda_literals, device
from .model.randomness import seed_micro_batch
from .optimizer import Optimizer
from .pace import Pace


class Sample(Protocol):
    @property
    def tokens(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """`[s + 1]`: inputs and, shifted by one, labels."""

    @property
    def loss_mask(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """`[s]`: 0 where a label does not count (padding)."""


class Samples(Protocol):
    """The training set as an endless sequence; a sample is a function of its global index alone."""

    def sample(self, i: int) -> Sample: ...


@dataclass(frozen=True)
class StepDone:
    """One iteration, as every rank knows it."""

    iteration: int
    """Iterations done."""
    loss: float
    """Mean over the unmasked tokens of the global batch, before the update."""
    learning_rate: float
    grad_norm: float
    seconds: dict[str, float]
    """data, forward_backward, optimizer, total (wall time since the last step ended, saving included)."""


@dataclass
class Training:
    """One rank's share of the run, ready to step."""

    config: TrainingConfig
    model: Any
    """megatron's DistributedDataParallel."""
    optimizer: Optimizer
    samples: Samples
    iteration: int = 0
    """Iterations done; consumed samples = iteration x global batch."""

    @property
    def consumed_samples(self) -> int:
        return self.iteration * self.config.training.global_batch_size


@dataclass(frozen=True)
class _MicroBatch:
    """`[b, s]` each; None on the pipeline stages that don't need it."""

    first_sample: int
    tokens: torch.Tensor | None
    positions: torch.Tensor | None
    labels: torch.Tensor | None
    mask: torch.Tensor | None


def train(
    training: Training,
    on_step: Callable[[StepDone], None],
    save: Callable[[bool], None],
    asked_to_leave: Callable[[], bool] = lambda: False,
    pace: Pace | None = None,
) -> None:
    """From `training.iteration` to the last one; `save` is called every `checkpoint.everyIterations` and at the end,
    and is told whether that is now. `pace` is told what goes on.

    Ends earlier, on all ranks after the same iteration and with a save of it, where any rank is asked to leave.

    Raises:
        DivergedError: loss or gradient norm is not finite; nothing of that iteration is saved.
    """
    config = training.config
    timer = PhaseTimer(
        synchronise=torch.cuda.synchronize if torch.cuda.is_available() else None, entered=pace.enter if pace else None
    )
    while training.iteration < config.training.iterations:
        done = step(training, timer)
        if pace:
            pace.done(done.iteration)
            pace.enter("stop_flag")
        on_step(done)
        leaving = _any_rank(asked_to_leave())
        last = leaving or done.iteration == config.training.iterations
        if last or done.iteration % config.checkpoint.every_iterations == 0:
            save(last)
        if last:
            return


def _any_rank(asked: bool) -> bool:
    """The same answer on every rank of the gang. Tensor ranks and stages share no other reduction, so this is one of
    its own, over all: 4 bytes, after the ranks have just met for the gradient's norm (docs/adr has what it costs)."""
    flag = torch.tensor([int(asked)], dtype=torch.int32, device=device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def step(training: Training, timer: PhaseTimer) -> StepDone:
    """One iteration on all ranks of the gang."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    schedule, number = training.config.training, training.iteration + 1
    with timer.phase("data"):
        batches = _load(training)
    with timer.phase("forward_backward"), cuda_literals():
        training.optimizer.zero_grad()
        rows = get_forward_backward_func()(
            forward_step_func=functools.partial(_forward, training.config.data.seed),
            data_iterator=iter(batches),
            model=[training.model],
            num_microbatches=len(batches),
            seq_length=training.config.data.sequence_length,
            micro_batch_size=schedule.micro_batch_size,
            forward_only=False,
        )
        loss = _mean_loss(rows)
    if not math.isfinite(loss):
        raise DivergedError(f"iteration {number}: loss is {loss}; lower training.optimizer.lr or look at the data")
    with timer.phase("optimizer"):
        rate, norm = training.optimizer.step(number)
    if not math.isfinite(norm):
        raise DivergedError(f"iteration {number}: gradient norm is {norm} at loss {loss:.4f}; lower the learning rate")
    training.iteration = number
    return StepDone(number, loss, rate, norm, timer.take())


def _load(training: Training) -> list[_MicroBatch]:
    from megatron.core import parallel_state as ranks

    schedule = training.config.training
    shares = micro_batches(
        training.iteration,
        schedule.global_batch_size,
        schedule.micro_batch_size,
        ranks.get_data_parallel_rank(),
        ranks.get_data_parallel_world_size(),
    )
    first, last = ranks.is_pipeline_first_stage(), ranks.is_pipeline_last_stage()
    if not first and not last:
        return [_MicroBatch(share.start, None, None, None, None) for share in shares]
    where = device()
    batches = []
    for share in shares:
        samples = [training.samples.sample(i) for i in share]
        tokens = torch.from_numpy(np.stack([s.tokens for s in samples])).to(where)
        mask = torch.from_numpy(np.stack([s.loss_mask for s in samples])).to(where)
        positions = torch.arange(tokens.shape[1] - 1, device=where).expand(len(samples), -1)
        batches.append(_MicroBatch(share.start, tokens[:, :-1], positions, tokens[:, 1:].contiguous(), mask))
    return batches


def _forward(seed: int, batches: Iterator[_MicroBatch], model: Any) -> tuple[Any, Callable[[Any], Any]]:
    batch = next(batches)
    seed_micro_batch(seed, batch.first_sample)
    output = model(batch.tokens, batch.positions, None, labels=batch.labels)
    # On other stages than the last nobody calls it, and there is no mask.
    return output, functools.partial(_sum_loss, batch.mask)  # type: ignore[arg-type]


def _sum_loss(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum for the gradient, tokens to divide it by, and a row for the log (megatron scales the sum in place)."""
    total, tokens = (losses.float() * mask).sum(), mask.sum()
    row = torch.stack([(losses.detach().double() * mask).sum(), tokens.double()])
    return total, tokens.to(torch.int), row


def _mean_loss(rows: list[torch.Tensor]) -> float:
    """Over all tokens of the global batch, on every rank: reduced on the last stage, then told to the others."""
    from megatron.core import parallel_state as ranks

    total = torch.stack(rows).sum(0) if rows else torch.zeros(2, dtype=torch.float64, device=device())
    if ranks.is_pipeline_last_stage():
        dist.all_reduce(total, group=ranks.get_data_parallel_group())
    if ranks.get_pipeline_model_parallel_world_size() > 1:
        group = ranks.get_pipeline_model_parallel_group()
        dist.broadcast(total, src=ranks.get_pipeline_model_parallel_last_rank(), group=group)
    loss, tokens = total.tolist()
    return loss / tokens if tokens else 0.0
