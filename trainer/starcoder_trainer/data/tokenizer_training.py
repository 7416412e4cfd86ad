"""A byte-level BPE as StarCoder's: its pre-tokenizer, its special tokens in their order, bytes for the alphabet."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .special_tokens import SPECIAL_TOKENS

LEAST_VOCABULARY = len(SPECIAL_TOKENS) + 256
"""Special tokens and one entry a byte, so that every text can be written."""


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
