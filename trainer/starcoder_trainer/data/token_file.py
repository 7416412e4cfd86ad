"""Writing `tokens.bin` and `tokens.idx`: documents as they come, the index when the last one is there."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from .index import ITEM_BYTES, DType, write_index
from .prepared import INDEX, TOKENS


@dataclass(frozen=True)
class TokenFile:
    tokens: int
    documents: int
    tokens_sha256: str
    index_sha256: str


class TokenFileWriter:
    """Context manager: the files are closed in any case, the index is written by `finish` alone."""

    def __init__(self, folder: Path, dtype: DType) -> None:
        self._folder = folder
        self._dtype = dtype
        self._bin = (folder / TOKENS).open("wb")
        self._sha256 = hashlib.sha256()
        self._lengths = array("i")  # 4 bytes a document, so that millions of them fit
        self.tokens = 0

    def add(self, tokens: bytes, lengths: Iterable[int]) -> None:
        """`tokens`: little-endian items of `dtype`, of documents of these lengths."""
        known = len(self._lengths)
        self._lengths.extend(lengths)
        count = sum(self._lengths[known:])
        assert len(tokens) == count * ITEM_BYTES[self._dtype]
        self._bin.write(tokens)
        self._sha256.update(tokens)
        self.tokens += count

    def finish(self) -> TokenFile:
        self._bin.close()
        path = self._folder / INDEX
        with path.open("wb") as file:
            write_index(file, self._dtype, self._lengths)
        with path.open("rb") as file:
            index_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return TokenFile(self.tokens, len(self._lengths), self._sha256.hexdigest(), index_sha256)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bin.close()
