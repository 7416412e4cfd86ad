"""What a person can mend, as the problem that the run's status shows."""

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


def worker_not_ready(pod: str, seconds: int) -> Problem:
    return problem(
        "WorkerNotReady",
        f"the worker container of Pod {pod} did not answer for {seconds} s, expected its fork server; see "
        f"`kubectl logs {pod} -c worker`",
    )


def workers_stuck(pod: str, attempt: int, seconds: float) -> Problem:
    return problem(
        "WorkersStuck",
        f"workers of attempt {attempt} in Pod {pod} did not end within {seconds:.0f} s of SIGKILL: they wait inside "
        "the kernel, or their container is frozen; the Pod is replaced, look at the node",
    )


def grace_exceeded(pod: str, seconds: float, left_at: int | None, newest: int | None) -> Problem:
    """What was to be saved before the Pod ended is not whole.

    Args:
        left_at: iteration that the workers saved; None where they have not come to it.
        newest: iteration of the newest verified checkpoint, where one is known.
    """
    what = (
        f"the checkpoint of iteration {left_at} is not whole in S3"
        if left_at is not None
        else "the workers have not come to the end of their iteration"
    )
    there = f", iteration {newest}" if newest is not None else ""
    return problem(
        "GraceExceeded",
        f"Pod {pod} ends: {what} after {seconds:.0f} s; training goes on from the newest verified checkpoint{there}. "
        "Raise workers.terminationGracePeriodSeconds",
    )
