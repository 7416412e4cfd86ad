"""Many small pieces by few large ranged reads, in parallel, straight into their destinations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

BLOCK_BYTES = 32 << 20
GAP_BYTES = 256 << 10
"""Shorter gaps are read and dropped: that costs less than another request."""
THREADS = 8


@dataclass(frozen=True, eq=False)
class Read:
    """Bytes of `file` from `offset` on that fill `into`."""

    file: str
    offset: int
    into: np.ndarray[Any, np.dtype[np.float32]]
    """Contiguous."""

    @property
    def end(self) -> int:
        return self.offset + self.into.nbytes


@dataclass(frozen=True)
class Block:
    """One request."""

    file: str
    start: int
    end: int
    reads: tuple[Read, ...]


def blocks(reads: Iterable[Read]) -> Iterator[Block]:
    """Neighbours together, at most BLOCK_BYTES a block; a large read is spread over several."""
    run: list[Read] = []
    for read in sorted((r for r in reads if r.into.nbytes), key=lambda r: (r.file, r.offset)):
        if run and (read.file != run[0].file or read.offset > run[-1].end + GAP_BYTES):
            yield from _cut(run)
            run = []
        run.append(read)
    if run:
        yield from _cut(run)


def _cut(run: list[Read]) -> Iterator[Block]:
    first, last = run[0].offset, max(r.end for r in run)
    for start in range(first, last, BLOCK_BYTES):
        end = min(start + BLOCK_BYTES, last)
        yield Block(run[0].file, start, end, tuple(r for r in run if r.offset < end and r.end > start))


def read_all(get_range: Callable[[str, int, int], bytes], reads: Iterable[Read]) -> int:
    """Fill all destinations; `get_range(file, start, length)` is called from several threads. Returns bytes fetched.

    Raises:
        what `get_range` raises first.
    """

    def fetch(block: Block) -> int:
        data = np.frombuffer(get_range(block.file, block.start, block.end - block.start), np.uint8)
        for read in block.reads:
            low, high = max(read.offset, block.start), min(read.end, block.end)
            into = read.into.view(np.uint8)
            into[low - read.offset : high - read.offset] = data[low - block.start : high - block.start]
        return len(data)

    with ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-read") as pool:
        return sum(pool.map(fetch, blocks(reads)))
