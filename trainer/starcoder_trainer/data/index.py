"""Megatron's `.idx` beside a `.bin`: which tokens are one document. Standard library only: agents read its header.

Little-endian: magic (9 bytes), version (u64 = 1), type of the tokens (u8), sequences (u64), document boundaries (u64),
then tokens of each sequence (i32), byte offset of each (i64), and the boundaries as sequence numbers (i64), of which
there is one more than documents. Ours has one sequence a document.
Format: megatron/core/datasets/indexed_dataset.py of Megatron-core.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import BinaryIO, Literal

from .errors import DataInvalid

DType = Literal["uint16", "int32"]
ITEM_BYTES: dict[DType, int] = {"uint16": 2, "int32": 4}
_CODES: dict[DType, int] = {"uint16": 8, "int32": 4}

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
HEADER_BYTES = _HEADER.size
_UINT16_VOCABULARY = 65500
"""Megatron takes 16 bits below this size of vocabulary."""


def dtype_for(vocab_size: int) -> DType:
    return "uint16" if vocab_size < _UINT16_VOCABULARY else "int32"


@dataclass(frozen=True)
class Header:
    dtype: DType
    documents: int

    @property
    def index_bytes(self) -> int:
        """Size of the whole `.idx`."""
        return HEADER_BYTES + self.documents * (4 + 8) + (self.documents + 1) * 8


def read_header(data: bytes, name: str) -> Header:
    """From the first `HEADER_BYTES` bytes of the object called `name`.

    Raises:
        DataInvalid: they are of no index that `prepare` writes.
    """
    if len(data) < HEADER_BYTES or data[: len(_MAGIC)] != _MAGIC:
        raise DataInvalid(f"{name}: found no Megatron index (it begins with {data[:9]!r}); {_AGAIN}")
    _, version, code, sequences, boundaries = _HEADER.unpack(data[:HEADER_BYTES])
    dtype = next((name for name, number in _CODES.items() if number == code), None)
    if version != _VERSION or dtype is None:
        raise DataInvalid(
            f"{name}: found version {version} and token type {code}, expected version {_VERSION} and one of "
            f"{', '.join(f'{number} ({dtype})' for dtype, number in _CODES.items())}; {_AGAIN}"
        )
    if boundaries != sequences + 1:
        raise DataInvalid(f"{name}: found {sequences} sequences with {boundaries} document boundaries; {_AGAIN}")
    return Header(dtype, sequences)


_AGAIN = "run starcoder-trainer prepare again"


def write_index(file: BinaryIO, dtype: DType, lengths: Sequence[int]) -> None:
    """`lengths`: tokens of each document, in the order of the `.bin`."""
    size = ITEM_BYTES[dtype]
    file.write(_HEADER.pack(_MAGIC, _VERSION, _CODES[dtype], len(lengths), len(lengths) + 1))
    offsets = accumulate(chain((0,), (n * size for n in lengths[:-1])) if lengths else ())
    for code, values in (("i", lengths), ("q", offsets), ("q", range(len(lengths) + 1))):
        numbers = array(code, values)
        if sys.byteorder == "big":
            numbers.byteswap()
        file.write(numbers.tobytes())
