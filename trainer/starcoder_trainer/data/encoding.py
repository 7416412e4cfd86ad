"""Source files to tokens on all cores, in the order given: how many processes do it makes no difference."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from .children import deaf_to_interrupts, enter_child
from .code_format import Repository, as_document
from .index import DType
from .source_files import Skipped, SourceFile, read_text
from .special_tokens import END_OF_TEXT
from .tokenizer import CodeTokenizer
from .vocabulary import Vocabulary

BATCH_BYTES = 256 << 10
"""Of source files in a task: part of a second, so that Ctrl-C is answered soon; it waits for the tasks begun."""
BATCH_FILES = 256
TASKS_A_PROCESS = 8
"""Waiting or done but not yet written, which bounds memory."""


@dataclass(frozen=True)
class Encoding:
    """What each process needs."""

    root: Path
    vocabulary: Vocabulary
    repository: Repository
    seed: int
    dtype: DType


@dataclass
class Encoded:
    """Some files, in order."""

    tokens: bytes
    """Little-endian."""
    lengths: list[int]
    """Tokens of each document, with its end."""
    bytes_taken: int = 0
    bytes_seen: int = 0
    """As sized when found: what progress counts."""
    skipped: Counter[Skipped] = field(default_factory=Counter)


def encode_files(encoding: Encoding, files: Sequence[SourceFile], workers: int) -> Iterator[Encoded]:
    """By `workers` processes; with one, by this one.

    Raises:
        BrokenProcessPool: a process died, e.g. for want of memory.
    """
    batches = _batches(files)
    if workers == 1:
        tokenizer = CodeTokenizer(encoding.vocabulary)
        for batch in batches:
            yield encode(batch, encoding, tokenizer)
        return
    waiting: deque[Future[Encoded]] = deque()
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _enter, (encoding, os.getpid()))

    def submit() -> None:
        batch = next(batches, None)
        if batch is not None:
            with deaf_to_interrupts():  # a task may start a process
                waiting.append(pool.submit(_encode, batch))

    try:
        for _ in range(TASKS_A_PROCESS * workers):
            submit()
        while waiting:
            yield waiting.popleft().result()
            submit()
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(files: Sequence[SourceFile]) -> Iterator[list[SourceFile]]:
    batch: list[SourceFile] = []
    size = 0
    for file in files:
        batch.append(file)
        size += file.size
        if size >= BATCH_BYTES or len(batch) >= BATCH_FILES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(files: Sequence[SourceFile], encoding: Encoding, tokenizer: CodeTokenizer) -> Encoded:
    end = tokenizer.id(END_OF_TEXT)
    documents: list[list[int]] = []
    encoded = Encoded(b"", [])
    for file in files:
        encoded.bytes_seen += file.size
        match read_text(encoding.root, file):
            case Skipped() as reason:
                encoded.skipped[reason] += 1
            case text:
                document = as_document(text, file.path, encoding.repository, encoding.seed, tokenizer)
                documents.append([*tokenizer.encode_fragment(document), end])
                encoded.bytes_taken += len(text.encode())
    encoded.lengths = [len(d) for d in documents]
    tokens = np.fromiter(chain.from_iterable(documents), np.dtype(encoding.dtype), sum(encoded.lengths))
    encoded.tokens = tokens.astype(tokens.dtype.newbyteorder("<")).tobytes()
    return encoded


# In each process of the pool

_here: tuple[Encoding, CodeTokenizer] | None = None


def _enter(encoding: Encoding, parent: int) -> None:
    global _here  # noqa: PLW0603 - the only way into a pool's process
    enter_child(parent, tokenizer_threads=1)  # the processes are the parallelism
    _here = encoding, CodeTokenizer(encoding.vocabulary)


def _encode(files: Sequence[SourceFile]) -> Encoded:
    assert _here is not None
    return encode(files, *_here)
