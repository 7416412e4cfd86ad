"""A byte-level BPE as StarCoder's: its pre-tokenizer, its special tokens in their order, bytes for the alphabet."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .children import deaf_to_interrupts, enter_child
from .source_files import Skipped, SourceFile, read_text
from .special_tokens import SPECIAL_TOKENS

LEAST_VOCABULARY = len(SPECIAL_TOKENS) + 256
"""Special tokens and one entry a byte, so that every text can be written."""


class TrainingDied(Exception):
    """The process that trained was killed, most likely for want of memory."""


def train_on_files(
    root: Path, files: Sequence[SourceFile], vocab_size: int, threads: int, seen: Callable[[int], None]
) -> bytes:
    """As `train_tokenizer`, in a process of its own: the library answers no signal while it trains.

    Args:
        seen: Told the bytes of each file that was read.

    Raises:
        TrainingDied
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(theirs, os.getpid(), threads, root, files, vocab_size))
    with ours, theirs:
        try:
            with deaf_to_interrupts():
                process.start()
            theirs.close()  # the child has its own: when that goes, reading ends
            while isinstance(said := ours.recv(), int):
                seen(said)
        except EOFError:
            raise TrainingDied("the process that trained the tokenizer died") from None
        finally:
            if process.pid is not None:
                process.kill()
                process.join()
    assert isinstance(said, bytes)
    return said


def _train(  # noqa: PLR0917
    say: Connection[int | bytes, None],
    parent: int,
    threads: int,
    root: Path,
    files: Sequence[SourceFile],
    vocab_size: int,
) -> None:
    enter_child(parent, threads)

    def texts() -> Iterator[str]:
        for file in files:
            text = read_text(root, file)
            if not isinstance(text, Skipped):
                yield text
            say.send(file.size)

    say.send(train_tokenizer(texts(), vocab_size))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """The tokenizer.json. Fewer entries than `vocab_size` where the texts are too small for so many.

    The same texts make the same bytes, however many threads the library uses.
    """
    assert vocab_size >= LEAST_VOCABULARY
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str(pretty=False)).encode()
