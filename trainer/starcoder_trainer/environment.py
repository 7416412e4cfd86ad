"""Variables that must be set before torch, numpy or megatron are imported. Imports nothing heavy itself."""

from __future__ import annotations

import os


def set_environment() -> None:
    """What the user has set stays, but for OPENBLAS_NUM_THREADS.

    One OpenMP thread a process unless told otherwise: several workers share the cores of a Pod. The fork server must
    have no second thread at all, and OpenBLAS would start its own when numpy is imported.
    """
    for name, value in {
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # megatron's jit_fuser would compile at each restart, and needs a compiler
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # is_available() must not initialise CUDA before a fork
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_FR_BUFFER_SIZE": "256",  # collectives that the flight recorder keeps: a hang is told with its own
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # megatron's order of kernels under tensor parallelism counts on it
    }.items():
        os.environ.setdefault(name, value)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
