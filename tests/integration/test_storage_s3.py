"""The S3 store against a real server: what a person can get wrong is named, and mended without a restart."""

import pytest

from starcoder_trainer.contract.config import StorageConfig
from starcoder_trainer.storage.open import open_store
from starcoder_trainer.storage.store import AccessDenied, BucketNotFound, NotFound, PreconditionFailed, Unreachable

pytestmark = pytest.mark.integration


@pytest.fixture
def credentials(s3_server, tmp_path):
    (tmp_path / "AWS_ACCESS_KEY_ID").write_text(s3_server.access_key)
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text(s3_server.secret_key + "\n")
    return tmp_path


@pytest.fixture
def opened(s3_server, bucket, credentials):
    def opened(uri=f"s3://{bucket}/prefix", endpoint=s3_server.endpoint):
        return open_store(uri, StorageConfig(endpoint=endpoint, path_style=True), credentials)

    return opened


def test_bytes_come_back_with_their_version(opened):
    store = opened()
    version = store.put("a/b", b"12345")
    assert store.get("a/b").data == b"12345"
    assert store.get("a/b").version == store.stat("a/b").version == version
    assert store.get_range("a/b", 1, 3) == b"234"
    assert [(s.key, s.size) for s in store.list("a/")] == [("a/b", 5)]
    store.delete("a/b")
    store.delete("a/b")
    with pytest.raises(NotFound):
        store.get("a/b")


def test_a_listing_longer_than_a_page_is_whole(opened):
    store = opened()
    for i in range(1003):
        store.put(f"many/{i:04d}", b"")
    assert [s.key for s in store.list("many/")] == [f"many/{i:04d}" for i in range(1003)]


def test_a_conditional_write_that_comes_late_fails(opened):
    store = opened()
    version = store.put_if_absent("h", b"1")
    with pytest.raises(PreconditionFailed):
        store.put_if_absent("h", b"2")
    assert store.put_if_match("h", b"2", version) == store.stat("h").version
    with pytest.raises(PreconditionFailed):
        store.put_if_match("h", b"3", version)
    with pytest.raises(PreconditionFailed):
        store.put_if_match("absent", b"3", version)


def test_a_wrong_key_is_denied_and_the_mended_secret_is_taken_up_by_the_same_store(opened, credentials, s3_server):
    store = opened()
    store.put("k", b"1")
    (credentials / "AWS_SECRET_ACCESS_KEY").write_text("wrong-secret")
    with pytest.raises(AccessDenied, match="Secret") as denied:
        store.get("k")
    assert "wrong-secret" not in str(denied.value)
    (credentials / "AWS_SECRET_ACCESS_KEY").write_text(s3_server.secret_key)
    assert store.get("k").data == b"1"


def test_a_bucket_that_does_not_exist_is_named(opened):
    with pytest.raises(BucketNotFound, match="s3://no-such-bucket/x"):
        list(opened("s3://no-such-bucket/x").list())


def test_a_dead_endpoint_is_given_up_in_bounded_time(opened):
    with pytest.raises(Unreachable, match="endpoint"):
        opened(endpoint="http://127.0.0.1:9").get("k")
