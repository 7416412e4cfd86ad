"""Which elements of an old layout's tensor belong where in a new layout's range. Pure arithmetic over boxes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .names import TensorName


@dataclass(frozen=True)
class Window:
    """The whole rows (first axis) of a local tensor that a flat range [start, stop) of it touches."""

    box: TensorName
    """Those rows as a box of the whole parameter."""
    skip: int
    """Elements of the window before the range."""
    count: int


@dataclass(frozen=True)
class Placement:
    """Part of an old tensor that a window needs."""

    source: TensorName
    start: int
    count: int
    """Elements [start, start + count) of the flattened source: whole rows, so that they are one range to read."""
    rows: tuple[int, ...]
    """Shape of what is read."""
    take: tuple[slice, ...]
    """What of it is needed."""
    put: tuple[slice, ...]
    """Where that goes in the window."""


def window(name: TensorName, start: int, count: int) -> Window:
    """Of elements [start, start + count) of the flattened tensor `name`."""
    row = math.prod(name.shape[1:])
    first, last = start // row, math.ceil((start + count) / row)
    box = TensorName(
        name.state, name.parameter, (name.offset[0] + first, *name.offset[1:]), (last - first, *name.shape[1:])
    )
    return Window(box, start - first * row, count)


def place(target: TensorName, source: TensorName) -> Placement | None:
    """None where the boxes have nothing in common."""
    lows = [max(a, b) for a, b in zip(target.offset, source.offset, strict=True)]
    highs = [
        min(a + n, b + m) for a, n, b, m in zip(target.offset, target.shape, source.offset, source.shape, strict=True)
    ]
    if any(low >= high for low, high in zip(lows, highs, strict=True)):
        return None
    row = math.prod(source.shape[1:])
    first = lows[0] - source.offset[0]
    height = highs[0] - lows[0]
    take = [slice(low - o, high - o) for low, high, o in zip(lows, highs, source.offset, strict=True)]
    return Placement(
        source,
        first * row,
        height * row,
        (height, *source.shape[1:]),
        (slice(0, height), *take[1:]),
        tuple(slice(low - o, high - o) for low, high, o in zip(lows, highs, target.offset, strict=True)),
    )
