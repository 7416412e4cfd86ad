"""The CUDA device of a worker: found, or an error that says what is missing.

A GPU that falls off the bus leaves its device file in the container, and torch then finds fewer devices or none at all.
Training on what is left, or on the CPU, is never what the user wants.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from .failures import DeviceMissingError

_DEVICE_FILE = re.compile(r"nvidia\d+")
_HIDDEN = ("", "-1", "none", "void")


def take_device(local_index: int, dev: Path = Path("/dev"), environ: Mapping[str, str] = os.environ) -> str:
    """Makes the worker's device the current one. Returns the backend of its process group: `nccl`, or `gloo` where
    there is no GPU.

    Args:
        local_index: position among the workers of this Pod.

    Raises:
        DeviceMissingError: the Pod has fewer devices than workers, or torch can use none of those that it has.
    """
    if not torch.cuda.is_available():
        if present := _given(dev, environ):
            raise DeviceMissingError(
                f"found {', '.join(present)}, and torch {torch.__version__} can use none of them; expected device "
                f"{local_index}. Look at the driver of the node (nvidia-smi, Xid in its kernel log); to train on the "
                "CPU all the same, set CUDA_VISIBLE_DEVICES to -1"
            )
        return "gloo"
    found = torch.cuda.device_count()
    if local_index >= found:
        raise DeviceMissingError(
            f"found {found} CUDA devices in this Pod, expected at least {local_index + 1} (workers.gpusPerWorker); one "
            "that was there is lost: look at the node (nvidia-smi, Xid in its kernel log)"
        )
    torch.cuda.set_device(local_index)
    return "nccl"


def _given(dev: Path, environ: Mapping[str, str]) -> list[str]:
    """Device files of GPUs that a torch built for CUDA should be able to use."""
    if torch.version.cuda is None or environ.get("CUDA_VISIBLE_DEVICES", "all").lower() in _HIDDEN:
        return []
    return sorted(str(path) for path in dev.glob("nvidia*") if _DEVICE_FILE.fullmatch(path.name))
