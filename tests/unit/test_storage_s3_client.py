"""Clients of S3 are cheap to make, and each has its own credentials and settings."""

import threading

import pytest
from botocore.loaders import JSONFileLoader

from starcoder_trainer.contract.config import StorageConfig
from starcoder_trainer.storage import s3_client
from starcoder_trainer.storage.credentials import Keys


def test_what_boto3_reads_of_an_api_is_read_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    s3_client.prepare()
    read: list[str] = []
    load = JSONFileLoader.load_file

    def counted(self: JSONFileLoader, path: str) -> object:
        read.append(path)
        return load(self, path)

    monkeypatch.setattr(JSONFileLoader, "load_file", counted)
    s3_client.connect(StorageConfig("http://127.0.0.1:1", "eu-west-1", True), Keys("a", "b"), None, 2)
    assert read == []


def test_what_is_prepared_before_a_fork_starts_no_thread() -> None:
    before = threading.active_count()
    s3_client.prepare()
    assert threading.active_count() == before


def test_clients_of_one_process_have_credentials_and_settings_of_their_own() -> None:
    one, other = (
        s3_client.connect(StorageConfig(f"http://127.0.0.1:{n}", f"eu-west-{n}", True), Keys(f"key-{n}", "-"), None, n)
        for n in (1, 2)
    )
    for n, client in ((1, one), (2, other)):
        assert client.meta.endpoint_url == f"http://127.0.0.1:{n}"
        assert client.meta.region_name == f"eu-west-{n}"
        assert client.meta.config.retries["total_max_attempts"] == n
        assert client._request_signer._credentials.access_key == f"key-{n}"
