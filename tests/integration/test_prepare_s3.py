"""Preparing to a real S3 server, and training data read back from it by ranges through the Pod's cache."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from starcoder_trainer.contract.config import DataConfig, FimConfig, SourceConfig, StorageConfig
from starcoder_trainer.data import preflight
from starcoder_trainer.data.dataset import open_dataset
from starcoder_trainer.data.errors import DataInvalid, DataNotFound, TokenizerMismatch
from starcoder_trainer.data.prepare import main
from starcoder_trainer.storage.open import open_store
from starcoder_trainer.storage.store import AccessDenied, BucketNotFound
from tests.support.training import CONFIG

pytestmark = pytest.mark.integration

SOURCES = Path(json.__file__).parent
SEQUENCE = 64


@pytest.fixture
def credentials(s3_server, tmp_path):
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "AWS_ACCESS_KEY_ID").write_text(s3_server.access_key)
    (folder / "AWS_SECRET_ACCESS_KEY").write_text(s3_server.secret_key)
    return folder


@pytest.fixture
def opened(s3_server, credentials):
    storage = StorageConfig(endpoint=s3_server.endpoint, path_style=True)
    return lambda uri: open_store(uri, storage, credentials)


@pytest.fixture
def prepare(s3_server, credentials):
    """Exit code of a preparation to a URI."""

    def prepare(output, *more):
        at = ["--endpoint", s3_server.endpoint, "--path-style", "--credentials-dir", str(credentials)]
        return main(["--input", str(SOURCES), "--include=*.py", "--workers=1", "--output", output, *at, *more])

    return prepare


@pytest.fixture
def config(bucket):
    def config(*names):
        uris = [f"s3://{bucket}/{name}" for name in names]
        sources = tuple(SourceConfig(uri, 1.0) for uri in uris)
        data = DataConfig(f"{uris[0]}/tokenizer.json", sources, SEQUENCE, 42, FimConfig(0.5, 0.5))
        return replace(CONFIG, data=data)

    return config


def samples(config, opened, cache, count=40):
    dataset = open_dataset(config, opened, cache)
    return [dataset.sample(i).tokens.tolist() for i in range(count)]


def test_what_is_prepared_to_s3_is_what_is_prepared_to_a_folder(prepare, bucket, opened, tmp_path):
    assert prepare(f"s3://{bucket}/code", "--vocab-size=400") == 0
    assert prepare(str(tmp_path / "here"), "--vocab-size=400") == 0
    store = opened(f"s3://{bucket}/code")
    names = sorted(s.key for s in store.list())
    assert names == ["prepared.json", "tokenizer.json", "tokens.bin", "tokens.idx"]
    for name in names:
        assert store.get(name).data == (tmp_path / "here" / name).read_bytes()


def test_a_second_preparation_leaves_the_same_objects_alone(prepare, bucket, opened, capsys):
    assert prepare(f"s3://{bucket}/code", "--vocab-size=400") == 0
    capsys.readouterr()
    assert prepare(f"s3://{bucket}/code", "--vocab-size=400") == 0
    assert "there already, nothing to do" in capsys.readouterr().out


def test_samples_from_s3_are_those_of_the_folder_with_and_without_a_cache(
    prepare, bucket, opened, config, tmp_path, monkeypatch
):
    assert prepare(f"s3://{bucket}/code", "--vocab-size=400") == 0
    assert prepare(str(tmp_path / "here"), "--vocab-size=400") == 0
    preflight.check(config("code"), opened)
    with_cache = samples(config("code"), opened, tmp_path / "cache")
    assert any(p.is_file() for p in (tmp_path / "cache").rglob("0"))
    assert samples(config("code"), opened, tmp_path / "cache") == with_cache
    monkeypatch.setenv("STARCODER_DATA_CACHE_BYTES", "0")
    assert samples(config("code"), opened, tmp_path / "none") == with_cache
    assert not (tmp_path / "none").exists()
    here = f"file://{tmp_path}/here"
    local = replace(config("code").data, tokenizer=f"{here}/tokenizer.json", sources=(SourceConfig(here, 1.0),))

    def open_here(uri):
        return open_store(uri, StorageConfig(), allow_file=True)

    assert samples(replace(CONFIG, data=local), open_here, tmp_path / "other") == with_cache


def test_a_second_corpus_can_be_prepared_with_the_tokenizer_of_the_first(prepare, bucket, opened, config):
    assert prepare(f"s3://{bucket}/a", "--vocab-size=400") == 0
    assert prepare(f"s3://{bucket}/b", f"--tokenizer=s3://{bucket}/a/tokenizer.json", "--exclude=tool.py") == 0
    preflight.check(config("a", "b"), opened)
    assert prepare(f"s3://{bucket}/c", "--vocab-size=300") == 0
    with pytest.raises(TokenizerMismatch, match=f"s3://{bucket}/c: its data was made with"):
        preflight.check(config("a", "c"), opened)


def test_data_that_is_not_there_yet_is_named_and_found_once_it_is(prepare, bucket, opened, config):
    with pytest.raises(DataNotFound, match=f"s3://{bucket}/code/tokenizer.json"):
        preflight.check(config("code"), opened)
    assert prepare(f"s3://{bucket}/code", "--vocab-size=400") == 0
    preflight.check(config("code"), opened)
    opened(f"s3://{bucket}/code").delete("prepared.json")
    with pytest.raises(DataNotFound, match="found no prepared"):
        preflight.check(config("code"), opened)


def test_an_object_cut_short_is_invalid_data(prepare, bucket, opened, config):
    assert prepare(f"s3://{bucket}/code", "--vocab-size=400") == 0
    opened(f"s3://{bucket}/code").put("tokens.idx", b"MMIDIDX")
    with pytest.raises(DataInvalid, match="idx: found 7 bytes"):
        preflight.check(config("code"), opened)


def test_a_missing_bucket_and_a_wrong_key_are_told_before_any_work(prepare, credentials, bucket, capsys):
    assert prepare("s3://no-such-bucket/code", "--vocab-size=400") == 1
    error = capsys.readouterr().err
    assert "NoSuchBucket" in error
    assert "training tokenizer" not in error
    (credentials / "AWS_SECRET_ACCESS_KEY").write_text("wrong")
    assert prepare(f"s3://{bucket}/code", "--vocab-size=400") == 1
    error = capsys.readouterr().err
    assert "check the keys" in error
    assert "training tokenizer" not in error


def test_preflight_tells_bucket_and_keys_from_data(opened, config, credentials):
    data = replace(config("code").data, tokenizer="s3://no-such-bucket/tokenizer.json")
    with pytest.raises(BucketNotFound):
        preflight.check(replace(CONFIG, data=data), opened)
    (credentials / "AWS_SECRET_ACCESS_KEY").write_text("wrong")
    with pytest.raises(AccessDenied):
        preflight.check(config("code"), opened)
