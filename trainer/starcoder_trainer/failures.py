"""Our exceptions, and what an exception that ended a worker means to the failure policy."""

from __future__ import annotations

import hashlib
import re
import traceback
from collections.abc import Iterable, Iterator
from pathlib import PurePath

from starcoder_trainer.contract import exits
from starcoder_trainer.contract.codec import ContractError
from starcoder_trainer.contract.report import Cause, Failure
from starcoder_trainer.storage.store import StorageError


class ConfigurationError(ValueError):
    """The run's configuration, data or checkpoint can't be what the user wants: another try would meet it again."""


class FormationError(RuntimeError):
    """The process group did not form."""


class DeviceMissingError(RuntimeError):
    """The Pod has fewer usable devices than it was given: one is broken, or its driver is."""


class DamagedCheckpointError(RuntimeError):
    """What the store holds is not what HEAD lists; the leader of the next attempt looks for an older checkpoint."""


class DivergedError(RuntimeError):
    """Loss or gradient norm is not a finite number."""


_EXIT_CODES: dict[Cause, int] = {
    "UserError": exits.USER_ERROR,
    "Storage": exits.STORAGE,
    "Peer": exits.PEER_LOST,
    "FormationTimeout": exits.FORMATION,
    "OutOfMemory": exits.CRASH,
    "DeviceError": exits.CRASH,
    "Crash": exits.CRASH,
}

_BROKEN_CONNECTION = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection (was )?(closed|refused|reset|aborted)|"
    r"failed to recv, got 0 bytes|remote process exited|socket closed|NCCL communicator was aborted|ncclRemoteError|"
    r"timed out waiting \d+ms for (recv|send) operation|caught collective operation timeout",
    re.IGNORECASE,
)

_GPU_WORDS = (
    r"\b(CUDA|HIP) (driver )?error|CUBLAS_STATUS_|CUDNN_STATUS_|uncorrectable (NVLink|ECC)|\bXid\b|"
    r"unspecified launch failure|GPU is lost|fallen off the bus|ncclUnhandledCuda|unhandled cuda error"
)
_GPU = re.compile(_GPU_WORDS, re.IGNORECASE)
_DEVICE = re.compile(_GPU_WORDS + r"|NCCL (WARN|error)|\bnccl(Unhandled|System|Internal)", re.IGNORECASE)
"""What CUDA, its libraries and the driver say, by their headers and by torch's c10/cuda and c10d. NCCL says some of it
of the network as well, which while a group forms is the likelier."""
_CODE_ON_DEVICE = re.compile(
    r"device-side assert triggered|no kernel image is available|invalid device ordinal|named symbol not found",
    re.IGNORECASE,
)
"""Errors of CUDA that the code or its image makes, on any device. torch ends every message about CUDA with advice on
device-side assertions, so the words of one that was triggered are needed."""
_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)
_VARIES = re.compile(r"0x[0-9a-f]+|\d+(\.\d+)?(e[-+]?\d+)?", re.IGNORECASE)
"""Parts of a message that differ from rank to rank and from time to time."""


def classify(error: BaseException) -> Cause:
    """Looks along the chain of causes, so that a storage error wrapped by a library stays a storage error."""
    for e, follows in _chain(error):
        match e:
            case StorageError() | DamagedCheckpointError():
                return "Storage"
            case FormationError():
                return "DeviceError" if any(_is_of_device(c, _GPU) for c, _ in _chain(e)) else "FormationTimeout"
            case ConfigurationError() | ContractError() | ImportError() if follows:
                return "UserError"
            case MemoryError():
                return "OutOfMemory"
            case RuntimeError() if _MEMORY.search(str(e)):
                return "OutOfMemory"
            case RuntimeError() | ConnectionError() if _BROKEN_CONNECTION.search(str(e)):
                return "Peer"
            case _ if _is_of_device(e, _DEVICE):
                return "DeviceError"
            case _:
                pass
    return "Crash"


def _is_of_device(error: BaseException, said: re.Pattern[str]) -> bool:
    return isinstance(error, DeviceMissingError) or (
        isinstance(error, RuntimeError) and _blames_device(str(error), said)
    )


def _blames_device(words: str, said: re.Pattern[str] = _DEVICE) -> bool:
    """`words` tell of an error of the device, and not of one that the code makes on any device."""
    return said.search(words) is not None and not _CODE_ON_DEVICE.search(words)


def cause_of_abort(lines: Iterable[str]) -> tuple[Cause, str]:
    """What ended a process that aborted (SIGABRT), by what it wrote last, and the line that says so.

    The watchdog of torch's NCCL process group ends its process by `std::terminate` when a peer is gone: no exception
    reaches Python (torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp).
    """
    told = [" ".join(line.split())[:1000] for line in lines]
    for line in reversed(told):
        if _BROKEN_CONNECTION.search(line):
            return "Peer", line
    for line in reversed(told):
        if _blames_device(line):
            return "DeviceError", line
    return "Crash", ""


def fingerprint(error: BaseException) -> str:
    """16 hex digits: the same for the same kind of error, raised at the same line, with the same words but for numbers.

    Whose fault it is, is not judged here: only a `Crash` has one in its report.
    """
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{PurePath(frames[-1].filename).name}:{frames[-1].name}:{frames[-1].lineno}" if frames else ""
    what = f"{type(error).__module__}.{type(error).__qualname__}"
    text = "|".join((what, where, _VARIES.sub("#", str(error))))
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def exit_code(cause: Cause) -> int:
    return _EXIT_CODES.get(cause, exits.CRASH)


def failure_of(error: BaseException, rank: int, iteration: int | None) -> Failure:
    """What the worker of `rank` tells before it ends."""
    cause = classify(error)
    text = " ".join(str(error).split()) or "no message"
    return Failure(
        cause,
        f"{type(error).__name__}: {text}"[:1000],
        exit_code(cause),
        rank,
        iteration,
        fingerprint(error) if cause == "Crash" else "",
    )


def _chain(error: BaseException) -> Iterator[tuple[BaseException, bool]]:
    """(exception, whether the one before it says that it follows from this one, and did not only meet it on its way:
    `except ImportError:` with another way inside is no import error)."""
    seen: set[int] = set()
    e: BaseException | None = error
    follows = True
    while e is not None and id(e) not in seen:
        seen.add(id(e))
        yield e, follows
        if e.__cause__ is None:
            follows = False
        e = e.__cause__ or (None if e.__suppress_context__ else e.__context__)
