"""What an exception means to the failure policy."""

from __future__ import annotations

import pytest
import torch

from starcoder_trainer.contract import exits
from starcoder_trainer.contract.codec import ContractError
from starcoder_trainer.contract.report import Cause
from starcoder_trainer.failures import ConfigurationError, FormationError, classify, failure_of
from starcoder_trainer.storage.store import AccessDenied, Unreachable


def chained(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "cause", "code"),
    [
        (ConfigurationError("x"), "UserError", exits.USER_ERROR),
        (ContractError("x"), "UserError", exits.USER_ERROR),
        (ModuleNotFoundError("No module named 'flash_attn'"), "UserError", exits.USER_ERROR),
        (Unreachable("x"), "Storage", exits.STORAGE),
        (chained(RuntimeError("data pipeline"), AccessDenied("x")), "Storage", exits.STORAGE),
        (FormationError("x"), "FormationTimeout", exits.FORMATION),
        (chained(FormationError("x"), RuntimeError("Connection reset by peer")), "FormationTimeout", exits.FORMATION),
        (MemoryError(), "OutOfMemory", exits.CRASH),
        (torch.OutOfMemoryError("CUDA out of memory."), "OutOfMemory", exits.CRASH),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: x"), "OutOfMemory", exits.CRASH),
        (RuntimeError("gloo/pair.cc:561] Connection closed by peer [10.0.0.1]:1"), "Peer", exits.PEER_LOST),
        (RuntimeError("gloo/pair.cc:545] Read error [10.0.0.1]: Connection reset by peer"), "Peer", exits.PEER_LOST),
        (torch.distributed.DistBackendError("NCCL error: ncclRemoteError: remote process exited"), "Peer", 75),
        (BrokenPipeError(32, "Broken pipe"), "Peer", exits.PEER_LOST),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "Crash", exits.CRASH),
        (ZeroDivisionError("division by zero"), "Crash", exits.CRASH),
    ],
)
def test_an_exception_is_told_apart_by_what_mends_it(error: Exception, cause: Cause, code: int) -> None:
    failure = failure_of(error, rank=3, iteration=17)
    assert classify(error) == failure.cause == cause
    assert failure.exit_code == code
    assert (failure.rank, failure.iteration) == (3, 17)


def test_the_message_is_one_line_with_the_kind_of_error_and_not_endless() -> None:
    message = failure_of(RuntimeError("first\nsecond " + "x" * 5000), 0, None).message
    assert message.startswith("RuntimeError: first second x")
    assert len(message) == 1000
