"""What an S3 client raises comes out as a sentence that says what to do, without a key in it."""

import pytest
from botocore import exceptions as aws

from starcoder_trainer.contract.config import StorageConfig
from starcoder_trainer.storage.credentials import Keys, read_keys
from starcoder_trainer.storage.open import open_store
from starcoder_trainer.storage.s3_errors import translate
from starcoder_trainer.storage.store import (
    AccessDenied,
    BucketNotFound,
    CredentialsMissing,
    NotFound,
    PreconditionFailed,
    StorageError,
    Unreachable,
)


def answered(code, status=400):
    return aws.ClientError(
        {"Error": {"Code": code, "Message": "said"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "X"
    )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (answered("NoSuchKey", 404), NotFound),
        (answered("404", 404), NotFound),
        (answered("NoSuchBucket", 404), BucketNotFound),
        (answered("SignatureDoesNotMatch", 403), AccessDenied),
        (answered("403", 403), AccessDenied),
        (answered("PreconditionFailed", 412), PreconditionFailed),
        (answered("ConditionalRequestConflict", 409), PreconditionFailed),
        (answered("SlowDown", 503), Unreachable),
        (answered("Whatever", 502), Unreachable),
        (answered("NotImplemented", 501), StorageError),
        (answered("InvalidRange", 416), StorageError),
        (aws.NoCredentialsError(), CredentialsMissing),
        (aws.EndpointConnectionError(endpoint_url="http://x"), Unreachable),
        (aws.ReadTimeoutError(endpoint_url="http://x"), Unreachable),
        (ConnectionResetError("reset"), Unreachable),
    ],
)
def test_each_answer_has_its_exception_and_names_what_was_tried(error, kind):
    found = translate(error, "read", "s3://bucket/key", "http://s3", None)
    assert type(found) is kind
    assert "read s3://bucket/key at http://s3" in str(found)


def test_half_a_secret_is_refused_and_names_the_missing_key(tmp_path):
    (tmp_path / "AWS_ACCESS_KEY_ID").write_text("id")
    with pytest.raises(CredentialsMissing, match="AWS_SECRET_ACCESS_KEY missing"):
        read_keys(tmp_path)


def test_keys_are_read_without_their_line_end_and_never_shown(tmp_path):
    (tmp_path / "AWS_ACCESS_KEY_ID").write_text("id\n")
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text("hidden-key\n")
    keys = read_keys(tmp_path)
    assert keys == Keys("id", "hidden-key")
    assert "hidden-key" not in repr(keys)


def test_no_file_leaves_the_choice_to_the_default_chain(tmp_path):
    assert read_keys(tmp_path) is None
    assert read_keys(None) is None


def test_no_credentials_anywhere_names_the_folder_they_were_expected_in(tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    store = open_store("s3://bucket/x", StorageConfig(endpoint="http://127.0.0.1:9", path_style=True), tmp_path)
    with pytest.raises(CredentialsMissing, match=str(tmp_path)):
        store.get("k")
