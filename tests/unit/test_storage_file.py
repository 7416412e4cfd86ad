"""The folder behind the store's interface keeps S3's promises that the ledger stands on."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from starcoder_trainer.contract.config import StorageConfig
from starcoder_trainer.storage.file import FileStore
from starcoder_trainer.storage.open import open_store, split_uri
from starcoder_trainer.storage.store import BucketNotFound, NotFound, PreconditionFailed, StorageError


@pytest.fixture
def store(tmp_path):
    return FileStore(f"file://{tmp_path}/store")


def test_what_is_put_is_read_back_with_its_version(store):
    version = store.put("a/b", b"12345")
    assert store.get("a/b").data == b"12345"
    assert store.get("a/b").version == store.stat("a/b").version == version
    assert store.get_range("a/b", 1, 3) == b"234"


def test_a_range_beyond_the_end_is_an_error(store):
    store.put("a", b"123")
    with pytest.raises(StorageError, match="expected 5"):
        store.get_range("a", 1, 5)


def test_what_is_not_there_is_not_found(store):
    store.put("a/b", b"")
    for missing in ("x", "a", "a/b/c"):
        with pytest.raises(NotFound):
            store.get(missing)


def test_of_many_conditional_writers_one_wins(store):
    barrier = threading.Barrier(16)

    def write(i, version):
        barrier.wait()
        try:
            other = FileStore(store.uri)
            other.put_if_match("k", str(i).encode(), version) if version else other.put_if_absent("k", str(i).encode())
        except PreconditionFailed:
            return None
        return str(i).encode()

    version = None
    for _ in range(3):
        with ThreadPoolExecutor(16) as pool:
            winners = [w for w in pool.map(write, range(16), [version] * 16) if w is not None]
        assert winners == [store.get("k").data]
        version = store.get("k").version


def test_a_write_to_a_version_that_is_gone_fails(store):
    version = store.put("k", b"1")
    store.put("k", b"1")
    with pytest.raises(PreconditionFailed):
        store.put_if_match("k", b"2", version)
    store.delete("k")
    store.delete("k")
    with pytest.raises(PreconditionFailed):
        store.put_if_match("k", b"2", version)


def test_lists_by_prefix_without_its_own_files(store, tmp_path):
    (tmp_path / "big").write_bytes(b"x" * 3_000_000)
    done = store.upload_file("a/big", tmp_path / "big")
    store.put_if_absent("ab", b"1")
    store.put("c", b"1")
    assert [(s.key, s.size) for s in store.list("a")] == [("a/big", 3_000_000), ("ab", 1)]
    assert done.size == 3_000_000
    assert not done.checksum


def test_listing_a_folder_that_does_not_exist_says_so(store):
    with pytest.raises(BucketNotFound, match="create it"):
        list(store.list())


def test_a_key_cannot_leave_the_folder(store):
    with pytest.raises(StorageError, match="below"):
        store.get("../x")


def test_a_file_uri_is_refused_where_it_is_not_allowed(tmp_path):
    with pytest.raises(StorageError, match="only local runs"):
        open_store(f"file://{tmp_path}", StorageConfig())
    assert isinstance(open_store(f"file://{tmp_path}", StorageConfig(), allow_file=True), FileStore)


@pytest.mark.parametrize("uri", ["gs://bucket/x", "/a/path", "s3://", "s3:///key"])
def test_a_uri_that_names_no_bucket_is_refused(uri):
    with pytest.raises(StorageError, match="expected s3://bucket/prefix"):
        open_store(uri, StorageConfig(), allow_file=True)


def test_the_uri_of_an_object_is_split_into_store_and_key():
    assert split_uri("s3://bucket/a/b.json") == ("s3://bucket/a", "b.json")
    with pytest.raises(StorageError, match="no object name"):
        split_uri("s3://bucket")
