"""The run's tokenizer between tokens and text, with special tokens kept apart from text that only looks like them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

from .errors import DataInvalid
from .vocabulary import Vocabulary

Fragment = list[str | int]
"""Text and, as ids, the special tokens between; a special token is one character long and never cut."""


class CodeTokenizer:
    def __init__(self, vocabulary: Vocabulary) -> None:
        """Raises DataInvalid where the tokenizers library can't load it."""
        self.vocabulary = vocabulary
        try:
            self._tokenizer = Tokenizer.from_buffer(vocabulary.data)
        except Exception as e:  # the library raises plain ones
            raise DataInvalid(
                f"{vocabulary.name}: found no tokenizer ({e}), expected the tokenizer.json of starcoder-trainer prepare"
            ) from e
        # "<fim_prefix>" in somebody's source code is text.
        self._tokenizer.encode_special_tokens = True
        self._pieces = _pieces(vocabulary)

    def id(self, token: str) -> int:
        return self.vocabulary.ids[token]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; nothing in a text is taken for a special token."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [e.ids for e in encoded]

    def encode_fragment(self, fragment: Fragment) -> list[int]:
        encoded = iter(self.encode([part for part in fragment if isinstance(part, str)]))
        return [t for part in fragment for t in (next(encoded) if isinstance(part, str) else (part,))]

    def decode(self, ids: Iterable[int]) -> Fragment:
        """The text of tokens, special tokens kept. Bytes of a character that is cut off at either end are dropped.

        Raises:
            DataInvalid: an id is not of this tokenizer.
        """
        fragment: Fragment = []
        raw = bytearray()
        pieces = self._pieces
        try:
            for token in ids:
                piece = pieces[token]
                if piece is not None:
                    raw += piece
                    continue
                if raw:
                    fragment.append(raw.decode(errors="ignore"))
                    raw.clear()
                fragment.append(token)
        except IndexError:
            raise DataInvalid(
                f"found token {token}, expected one below {len(pieces)} as in {self.vocabulary.name}; the data is "
                "broken or of another tokenizer: run starcoder-trainer prepare again"
            ) from None
        if raw:
            fragment.append(raw.decode(errors="ignore"))
        return fragment


def _pieces(vocabulary: Vocabulary) -> list[bytes | None]:
    """Bytes of each id; None for those that are no text."""
    byte_of = _byte_alphabet()
    pieces: list[bytes | None] = [None] * vocabulary.size
    for entry, token in vocabulary.ids.items():
        if token not in vocabulary.added:
            try:
                pieces[token] = bytes(byte_of[c] for c in entry)
            except KeyError as e:
                raise DataInvalid(
                    f"{vocabulary.name}: found entry {entry!r}, expected only characters that stand for bytes "
                    "(byte-level BPE)"
                ) from e
    return pieces


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE (GPT-2) writes for bytes: printable ones stand for themselves, the others
    for those from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(0x100) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}
