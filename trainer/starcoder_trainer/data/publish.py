"""Prepared data into its store: what is there counts only once `prepared.json` is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from starcoder_trainer.storage.store import NotFound, ObjectStore

from .errors import DataInvalid
from .index import ITEM_BYTES, Header
from .prepared import INDEX, PREPARED, TOKENIZER, TOKENS, Prepared, read_prepared


def is_published(store: ObjectStore, prepared: Prepared) -> bool:
    """Whether the store has this very data, whole: a run that reads it need not be disturbed."""
    try:
        found = read_prepared(store.get(PREPARED).data, PREPARED)
        sizes = {name: store.stat(name).size for name in (TOKENS, INDEX, TOKENIZER)}
    except (NotFound, DataInvalid):
        return False
    tokens, index = prepared.tokens * ITEM_BYTES[prepared.dtype], Header(prepared.dtype, prepared.documents).index_bytes
    return found == prepared and (sizes[TOKENS], sizes[INDEX]) == (tokens, index)


def publish(store: ObjectStore, folder: Path, prepared: Prepared, uploaded: Callable[[int], None]) -> None:
    """`folder` holds the files. Cut anywhere, it leaves no `prepared.json`, or the one of what is there.

    Args:
        uploaded: Told the bytes of each file once it is there.
    """
    store.delete(PREPARED)
    for name in (TOKENIZER, TOKENS, INDEX):
        uploaded(store.upload_file(name, folder / name).size)
    store.put(PREPARED, prepared.to_json().encode())
