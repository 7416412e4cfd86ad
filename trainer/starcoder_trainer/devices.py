"""The CUDA device of a worker: found, or an error that says what is missing.

A GPU that falls off the bus leaves its device file in the container, and torch then finds fewer devices or none at all.
A container runtime that knows nothing of GPUs injects none of those that the device plugin has allotted. Training on
the CPU instead is never what the user wants.
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
_OF_THE_IMAGE = "all"
"""NVIDIA_VISIBLE_DEVICES as images of NVIDIA set it, whatever the container is given; a device plugin names devices."""

_ON_THE_CPU = "to train on the CPU all the same, set CUDA_VISIBLE_DEVICES to -1"


def take_device(local_index: int, dev: Path = Path("/dev"), environ: Mapping[str, str] = os.environ) -> str:
    """Makes the worker's device the current one. Returns the backend of its process group: `nccl`, or `gloo` where
    there is no GPU.

    Args:
        local_index: position among the workers of this Pod.

    Raises:
        DeviceMissingError: torch can use fewer devices than the Pod was given, or none of them; or the container was
            never given those that the device plugin has allotted to it.
        ConfigurationError: the Pod was given fewer devices than it has workers.
    """
    if not torch.cuda.is_available():
        if present := _given(dev, environ):
            raise DeviceMissingError(
                f"found {', '.join(present)}, and torch {torch.__version__} can use none of them; expected device "
                f"{local_index}. Look at the driver of the node (nvidia-smi, Xid in its kernel log); {_ON_THE_CPU}"
            )
        if allotted := _allotted(environ):
            raise DeviceMissingError(
                f"found no device file of a GPU in {dev}, expected those of NVIDIA_VISIBLE_DEVICES={allotted}, "
                "allotted by the device plugin. The container runtime of the node did not inject them: set "
                f"workers.runtimeClassName (nvidia, as a rule), or mend the node's runtime; {_ON_THE_CPU}"
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
    """Device files of GPUs that a torch built for CUDA should be able to use."""
    if _trains_on_cpu(environ):
        return []
    files = sorted(str(path) for path in dev.glob("nvidia*") if _DEVICE_FILE.fullmatch(path.name))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    return files if visible is None else files[: len(visible.split(","))]


def _allotted(environ: Mapping[str, str]) -> str:
    """The devices that the device plugin names in the environment, as NVIDIA's does by default. Empty: none, or it
    tells the container runtime in another way."""
    named = environ.get("NVIDIA_VISIBLE_DEVICES", "")
    return "" if _trains_on_cpu(environ) or named.lower() in (*_HIDDEN, _OF_THE_IMAGE) else named


def _trains_on_cpu(environ: Mapping[str, str]) -> bool:
    """Whether it is meant to: by the user, or since torch is built for nothing else."""
    return torch.version.cuda is None or environ.get("CUDA_VISIBLE_DEVICES", "unset").lower() in _HIDDEN
