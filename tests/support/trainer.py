"""Small training runs for tests: a configuration, samples that need no files, and ranks in processes of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from starcoder_trainer.agent.ledger import Claimed, Committed, Ledger, reference
from starcoder_trainer.agent.messages import Upload
from starcoder_trainer.agent.upload import upload_shard
from starcoder_trainer.contract.assignment import CheckpointRef, Layout
from starcoder_trainer.contract.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelismConfig,
    RunIdentity,
    ScheduleConfig,
    SourceConfig,
    StorageConfig,
    TrainingConfig,
)
from starcoder_trainer.contract.worker import Saved
from starcoder_trainer.environment import set_environment
from starcoder_trainer.storage.open import open_store

ONE = Layout(1, 1, 1)
RUN = RunIdentity("tiny", "default", "11111111-2222-3333-4444-555555555555")
RANKS_TIMEOUT = 240.0


def make_config(
    layout: Layout = ONE,
    *,
    iterations: int = 4,
    global_batch: int = 6,
    micro_batch: int = 1,
    sequence_length: int = 48,
    precision: str = "fp32",
    dropout: float = 0.0,
    query_groups: int = 1,
    layers: int = 2,
    hidden_size: int = 48,
    vocab_size: int = 100,
    every_iterations: int = 2,
    checkpoint_uri: str = "file:///nowhere",
    seed: int = 7,
    attention_backend: str = "auto",
) -> TrainingConfig:
    """A model of odd sizes that divides by two tensor ranks and two stages."""
    return TrainingConfig(
        run=RUN,
        model=ModelConfig(
            preset="starcoder-tiny",
            layers=layers,
            hidden_size=hidden_size,
            ffn_hidden_size=hidden_size * 3,
            attention_heads=4,
            query_groups=query_groups,
            head_dim=hidden_size // 4,
            vocab_size=vocab_size,
            init_std=0.05,
            dropout=dropout,
            max_sequence_length=sequence_length,
        ),
        data=DataConfig("file:///nowhere", (SourceConfig("file:///nowhere", 1.0),), sequence_length, seed),
        training=ScheduleConfig(
            iterations,
            global_batch,
            micro_batch,
            precision,  # type: ignore[arg-type]
            OptimizerConfig(1e-3, 1e-4, 2, 0.9, 0.95, 1e-8, 0.1, 1.0),
            attention_backend,  # type: ignore[arg-type]
        ),
        parallelism=ParallelismConfig(layout.tensor, layout.pipeline, layout.sequence),
        checkpoint=CheckpointConfig(checkpoint_uri, every_iterations, 2),
        storage=StorageConfig(),
    )


@dataclass(frozen=True)
class WalkSample:
    tokens: np.ndarray[Any, np.dtype[np.int64]]
    loss_mask: np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Walks:
    """Sequences that step through the vocabulary by a constant, so that a model learns them; some are cut short."""

    vocab_size: int
    sequence_length: int

    def sample(self, i: int) -> WalkSample:
        rng = np.random.default_rng(i)
        start, stride = rng.integers(0, self.vocab_size), rng.integers(1, 4)
        tokens = (start + stride * np.arange(self.sequence_length + 1, dtype=np.int64)) % self.vocab_size
        mask = np.zeros(self.sequence_length, np.float32)
        mask[: rng.integers(self.sequence_length // 4, self.sequence_length + 1)] = 1.0
        return WalkSample(tokens, mask)


def walks_for(config: TrainingConfig) -> Walks:
    return Walks(config.model.vocab_size, config.data.sequence_length)


def listen() -> socket.socket:
    """A listening socket on a free loopback port, as the leader's agent binds it."""
    s = socket.socket()
    s.bind(("127.0.0.1", 0))
    s.listen(128)
    return s


class RankFailed(AssertionError):
    pass


_context = multiprocessing.get_context("forkserver")


