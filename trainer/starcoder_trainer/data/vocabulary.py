"""What a `tokenizer.json` says about its vocabulary, without loading the tokenizer: agents ask this too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from starcoder_trainer.storage.open import split_uri
from starcoder_trainer.storage.store import NotFound, ObjectStore

from .errors import DataInvalid, DataNotFound, TokenizerMismatch


@dataclass(frozen=True)
class Vocabulary:
    name: str
    """Where it is from, for messages."""
    data: bytes = field(repr=False)
    """The file."""
    sha256: str
    size: int
    """Highest id + 1: the least entries of an embedding."""
    ids: dict[str, int] = field(repr=False)
    """Entry as the file spells it (byte-level BPE: one character a byte) -> id."""
    added: frozenset[int]
    """Ids that the BPE never makes: special tokens."""

    def missing(self, tokens: Iterable[str]) -> list[str]:
        return [t for t in tokens if t not in self.ids]


def fetch_vocabulary(uri: str, store: ObjectStore) -> Vocabulary:
    """The tokenizer at `uri`; `store` is that of its folder.

    Raises:
        DataNotFound, DataInvalid
        StorageError: the store can't be asked.
    """
    _, key = split_uri(uri)
    try:
        data = store.get(key).data
    except NotFound as e:
        raise DataNotFound(
            f"data.tokenizer: {e}; starcoder-trainer prepare writes it beside the data: correct the URI or run that"
        ) from e
    return read_vocabulary(data, uri)


def read_vocabulary(data: bytes, name: str) -> Vocabulary:
    """Raises DataInvalid where `data` is no byte-level BPE in the format of the tokenizers library."""
    expected = "expected the tokenizer.json of a byte-level BPE, as starcoder-trainer prepare writes it"
    try:
        document = json.loads(data)
        model, added = document["model"], {entry["content"]: int(entry["id"]) for entry in document["added_tokens"]}
        ids = {str(k): int(v) for k, v in model["vocab"].items()} | added
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise DataInvalid(f"{name}: found no tokenizer ({type(e).__name__}: {str(e)[:100]}), {expected}") from e
    if model.get("type") != "BPE" or not _has_byte_level(document.get("decoder")):
        raise DataInvalid(f"{name}: found a tokenizer of another kind ({model.get('type')}), {expected}")
    if not ids:
        raise DataInvalid(f"{name}: found an empty vocabulary, {expected}")
    return Vocabulary(
        name, data, hashlib.sha256(data).hexdigest(), max(ids.values()) + 1, ids, frozenset(added.values())
    )


def _has_byte_level(component: Any) -> bool:
    match component:
        case {"type": "ByteLevel"}:
            return True
        case {"type": "Sequence", "decoders": [*parts]}:
            return any(_has_byte_level(part) for part in parts)
    return False


def require_fits(vocabulary: Vocabulary, vocab_size: int) -> None:
    """Raises TokenizerMismatch where the model has fewer entries than the tokenizer."""
    if vocabulary.size > vocab_size:
        raise TokenizerMismatch(
            f"{vocabulary.name}: found {vocabulary.size} entries, model.vocabSize is {vocab_size}; set "
            f"model.vocabSize to {vocabulary.size} or more, or prepare the data with --vocab-size {vocab_size}"
        )


def require_tokens(vocabulary: Vocabulary, tokens: Iterable[str], what_for: str) -> None:
    """Raises TokenizerMismatch where special tokens are missing; `what_for` ends the sentence with what to do."""
    if missing := vocabulary.missing(tokens):
        raise TokenizerMismatch(f"{vocabulary.name}: found no {', '.join(missing)}, which {what_for}")
