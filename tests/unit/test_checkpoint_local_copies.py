"""A file on the Pod's disk stands for the one in the store only where it is the same."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from starcoder_trainer.checkpoint.local_copies import LocalCopies
from starcoder_trainer.checkpoint.save import directory_of
from starcoder_trainer.contract.assignment import CheckpointRef
from starcoder_trainer.contract.ledger import FileRecord

CONTENT = bytes(range(256)) * 64
FILE = "rank-00003.safetensors"
CHECKPOINT = CheckpointRef(2, 20, "sha256:0")
RECORD = FileRecord(FILE, len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


class Store:
    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []

    def get_range(self, file: str, start: int, length: int) -> bytes:
        self.asked.append((file, start, length))
        return CONTENT[start : start + length]


@pytest.fixture
def store() -> Store:
    return Store()


def copies(scratch: Path, store: Store) -> LocalCopies:
    return LocalCopies(scratch, CHECKPOINT, {FILE: RECORD}, store.get_range)


def saved(scratch: Path, content: bytes, attempt: int = 2, step: int = 20) -> Path:
    folder = directory_of(scratch, attempt, step)
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(content)
    return folder / FILE


def test_what_is_on_disk_is_not_asked_of_the_store_also_when_it_is_deleted_meanwhile(
    tmp_path: Path, store: Store
) -> None:
    path, found = saved(tmp_path, CONTENT), copies(tmp_path, store)
    assert found.get_range(FILE, 100, 50) == CONTENT[100:150]
    path.unlink()
    assert found.get_range(FILE, 0, len(CONTENT)) == CONTENT
    assert (store.asked, found.local_bytes) == ([], 50 + len(CONTENT))
    found.close()


@pytest.mark.parametrize(
    "content", [CONTENT[:-1], CONTENT[:-1] + b"x", b""], ids=["truncated", "another byte", "empty"]
)
def test_a_file_that_is_not_the_manifests_is_read_from_the_store(
    tmp_path: Path, store: Store, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, content)
    found = copies(tmp_path, store)
    assert found.get_range(FILE, 8, 8) == CONTENT[8:16]
    assert found.get_range(FILE, 16, 8) == CONTENT[16:24]
    assert (store.asked, found.local_bytes) == ([(FILE, 8, 8), (FILE, 16, 8)], 0)
    assert caplog.text.count("is not what the checkpoint's manifest lists") == 1


@pytest.mark.parametrize(("attempt", "step"), [(1, 20), (2, 10)])
def test_another_checkpoints_file_is_none(tmp_path: Path, store: Store, attempt: int, step: int) -> None:
    saved(tmp_path, CONTENT, attempt, step)
    assert copies(tmp_path, store).get_range(FILE, 8, 8) == CONTENT[8:16]
    assert store.asked == [(FILE, 8, 8)]


def test_a_file_that_no_manifest_lists_is_the_stores_affair(tmp_path: Path, store: Store) -> None:
    assert copies(tmp_path, store).get_range("other", 0, 4) == CONTENT[:4]
    assert store.asked == [("other", 0, 4)]


def test_many_threads_read_at_once(tmp_path: Path, store: Store) -> None:
    saved(tmp_path, CONTENT)
    found = copies(tmp_path, store)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: found.get_range(FILE, i * 64, 64), range(256)))
    assert b"".join(parts) == CONTENT
    assert (store.asked, found.local_bytes) == ([], len(CONTENT))
    found.close()
