"""Small corpora in a folder, written by the code that `prepare` uses, and configurations that train on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from starcoder_trainer.contract.config import FimConfig, SourceConfig, TrainingConfig
from starcoder_trainer.data.index import dtype_for
from starcoder_trainer.data.prepared import FORMAT, PREPARED, TOKENIZER, Prepared
from starcoder_trainer.data.special_tokens import END_OF_TEXT
from starcoder_trainer.data.token_file import TokenFileWriter
from starcoder_trainer.data.tokenizer import CodeTokenizer
from starcoder_trainer.data.tokenizer_training import LEAST_VOCABULARY, train_tokenizer
from starcoder_trainer.data.vocabulary import Vocabulary, read_vocabulary
from starcoder_trainer.storage.file import FileStore
from starcoder_trainer.storage.store import ObjectStore
from tests.support.training import CONFIG

TEXTS = tuple(f"def f{i}(x):\n    return x + {i}  # größer als {i}\n" for i in range(40))


@cache
def vocabulary(size: int = LEAST_VOCABULARY + 60) -> Vocabulary:
    return read_vocabulary(train_tokenizer(TEXTS, size), "tokenizer.json")


def write_corpus(folder: Path, texts: Sequence[str] = TEXTS, made_with: Vocabulary | None = None) -> Prepared:
    """One document a text."""
    made_with = made_with or vocabulary()
    tokenizer = CodeTokenizer(made_with)
    end = tokenizer.id(END_OF_TEXT)
    return write_tokens(folder, [[*ids, end] for ids in tokenizer.encode(texts)], made_with)


def write_tokens(folder: Path, documents: Sequence[Sequence[int]], made_with: Vocabulary | None = None) -> Prepared:
    made_with = made_with or vocabulary()
    dtype = dtype_for(made_with.size)
    folder.mkdir(parents=True, exist_ok=True)
    with TokenFileWriter(folder, dtype) as writer:
        for document in documents:
            writer.add(np.asarray(document, np.dtype(dtype).newbyteorder("<")).tobytes(), [len(document)])
        made = writer.finish()
    (folder / TOKENIZER).write_bytes(made_with.data)
    prepared = Prepared(
        format=FORMAT,
        tokens=made.tokens,
        documents=made.documents,
        dtype=dtype,
        vocab_size=made_with.size,
        tokenizer_sha256=made_with.sha256,
        tokens_sha256=made.tokens_sha256,
        index_sha256=made.index_sha256,
        files=made.documents,
        bytes=0,
        skipped={},
        reponame="test",
        seed=0,
        tool_version="test",
    )
    (folder / PREPARED).write_text(prepared.to_json())
    return prepared


def open_folder(uri: str) -> ObjectStore:
    return FileStore(uri)


def corpus_config(
    *folders: Path, weights: Sequence[float] = (), sequence_length: int = 32, fim_rate: float = 0.0, seed: int = 7
) -> TrainingConfig:
    """Trains on `folders` with the tokenizer of the first; global batch of 4, 20 iterations."""
    uris = [f"file://{folder}" for folder in folders]
    sources = tuple(map(SourceConfig, uris, weights or [1.0] * len(uris)))
    return replace(
        CONFIG,
        model=replace(CONFIG.model, vocab_size=512),
        data=replace(
            CONFIG.data,
            tokenizer=f"{uris[0]}/{TOKENIZER}",
            sources=sources,
            sequence_length=sequence_length,
            seed=seed,
            fim=FimConfig(fim_rate, 0.5),
        ),
    )
