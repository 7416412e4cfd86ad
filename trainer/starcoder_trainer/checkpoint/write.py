"""One rank's part of a checkpoint of a training that stands between two iterations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from starcoder_trainer.contract.assignment import Layout

from .common import Position, describe
from .live import live_pieces
from .save import directory_of, save

if TYPE_CHECKING:
    from starcoder_trainer.loop import Training


def write(training: Training, layout: Layout, *, attempt: int, rank: int, scratch: Path) -> tuple[Path, int]:
    """Saves to local disk. Returns the folder and its size in bytes."""
    directory = directory_of(scratch, attempt, training.iteration)
    position = Position(training.iteration, training.consumed_samples, training.optimizer.steps)
    size = save(
        directory,
        live_pieces(training.model, training.optimizer),
        attempt=attempt,
        step=training.iteration,
        rank=rank,
        common=describe(training.config, layout, position),
    )
    return directory, size