def run_ranks(layout: Layout, work: Callable[..., Any], *args: Any) -> list[Any]:
    """`work(*args)` on each rank of a formed gang, in processes; its results in rank order.

    Raises:
        RankFailed: with the traceback of the first rank that raised or died.
    """
    set_environment()  # the server inherits it
    _context.set_forkserver_preload(["starcoder_trainer.preload"])
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(listen())
        port = master.getsockname()[1]
        pipes, processes = [], []
        for rank in range(layout.world_size):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank,
                args=(theirs, rank, layout, port, master if rank == 0 else None, work, args),
                daemon=True,
            )
            process.start()
            theirs.close()
            stack.callback(process.join)
            stack.callback(process.kill)
            pipes.append(ours)
            processes.append(process)
        results: dict[int, Any] = {}
        while len(results) < layout.world_size:
            waiting = [p for r, p in enumerate(pipes) if r not in results]
            ready = multiprocessing.connection.wait(waiting, RANKS_TIMEOUT)
            if not ready:
                raise RankFailed(f"ranks {sorted(set(range(layout.world_size)) - set(results))} gave no answer")
            for pipe in ready:
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    ok, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    raise RankFailed(f"rank {rank} died without an answer") from None
                if not ok:
                    raise RankFailed(f"rank {rank}:\n{value}")
                results[rank] = value
        return [results[r] for r in range(layout.world_size)]


def _rank(
    pipe: Any, rank: int, layout: Layout, port: int, master: socket.socket | None, work: Callable[..., Any], args: Any
) -> None:
    from starcoder_trainer.devices import take_device
    from starcoder_trainer.model import cpu
    from starcoder_trainer.process_group import Meeting, form

    try:
        backend = take_device(rank)
        cpu.prepare()
        fd = os.dup(master.fileno()) if master is not None else None
        form(Meeting(rank, layout, "127.0.0.1", port, f"test-{port}", "127.0.0.1", fd), 60.0, backend)
        pipe.send((True, work(*args)))
        pipe.recv()  # the parent kills us: nobody leaves while others are in a collective
    except EOFError:
        pass
    except BaseException:
        pipe.send((False, traceback.format_exc()[-3000:]))


def losses(config: TrainingConfig, iterations: int | None = None) -> list[float]:
    """Work for `run_ranks`: train from scratch, return the loss of each iteration."""
    return [done.loss for done in steps(config, iterations)]


def steps(config: TrainingConfig, iterations: int | None = None) -> list[Any]:
    from starcoder_trainer.assemble import assemble
    from starcoder_trainer.loop import Training, train

    model, optimizer = assemble(config, fresh=True)
    training = Training(config, model, optimizer, walks_for(config))
    if iterations is not None:
        training.config = dataclasses.replace(
            config, training=dataclasses.replace(config.training, iterations=iterations)
        )
    done: list[Any] = []
    train(training, done.append, lambda _last: None)
    return done


def masters(config: TrainingConfig) -> dict[str, Any]:
    """Work for `run_ranks`: what the initial model and optimizer of this rank are made of."""
    from starcoder_trainer.assemble import assemble
    from starcoder_trainer.checkpoint.live import live_pieces
    from starcoder_trainer.model.transformer import unwrap

    model, optimizer = assemble(config, fresh=True)
    inner = unwrap(model)
    names = {id(p): n for n, p in inner.named_parameters()}
    decay: dict[str, float] = {}
    optimizer.step(1)
    for part in optimizer.parts:
        for group, models in zip(part.optimizer.param_groups, part.model_float16_groups or [], strict=False):
            decay |= {names[id(p)]: group["weight_decay"] for p in models}
        for group, models in zip(part.optimizer.param_groups, part.model_fp32_groups or [], strict=False):
            decay |= {names[id(p)]: group["weight_decay"] for p in models}
    return {
        "parameters": sum(p.numel() for p in inner.parameters()),
        "weights": {str(p.dtype) for p in inner.parameters()},
        "masters": {str(p.data.dtype) for p in live_pieces(model, optimizer)},
        "decay": decay,
    }


def collective_timeouts() -> tuple[Any, ...]:
    """Work for `run_ranks`: the time-outs of all process groups of this rank."""
    import torch
    from torch.distributed import distributed_c10d as c10d

    groups = c10d._world.pg_map
    return tuple({group._get_backend(torch.device("cpu")).options._timeout for group in groups})


