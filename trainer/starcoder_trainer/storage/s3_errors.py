"""What botocore raises, as the store's exceptions with a message that says what to do. Never a key in it."""

from __future__ import annotations

from pathlib import Path

from botocore import exceptions as aws
from urllib3.exceptions import HTTPError

from starcoder_trainer.contract.names import CREDENTIALS_KEYS

from .store import (
    AccessDenied,
    BucketNotFound,
    CredentialsMissing,
    NotFound,
    PreconditionFailed,
    StorageError,
    Unreachable,
)

RAISED = (aws.BotoCoreError, aws.ClientError, HTTPError, OSError)
"""All that an operation of a boto3 client can raise, reading of the body included."""

_MISSING_KEY = {"NoSuchKey", "404", "NotFound"}
_DENIED = {
    "AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken",
    "TokenRefreshRequired", "AccountProblem", "AllAccessDisabled", "401", "Unauthorized", "UnrecognizedClientException",
}  # fmt: skip
_LOST_RACE = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
_TRY_AGAIN = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling", "OperationAborted"}
_SERVER_ERROR = 500


def translate(
    error: BaseException, operation: str, uri: str, endpoint: str, credentials_dir: Path | None
) -> StorageError:
    """`operation` and `uri` say what was tried, e.g. "read", "s3://bucket/key"."""
    where = f"{operation} {uri} at {endpoint or 'AWS'}"
    match error:
        case aws.NoCredentialsError() | aws.PartialCredentialsError() | aws.CredentialRetrievalError():
            names = " and ".join(CREDENTIALS_KEYS)
            expected = f"files {names} in {credentials_dir}" if credentials_dir else f"variables {names}"
            return CredentialsMissing(
                f"{where}: no credentials found; expected {expected}, or a cloud identity; create the Secret that "
                "storage.credentialsSecret names"
            )
        case aws.ClientError():
            return _answered(error, where)
        case aws.ParamValidationError() | aws.InvalidEndpointConfigurationError():
            return StorageError(f"{where}: {error}; correct the URI or storage.endpoint")
        case aws.SSLError():
            return Unreachable(
                f"{where}: TLS failed ({_short(error)}); storage.caBundle must hold the CA of the endpoint"
            )
    return Unreachable(f"{where}: no answer ({_short(error)}); check storage.endpoint and the network")


def _answered(error: aws.ClientError, where: str) -> StorageError:
    said = error.response.get("Error", {})
    code = str(said.get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    text = f"{where}: {code} ({said.get('Message') or status})"
    if code == "NoSuchBucket":
        return BucketNotFound(f"{text}; create the bucket, or correct the URI")
    if code in _LOST_RACE:
        return PreconditionFailed(f"{text}; somebody else wrote it first")
    if code in _MISSING_KEY:
        return NotFound(f"{text}; the object does not exist")
    if code in _DENIED:
        return AccessDenied(
            f"{text}; check the keys in the Secret that storage.credentialsSecret names, and its policy"
        )
    if code == "RequestTimeTooSkewed":
        return AccessDenied(f"{text}; the clock of this node is wrong: mend its time synchronisation")
    if code in {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}:
        return StorageError(f"{text}; the bucket is in another region: correct storage.region or storage.endpoint")
    if code == "NotImplemented":
        return StorageError(f"{text}; the server lacks this part of S3: conditional writes are needed")
    if code in _TRY_AGAIN or status >= _SERVER_ERROR:
        return Unreachable(f"{text}; the server failed, not the request")
    return StorageError(f"{text}; expected success")


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]
