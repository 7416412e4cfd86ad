"""Whatever the old and the new layout, each new range is filled with the elements that belong there."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from starcoder_trainer.checkpoint import reading
from starcoder_trainer.checkpoint.cover import check_pieces
from starcoder_trainer.checkpoint.index import index_pieces
from starcoder_trainer.checkpoint.live import LivePiece
from starcoder_trainer.checkpoint.load import fill
from starcoder_trainer.checkpoint.names import TensorName
from starcoder_trainer.contract.ledger import Piece

NAME = "w"


@dataclass(frozen=True)
class Split:
    """How one parameter lies over ranks: cut along an axis, and the flat parts into ranges."""

    boxes: tuple[TensorName, ...]
    ranges: tuple[tuple[tuple[int, int], ...], ...]
    """Of each box: (start, stop)."""


@st.composite
def splits(draw: st.DrawFn, shape: tuple[int, ...]) -> Split:
    axis = draw(st.integers(0, len(shape) - 1))
    cuts = sorted(draw(st.sets(st.integers(1, shape[axis]), max_size=4)) | {0, shape[axis]})
    boxes, ranges = [], []
    for low, high in itertools.pairwise(cuts):
        offset = tuple(low if a == axis else 0 for a in range(len(shape)))
        box = TensorName("param", NAME, offset, tuple(high - low if a == axis else n for a, n in enumerate(shape)))
        inner = sorted(draw(st.sets(st.integers(1, box.elements), max_size=3)) | {0, box.elements})
        boxes.append(box)
        ranges.append(tuple(itertools.pairwise(inner)))
    return Split(tuple(boxes), tuple(ranges))


def part(values: np.ndarray, box: TensorName) -> np.ndarray:
    return values[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))].reshape(-1)


@given(st.data(), st.lists(st.integers(1, 7), min_size=1, max_size=2))
def test_any_split_is_loaded_from_any_other(data: st.DataObject, axes: list[int]) -> None:
    shape = tuple(axes)
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    old, new = data.draw(splits(shape), label="old"), data.draw(splits(shape), label="new")
    files: dict[str, bytes] = {}
    pieces = []
    for b, (box, ranges) in enumerate(zip(old.boxes, old.ranges, strict=True)):
        for r, (low, high) in enumerate(ranges):
            file, padding = f"rank-{b}-{r}", bytes(8 * r)  # as the header does, it shifts the data
            files[file] = padding + part(values, box)[low:high].tobytes()
            pieces.append(Piece(str(box), "float32", box.elements, low, high - low, file, len(padding)))
    check_pieces(pieces, {name: len(content) for name, content in files.items()})
    live = [
        LivePiece(box, shape, low, torch.full((high - low,), -1.0), True)
        for box, ranges in zip(new.boxes, new.ranges, strict=True)
        for low, high in ranges
    ]
    fill(live, index_pieces(pieces, {}), lambda file, start, n: files[file][start : start + n])
    for piece in live:
        expected = part(values, piece.name)[piece.start : piece.start + piece.data.numel()]
        np.testing.assert_array_equal(piece.data.numpy(), expected)


@given(
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 300)), max_size=12),
    st.integers(4, 500),
    st.integers(0, 100),
)
def test_reads_are_filled_by_blocks_of_bounded_size(asked: list[tuple[int, int]], block: int, gap: int) -> None:
    content = hashlib.shake_256(b"file").digest(12_000)
    reads = [reading.Read("f", 4 * start, np.zeros(count, np.float32)) for start, count in asked]
    fetched: list[int] = []

    def get_range(file: str, start: int, length: int) -> bytes:
        fetched.append(length)
        return content[start : start + length]

    before = reading.BLOCK_BYTES, reading.GAP_BYTES
    reading.BLOCK_BYTES, reading.GAP_BYTES = block, gap
    try:
        total = reading.read_all(get_range, reads)
    finally:
        reading.BLOCK_BYTES, reading.GAP_BYTES = before
    assert total == sum(fetched)
    assert all(0 < length <= block for length in fetched)
    for read in reads:
        assert read.into.tobytes() == content[read.offset : read.end]