def first_moment(config: TrainingConfig) -> tuple[float, float]:
    """Work for `run_ranks` on one rank: gradient norm of the first iteration, and norm of Adam's first moment then."""
    import torch

    from starcoder_trainer.assemble import assemble
    from starcoder_trainer.checkpoint.live import live_pieces
    from starcoder_trainer.loop import Training, step
    from starcoder_trainer.metrics import PhaseTimer

    model, optimizer = assemble(config, fresh=True)
    done = step(Training(config, model, optimizer, walks_for(config)), PhaseTimer())
    moments = [p.data for p in live_pieces(model, optimizer) if p.name.state == "exp_avg"]
    return done.grad_norm, torch.cat(moments).norm().item()


def commit(root: Path, attempt: int, step: int, world_size: int) -> CheckpointRef:
    """Upload what ranks saved under `root` as two members (one, for one rank) do, commit it and choose it: with the
    agents' own code, into the ledger `root/store`."""
    from starcoder_trainer.checkpoint.save import directory_of

    (root / "store").mkdir(exist_ok=True)
    store = open_store(store_uri(root), StorageConfig(), None, allow_file=True)
    ledger = Ledger(store, RUN, f"boot-{attempt}", 3, pause=lambda _: None)
    claimed = ledger.claim(attempt, "Own")
    assert isinstance(claimed, Claimed), claimed
    folder = directory_of(root, attempt, step)
    saved = [Saved(attempt, rank, step, str(folder), 0.0, 0) for rank in range(world_size)]
    half = max(1, world_size // 2)
    for member, ranks in enumerate([saved[:half], saved[half:]]):
        if ranks:
            upload_shard(store, member, Upload(attempt, step, world_size, tuple(ranks)))
    committed = ledger.commit(attempt, step)
    assert isinstance(committed, Committed), committed
    return reference(committed.entry)


def store_uri(root: Path) -> str:
    return f"file://{root / 'store'}"


def train_and_save(config: TrainingConfig, layout: Layout, scratch: Path, attempt: int = 1) -> list[float]:
    """Work for `run_ranks`: train from scratch, save when the configuration says, return the losses."""
    from starcoder_trainer.assemble import assemble

    model, optimizer = assemble(config, fresh=True)
    return _train_and_save(config, layout, scratch, attempt, model, optimizer, 0)


def resume(
    config: TrainingConfig, layout: Layout, scratch: Path, checkpoint: CheckpointRef, *, local: bool = False
) -> list[float]:
    """Work for `run_ranks`: load, train to the end, save when the configuration says, return the losses.

    Args:
        local: what `scratch` still holds of the checkpoint is not read from the store.
    """
    from starcoder_trainer.assemble import assemble
    from starcoder_trainer.checkpoint.index import read_index
    from starcoder_trainer.checkpoint.load import load

    model, optimizer = assemble(config, fresh=False)
    store = open_store(store_uri(scratch), config.storage, None, allow_file=True)
    disk = scratch if local else scratch / "of another Pod"
    position = load(config, model, optimizer, store, checkpoint, index=read_index(store, checkpoint), scratch=disk)
    return _train_and_save(config, layout, scratch, 2, model, optimizer, position.iteration)


def _train_and_save(
    config: TrainingConfig, layout: Layout, scratch: Path, attempt: int, model: Any, optimizer: Any, iteration: int
) -> list[float]:
    import torch.distributed as dist

    from starcoder_trainer.checkpoint.common import Position, describe
    from starcoder_trainer.checkpoint.live import live_pieces
    from starcoder_trainer.checkpoint.save import directory_of, save
    from starcoder_trainer.loop import Training, train

    training = Training(config, model, optimizer, walks_for(config), iteration)

    def save_now(_last: bool) -> None:
        save(
            directory_of(scratch, attempt, training.iteration),
            live_pieces(model, optimizer),
            attempt=attempt,
            step=training.iteration,
            rank=dist.get_rank(),
            common=describe(config, layout, Position(training.iteration, training.consumed_samples, optimizer.steps)),
        )

    done: list[Any] = []
    train(training, done.append, save_now)
    return [d.loss for d in done]
