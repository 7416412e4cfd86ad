"""What an exception means to the failure policy."""

from __future__ import annotations

import pytest
import torch

from starcoder_trainer.contract import exits
from starcoder_trainer.contract.codec import ContractError
from starcoder_trainer.contract.report import Cause
from starcoder_trainer.failures import (
    ConfigurationError,
    DamagedCheckpointError,
    DeviceMissingError,
    DivergedError,
    FormationError,
    cause_of_abort,
    classify,
    failure_of,
)
from starcoder_trainer.storage.store import AccessDenied, Unreachable

ADVICE = (
    "\nSearch for `cudaErrorECCUncorrectable' in https://docs.nvidia.com/cuda/ for more information."
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
    "\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
"""torch ends each message about CUDA with it (c10/cuda/CUDAException.cpp)."""


def chained(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


def met_on_the_way(outer: Exception, inner: Exception) -> Exception:
    """As `except ImportError:` with another way inside leaves it."""
    outer.__context__ = inner
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
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "DeviceError", exits.CRASH),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling x"), "DeviceError", exits.CRASH),
        (torch.distributed.DistBackendError("NCCL error: unhandled cuda error"), "DeviceError", exits.CRASH),
        (chained(ValueError("in backward"), RuntimeError("CUDA error: uncorrectable ECC")), "DeviceError", exits.CRASH),
        (RuntimeError("CUDA error: device-side assert triggered"), "Crash", exits.CRASH),
        (torch.AcceleratorError("CUDA error: device-side assert triggered" + ADVICE), "Crash", exits.CRASH),
        (
            torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered" + ADVICE),
            "DeviceError",
            exits.CRASH,
        ),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered" + ADVICE), "DeviceError", 70),
        (torch.AcceleratorError("CUDA error: out of memory" + ADVICE), "OutOfMemory", exits.CRASH),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"), "OutOfMemory", exits.CRASH),
        (DeviceMissingError("found 7 CUDA devices"), "DeviceError", exits.CRASH),
        (chained(FormationError("x"), torch.AcceleratorError("CUDA error: unknown error" + ADVICE)), "DeviceError", 70),
        (chained(FormationError("x"), RuntimeError("NCCL error: ncclSystemError: socket")), "FormationTimeout", 76),
        (met_on_the_way(ValueError("x"), ImportError("no orjson, json will do")), "Crash", exits.CRASH),
        (chained(ValueError("x"), ImportError("no orjson")), "UserError", exits.USER_ERROR),
        (DamagedCheckpointError("a1/step-00000004/manifest.json: it was overwritten"), "Storage", exits.STORAGE),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "Crash", exits.CRASH),
        (ZeroDivisionError("division by zero"), "Crash", exits.CRASH),
    ],
)
def test_an_exception_is_told_apart_by_what_mends_it(error: Exception, cause: Cause, code: int) -> None:
    failure = failure_of(error, rank=3, iteration=17)
    assert classify(error) == failure.cause == cause
    assert failure.exit_code == code
    assert (failure.rank, failure.iteration) == (3, 17)


WATCHDOG = (
    "[rank3]:[E1125 22:00:00 ProcessGroupNCCL.cpp:1834] [PG ID 0 PG GUID 0 Rank 3] Process group watchdog thread "
    "terminated with exception: NCCL error: remote process exited or there was a network error, NCCL version 2.27.5"
)


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        ([WATCHDOG, "terminate called after throwing an instance of 'c10::DistBackendError'"], "Peer"),
        (["[E ProcessGroupNCCL.cpp:629] [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(...)"], "Peer"),
        (["Last error: socketStartConnect: connect to 10.0.0.1<4711> failed: Connection refused"], "Peer"),
        (["what(): CUDA error: uncorrectable ECC error encountered", "Fatal Python error: Aborted"], "DeviceError"),
        (["Assertion `index < size' failed."], "Crash"),
        (["what(): CUDA error: device-side assert triggered", "Fatal Python error: Aborted"], "Crash"),
        ([], "Crash"),
    ],
)
def test_an_abort_is_told_apart_by_what_the_process_wrote_last(lines: list[str], cause: Cause) -> None:
    found, line = cause_of_abort(lines)
    assert found == cause
    assert line in lines or (cause, line) == ("Crash", "")


def test_the_message_is_one_line_with_the_kind_of_error_and_not_endless() -> None:
    message = failure_of(RuntimeError("first\nsecond " + "x" * 5000), 0, None).message
    assert message.startswith("RuntimeError: first second x")
    assert len(message) == 1000


def raised(error: Exception) -> Exception:
    try:
        raise error
    except type(error) as e:
        return e


def test_the_same_error_of_the_code_has_one_fingerprint_whatever_numbers_its_message_holds() -> None:
    one, other = (
        failure_of(raised(IndexError(f"token {number} at 0x{number:x}")), rank, 7)
        for rank, number in ((0, 512), (3, 77))
    )
    assert one.fingerprint == other.fingerprint
    assert len(one.fingerprint) == 16


def test_another_kind_place_or_sentence_is_another_fingerprint() -> None:
    same_place = [raised(e) for e in (IndexError("token 5"), KeyError("token 5"), IndexError("sample 5"))]
    errors = [*same_place, IndexError("token 5")]
    assert len({failure_of(e, 0, 7).fingerprint for e in errors}) == 4


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: unspecified launch failure"), Unreachable("x"), BrokenPipeError(32, "Broken pipe")],
)
def test_what_the_code_did_not_do_has_no_fingerprint(error: Exception) -> None:
    assert failure_of(raised(error), 0, 7).fingerprint == ""


def test_a_loss_that_is_no_number_is_an_error_of_the_code() -> None:
    assert failure_of(raised(DivergedError("iteration 8: loss is nan")), 0, 7).fingerprint
