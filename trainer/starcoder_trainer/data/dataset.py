"""The training set: sample i as a function of seed, i and the data, whoever asks and in whatever order."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from starcoder_trainer.contract.config import FimConfig, TrainingConfig
from starcoder_trainer.failures import ConfigurationError
from starcoder_trainer.storage.file import FileStore
from starcoder_trainer.storage.store import ObjectStore

from .chunks import ChunkedObject
from .draws import uniform
from .errors import DataInvalid
from .fim import fill_in_the_middle
from .order import Order
from .preflight import examine
from .prepared import TOKENS
from .read_ahead import ReadAhead
from .source import Corpus
from .special_tokens import FIM_PAD
from .tokenizer import CodeTokenizer

ENV_CACHE_BYTES = "STARCODER_DATA_CACHE_BYTES"
"""Of local disk for token files, a Pod; 0 for none."""
CACHE_BYTES = 8 << 30

Tokens = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Sample:
    tokens: Tokens
    """`[s + 1]`: inputs and, shifted by one, labels."""
    loss_mask: np.ndarray[Any, np.dtype[np.float32]]
    """`[s]`: 0 where the label is padding."""


class TokenStream(Protocol):
    def read(self, start: int, length: int) -> bytes:
        """Bytes [start, start + length) of a `.bin`."""


@dataclass(frozen=True)
class Source:
    uri: str
    corpus: Corpus
    stream: TokenStream


class Dataset:
    """Thread-safe."""

    def __init__(
        self,
        sources: Sequence[Source],
        order: Order,
        *,
        sequence_length: int,
        vocab_size: int,
        seed: int,
        fim: FimConfig,
        tokenizer: CodeTokenizer | None,
    ) -> None:
        """`tokenizer`: of fill-in-the-middle; None where `fim.rate` is 0."""
        self._sources = tuple(sources)
        self._order = order
        self._length = sequence_length
        self._vocab_size = vocab_size
        self._seed = seed
        self._fim = fim
        self._tokenizer = tokenizer

    def sample(self, i: int) -> Sample:
        """Raises:
        DataInvalid: a token is beyond the vocabulary.
        DataNotFound: the data is gone.
        StorageError: the store gave up.
        """
        place = self._order.place(i)
        tokens = self._window(self._sources[place.source], place.window)
        mask = np.ones(self._length, np.float32)
        if self._tokenizer is None:
            return Sample(tokens, mask)
        changed = fill_in_the_middle(tokens, self._fim, self._tokenizer, uniform("fim", self._seed, i))
        size = self._length + 1
        tokens = np.full(size, self._tokenizer.id(FIM_PAD), np.int64)
        tokens[: changed.size] = changed[:size]
        # Labels are one to the left of their tokens.
        mask[max(changed.size - 1, 0) :] = 0.0
        return Sample(tokens, mask)

    def _window(self, source: Source, window: int) -> Tokens:
        """One token more than the sequence: the last label is the next window's first input."""
        item = source.corpus.item_bytes
        data = source.stream.read(window * self._length * item, (self._length + 1) * item)
        tokens = np.frombuffer(data, np.dtype(source.corpus.prepared.dtype).newbyteorder("<")).astype(np.int64)
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise DataInvalid(
                f"{source.uri}/{TOKENS}: found token {tokens.max()} in window {window} (bytes from "
                f"{window * self._length * item}), expected 0 to {self._vocab_size - 1}; the file is broken: run "
                "starcoder-trainer prepare again"
            )
        return tokens


def open_dataset(config: TrainingConfig, open_uri: Callable[[str], ObjectStore], cache: Path) -> ReadAhead[Sample]:
    """The run's samples. Of `cache`, a folder for all ranks of a Pod, at most `STARCODER_DATA_CACHE_BYTES` are used.

    Raises:
        DataError: as the preflight check says it.
        StorageError: the store can't be asked.
    """
    vocabulary, corpora = examine(config, open_uri)
    data, total = config.data, sum(corpus.size for corpus in corpora)
    budget = _cache_bytes()
    sources = []
    for named, corpus in zip(data.sources, corpora, strict=True):
        store = open_uri(named.uri)
        share = 0 if isinstance(store, FileStore) else _share(budget, corpus.size, total)
        stream = ChunkedObject(store, TOKENS, size=corpus.size, version=corpus.version, cache=cache, cache_bytes=share)
        sources.append(Source(named.uri, corpus, stream))
    dataset = Dataset(
        sources,
        Order([s.weight for s in data.sources], [c.windows for c in corpora], data.seed),
        sequence_length=data.sequence_length,
        vocab_size=config.model.vocab_size,
        seed=data.seed,
        fim=data.fim,
        tokenizer=CodeTokenizer(vocabulary) if data.fim.rate > 0 else None,
    )
    batch = config.training.global_batch_size
    return ReadAhead(dataset, stride=batch, end=config.training.iterations * batch)


def _share(budget: int, size: int, total: int) -> int:
    """All of it where everything fits, else in proportion to size."""
    return size if total <= budget else budget * size // total


def _cache_bytes() -> int:
    said = os.environ.get(ENV_CACHE_BYTES, str(CACHE_BYTES))
    if not said.isdecimal():
        raise ConfigurationError(f"{ENV_CACHE_BYTES}: found {said!r}, expected a number of bytes, 0 for no cache")
    return int(said)
