"""Exceptions that a person can mend, as the problem that the run's status shows."""

from __future__ import annotations

from starcoder_trainer.contract.report import Problem, ProblemReason
from starcoder_trainer.storage.store import AccessDenied, BucketNotFound, CredentialsMissing, StorageError

MESSAGE_CHARACTERS = 1000


def problem(reason: ProblemReason, message: str) -> Problem:
    return Problem(reason, message[:MESSAGE_CHARACTERS])


def storage_problem(error: StorageError) -> Problem:
    match error:
        case CredentialsMissing():
            return problem("CredentialsMissing", str(error))
        case AccessDenied():
            return problem("StorageAccessDenied", str(error))
        case BucketNotFound():
            return problem("BucketNotFound", str(error))
    return problem("StorageUnreachable", str(error))
