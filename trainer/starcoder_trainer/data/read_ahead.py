"""Samples of the next iteration are made while this one trains: reading and FIM leave the critical path.

A guess only. Whoever asks for sample i is, one global batch later, most likely to ask for sample i + batch.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

THREADS = 4
"""Reads wait for the network, and the tokenizer works without the interpreter's lock."""


class Samples[S](Protocol):
    def sample(self, i: int) -> S: ...


class ReadAhead[S]:
    """For one asking thread."""

    def __init__(self, samples: Samples[S], stride: int, end: int) -> None:
        """Nothing from sample `end` on is made before it is asked for."""
        self._samples = samples
        self._stride = stride
        self._end = end
        self._threads = ThreadPoolExecutor(THREADS, "samples")
        self._coming: dict[int, Future[S]] = {}

    def sample(self, i: int) -> S:
        coming = self._coming.pop(i, None)
        found = self._samples.sample(i) if coming is None else coming.result()
        following = i + self._stride
        # An error of a guess is raised when that sample is asked for. Guesses that nobody takes up end the guessing.
        if following < self._end and following not in self._coming and len(self._coming) < self._stride:
            self._coming[following] = self._threads.submit(self._samples.sample, following)
        return found
