"""Loading a checkpoint of any layout into the live tensors of this one, without communication until the last step."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from starcoder_trainer.contract.assignment import CheckpointRef
from starcoder_trainer.contract.config import TrainingConfig
from starcoder_trainer.contract.ledger import checkpoint_prefix
from starcoder_trainer.optimizer import Optimizer
from starcoder_trainer.storage.store import ObjectStore

from .common import Position, position_of
from .index import Index
from .live import LivePiece, live_pieces
from .local_copies import LocalCopies
from .names import TensorName
from .placement import place, window
from .reading import Read, read_all

log = logging.getLogger(__name__)

_BATCH_BYTES = 512 << 20
"""Host memory for what can't be read straight into place (other tensor parallelism, or a GPU)."""

_Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class _Step:
    """Fill one live piece: reads, then a copy from where they went."""

    reads: tuple[Read, ...]
    staged_bytes: int
    finish: Callable[[], None]


def load(
    config: TrainingConfig,
    model: Any,
    optimizer: Optimizer,
    store: ObjectStore,
    checkpoint: CheckpointRef,
    *,
    index: Index,
    scratch: Path,
) -> Position:
    """Fill the optimizer's state and the model's weights. Every rank calls it; the weights are gathered at the end.

    Checksums of the files were compared when the checkpoint was committed; ranged reads can't repeat that.

    Args:
        index: of `checkpoint`, by `read_index`, which has checked the manifest's digest.
        scratch: where workers of this Pod save; what is there of the checkpoint is not read from the store.

    Raises:
        StorageError: something can't be read.
        ConfigurationError: the checkpoint is of another model, or lacks elements; the message names the tensor.
    """
    position = position_of(index.common, config)
    prefix = checkpoint_prefix(checkpoint.attempt, checkpoint.step)
    with contextlib.closing(
        LocalCopies(
            scratch, checkpoint, index.files, lambda file, start, n: store.get_range(f"{prefix}/{file}", start, n)
        )
    ) as copies:
        fetched = fill(live_pieces(model, optimizer), index, copies.get_range)
    log.info("read %d bytes, %d of them from local disk", fetched, copies.local_bytes)
    optimizer.steps = position.optimizer_step
    optimizer.publish_masters()
    return position


def fill(pieces: Sequence[LivePiece], index: Index, get_range: Callable[[str, int, int], bytes]) -> int:
    """Fill live tensors from any layout's pieces. Returns bytes fetched."""
    steps = [_plan(piece, index) for piece in pieces]  # all checks come before the first read
    fetched = 0
    for batch in _batches(steps):
        fetched += read_all(get_range, (read for step in batch for read in step.reads))
        for step in batch:
            step.finish()
    return fetched


def _batches(steps: Sequence[Callable[[], _Step]]) -> Iterator[list[_Step]]:
    batch: list[_Step] = []
    for make in steps:
        batch.append(make())
        if sum(s.staged_bytes for s in batch) >= _BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def _plan(piece: LivePiece, index: Index) -> Callable[[], _Step]:
    boxes = index.boxes_of(piece.name.state, piece.name.parameter, piece.global_shape)
    if piece.name in boxes:
        return lambda: _same_place(piece, index)
    return lambda: _other_place(piece, index, boxes)


def _same_place(piece: LivePiece, index: Index) -> _Step:
    """The model-parallel position is an old one: ranges of one tensor, whatever the data parallelism was."""
    on_host = piece.data.device.type == "cpu"
    values: _Floats = piece.data.numpy() if on_host else np.empty(piece.data.numel(), np.float32)
    reads = tuple(_reads(index, piece.name, piece.start, values))
    if on_host:
        return _Step(reads, 0, lambda: None)
    return _Step(reads, values.nbytes, lambda: _copy(values, piece.data))


def _other_place(piece: LivePiece, index: Index, boxes: tuple[TensorName, ...]) -> _Step:
    """Tensor parallelism was another: rows of each old tensor that touch the range, then their part of each."""
    target = window(piece.name, piece.start, piece.data.numel())
    placements = [p for box in boxes if (p := place(target.box, box)) is not None]
    buffers = [np.empty(p.count, np.float32) for p in placements]
    reads = tuple(
        read for p, buffer in zip(placements, buffers, strict=True) for read in _reads(index, p.source, p.start, buffer)
    )

    def finish() -> None:
        assembled = np.empty(target.box.shape, np.float32)
        for p, buffer in zip(placements, buffers, strict=True):
            assembled[p.put] = buffer.reshape(p.rows)[p.take]
        _copy(assembled.reshape(-1)[target.skip : target.skip + target.count], piece.data)

    return _Step(reads, sum(b.nbytes for b in buffers), finish)


def _reads(index: Index, name: TensorName, start: int, into: _Floats) -> Iterator[Read]:
    """Elements [start, start + len(into)) of a checkpoint's tensor, piece by piece."""
    stop = start + len(into)
    for old in index.tensors[name]:
        low, high = max(start, old.start), min(stop, old.start + old.count)
        if low < high:
            yield Read(old.file, old.offset + (low - old.start) * into.itemsize, into[low - start : high - start])


def _copy(values: _Floats, into: torch.Tensor) -> None:
    with torch.no_grad():
        into.copy_(torch.from_numpy(np.ascontiguousarray(values)))
