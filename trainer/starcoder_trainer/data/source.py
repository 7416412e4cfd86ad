"""One prepared corpus: its token file, found whole and in agreement with tokenizer and sample length."""

from __future__ import annotations

from dataclasses import dataclass

from starcoder_trainer.storage.store import NotFound, ObjectStore, Stat

from .errors import DataInvalid, DataNotFound, TokenizerMismatch
from .index import HEADER_BYTES, ITEM_BYTES, Header, read_header
from .prepared import INDEX, PREPARED, TOKENS, Prepared, read_prepared
from .vocabulary import Vocabulary


@dataclass(frozen=True)
class Corpus:
    prepared: Prepared
    version: str
    """Of tokens.bin in its store."""
    windows: int
    """Samples an epoch."""

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.prepared.dtype]

    @property
    def size(self) -> int:
        """Of tokens.bin, bytes."""
        return self.prepared.tokens * self.item_bytes


def inspect(store: ObjectStore, vocabulary: Vocabulary, sequence_length: int) -> Corpus:
    """A few small requests, whatever the corpus' size.

    Raises:
        DataNotFound, DataInvalid, TokenizerMismatch
        StorageError: the store can't be asked.
    """
    try:
        data = store.get(PREPARED).data
    except NotFound as e:
        raise DataNotFound(
            f"{store.uri}: found no {PREPARED}, which starcoder-trainer prepare writes last; correct data.sources or "
            "run prepare to its end"
        ) from e
    prepared = read_prepared(data, f"{store.uri}/{PREPARED}")
    if prepared.tokenizer_sha256 != vocabulary.sha256:
        raise TokenizerMismatch(
            f"{store.uri}: its data was made with the tokenizer of SHA-256 {prepared.tokenizer_sha256[:16]}… "
            f"({prepared.vocab_size} entries), found {vocabulary.sha256[:16]}… ({vocabulary.size} entries) at "
            f"{vocabulary.name}; set data.tokenizer to {store.uri}/tokenizer.json, or prepare the data with "
            f"--tokenizer {vocabulary.name}"
        )
    try:
        index, tokens = store.stat(INDEX), store.stat(TOKENS)
        _require_size(store, index, Header(prepared.dtype, prepared.documents).index_bytes)
        header = read_header(store.get_range(INDEX, 0, HEADER_BYTES), f"{store.uri}/{INDEX}")
    except NotFound as e:
        raise DataNotFound(f"{store.uri}: found {PREPARED} but not all it describes ({e}); run prepare again") from e
    if (header.dtype, header.documents) != (prepared.dtype, prepared.documents):
        raise DataInvalid(
            f"{store.uri}/{INDEX}: found {header.documents} documents of {header.dtype}, {PREPARED} says "
            f"{prepared.documents} of {prepared.dtype}; run starcoder-trainer prepare again"
        )
    windows = (prepared.tokens - 1) // sequence_length
    if windows < 1:
        raise DataInvalid(
            f"{store.uri}: found {prepared.tokens} tokens, expected at least {sequence_length + 1}: "
            f"data.sequenceLength ({sequence_length}) and one more for the last label; prepare more data or set a "
            "shorter sequenceLength"
        )
    corpus = Corpus(prepared, tokens.version, windows)
    _require_size(store, tokens, corpus.size)
    return corpus


def _require_size(store: ObjectStore, found: Stat, expected: int) -> None:
    if found.size != expected:
        raise DataInvalid(
            f"{store.uri}/{found.key}: found {found.size} bytes, expected {expected}: it is cut short or of another "
            "preparation; run starcoder-trainer prepare again"
        )
