"""Whether all that HEAD lists at the end is there: every file of every checkpoint, by its checksum."""

from __future__ import annotations

import tempfile
from pathlib import Path

from devcluster.cluster import Cluster
from starcoder_trainer.agent.verify import Corrupt, verify_contents, verify_entry
from starcoder_trainer.contract import names
from starcoder_trainer.contract.config import StorageConfig
from starcoder_trainer.contract.ledger import HEAD_KEY, Head
from starcoder_trainer.storage.open import open_store
from starcoder_trainer.storage.store import NotFound, ObjectStore


def listed_and_damaged(cluster: Cluster, uri: str) -> tuple[int, tuple[str, ...]]:
    """(checkpoints that HEAD lists, what is wrong with those that are not whole)."""
    with tempfile.TemporaryDirectory(prefix="kept-") as folder, cluster.inside():
        for name, value in zip(names.CREDENTIALS_KEYS, (cluster.s3.access_key, cluster.s3.secret_key), strict=True):
            (Path(folder) / name).write_text(value)
        store = open_store(uri, StorageConfig(cluster.s3.endpoint, path_style=True), Path(folder))
        head = Head.from_json(store.get(HEAD_KEY).data)
        return len(head.entries), damaged(store, head)


def damaged(store: ObjectStore, head: Head) -> tuple[str, ...]:
    found = []
    for entry in head.entries:
        try:
            verify_contents(store, verify_entry(store, entry))
        except (Corrupt, NotFound) as e:
            found.append(f"iteration {entry.step} of attempt {entry.attempt}: {e}")
    return tuple(found)
