"""One rank's part of a checkpoint on its local disk: a safetensors file, then the manifest that makes it count."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from starcoder_trainer.contract.ledger import Piece, RankManifest

from .live import LivePiece

_ITEM_BYTES = 4


def directory_of(scratch: Path, attempt: int, step: int) -> Path:
    return scratch / "checkpoints" / f"a{attempt}" / f"step-{step:08d}"


def save(
    directory: Path, pieces: Sequence[LivePiece], *, attempt: int, step: int, rank: int, common: dict[str, str]
) -> int:
    """Write `rank-<rank>.safetensors` and then `rank-<rank>.json`; both are on disk when this returns.

    Of replicated parameters only the main copy is written. Returns bytes written.

    Raises:
        OSError: the disk is full or not writable; no manifest is left then.
    """
    directory.mkdir(parents=True, exist_ok=True)
    own = [p for p in pieces if p.saved]
    data_file = directory / f"rank-{rank:05d}.safetensors"
    header, offsets = _header(own)
    with _atomic(data_file) as f:
        f.write(header)
        for piece in own:
            f.write(memoryview(piece.data.cpu().numpy()).cast("B"))
    manifest = RankManifest(
        attempt=attempt,
        step=step,
        rank=rank,
        files=(data_file.name,),
        pieces=tuple(
            Piece(
                tensor=str(p.name),
                dtype="float32",
                total=p.name.elements,
                start=p.start,
                count=p.data.numel(),
                file=data_file.name,
                offset=offset,
            )
            for p, offset in zip(own, offsets, strict=True)
        ),
        common=common,
    )
    text = manifest.to_json().encode()
    with _atomic(directory / f"rank-{rank:05d}.json") as f:
        f.write(text)
    return data_file.stat().st_size + len(text)


def _header(pieces: Sequence[LivePiece]) -> tuple[bytes, list[int]]:
    """The safetensors header, and each piece's offset in the file. Written here because the library wants all tensors
    in host memory at once and does not tell offsets."""
    entries: dict[str, object] = {}
    starts, position = [], 0
    for p in pieces:
        starts.append(position)
        end = position + p.data.numel() * _ITEM_BYTES
        entries[str(p.name)] = {"dtype": "F32", "shape": [p.data.numel()], "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return struct.pack("<Q", len(text)) + text, [8 + len(text) + start for start in starts]


@contextlib.contextmanager
def _atomic(path: Path) -> Iterator[IO[bytes]]:
    """Under a temporary name until it is whole and on disk."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    partial.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
