"""The CUDA device of a worker: found, or an error that says what is missing.

A GPU that falls off the bus leaves its device file in the container, and torch then finds fewer devices or none at all.
Training on the CPU instead is never what the user wants.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from .failures import ConfigurationError, DeviceMissingError

_DEVICE_FILE = re.compile(r"nvidia\d+")
_HIDDEN = ("", "-1", "none", "void")


def take_device(local_index: int, dev: Path = Path("/dev"), environ: Mapping[str, str] = os.environ) -> str:
    """Makes the worker's device the current one. Returns the backend of its process group: `nccl`, or `gloo` where
    there is no GPU.

    Args:
        local_index: position among the workers of this Pod.

    Raises:
        DeviceMissingError: torch can use fewer devices than the Pod was given, or none of them.
        ConfigurationError: the Pod was given fewer devices than it has workers.
    """
    if not torch.cuda.is_available():
        if present := _given(dev, environ):
            raise DeviceMissingError(
                f"found {', '.join(present)}, and torch {torch.__version__} can use none of them; expected device "
                f"{local_index}. Look at the driver of the node (nvidia-smi, Xid in its kernel log); to train on the "
                "CPU all the same, set CUDA_VISIBLE_DEVICES to -1"
            )
        return "gloo"
    found, given = torch.cuda.device_count(), len(_given(dev, environ))
    if local_index >= found:
        told = f"found {found} CUDA devices in this Pod, expected at least {local_index + 1} (workers.gpusPerWorker)"
        if found < given:
            raise DeviceMissingError(
                f"{told}; it was given {given}, so one is lost: look at the node (nvidia-smi, Xid in its kernel log)"
            )
        raise ConfigurationError(told)
    torch.cuda.set_device(local_index)
    return "nccl"


def _given(dev: Path, environ: Mapping[str, str]) -> list[str]:
    """Device files of GPUs that a torch built for CUDA should be able to use. Where the container has none, nothing is
    known."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None or (visible is not None and visible.lower() in _HIDDEN):
        return []
    files = sorted(str(path) for path in dev.glob("nvidia*") if _DEVICE_FILE.fullmatch(path.name))
    return files if visible is None else files[: len(visible.split(","))]
