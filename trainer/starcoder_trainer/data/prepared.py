"""`prepared.json`: written last by `prepare`, so that where it is, the data beside it is whole."""

from __future__ import annotations

from dataclasses import dataclass

from starcoder_trainer.contract.codec import ContractError, Document

from .errors import DataInvalid
from .index import DType

PREPARED = "prepared.json"
TOKENS = "tokens.bin"
INDEX = "tokens.idx"
TOKENIZER = "tokenizer.json"
FORMAT = 1


@dataclass(frozen=True)
class Prepared(Document):
    """No clock in it: the same input, seed and version make the same bytes."""

    format: int
    tokens: int
    documents: int
    dtype: DType
    """Of one token in tokens.bin, little-endian."""
    vocab_size: int
    """Of the tokenizer."""
    tokenizer_sha256: str
    """Of tokenizer.json, as `sha256sum` prints it; a run must use this very tokenizer."""
    tokens_sha256: str
    index_sha256: str
    files: int
    """Source files read; each is one document."""
    bytes: int
    """Of those files."""
    skipped: dict[str, int]
    """Files left out, by reason."""
    reponame: str
    seed: int
    tool_version: str


def read_prepared(data: bytes, name: str) -> Prepared:
    """Raises DataInvalid where `data` is no `prepared.json` of this format."""
    try:
        prepared = Prepared.from_json(data)
    except ContractError as e:
        raise DataInvalid(f"{name}: {e}; run starcoder-trainer prepare again") from e
    if prepared.format != FORMAT:
        raise DataInvalid(
            f"{name}: found format {prepared.format}, expected {FORMAT}; run starcoder-trainer prepare of this "
            "version again"
        )
    return prepared
