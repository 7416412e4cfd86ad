"""What megatron-core needs to run where there is no CUDA device: the one place that knows.

Megatron names the `cuda` device in literals. On a machine without one, `prepare()` sends those to the CPU; on a machine
with one it does nothing, so that the rest of the trainer is the same code on both.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def device() -> torch.device:
    """Where this process trains: its current CUDA device, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU


class _NullStream:
    """Stands for a CUDA stream: on a CPU all is in order already."""

    def wait_stream(self, _: object) -> None: ...
    def wait_event(self, _: object) -> None: ...
    def synchronize(self) -> None: ...
    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *_: object) -> None: ...


class CudaLiteralsToCpu(TorchFunctionMode):
    """Inside, `device="cuda"` and `.cuda()` mean the CPU, and `tensor.type()` answers as if it were on a GPU.

    Megatron's distributed optimizer tells tensors apart by `type()` strings such as `torch.cuda.FloatTensor`, and its
    schedules count tokens in a tensor on `cuda`. Costs about a microsecond for each operation called from Python, a
    thousand of them in a forward pass of a small model; the backward pass does not come here.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return str(func(*args)).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def cuda_literals() -> contextlib.AbstractContextManager[object]:
    """The mode above where there is no CUDA device, else nothing."""
    return contextlib.nullcontext() if torch.cuda.is_available() else CudaLiteralsToCpu()


def prepare() -> None:
    """Point `torch.cuda`'s functions that megatron calls at the CPU. Nothing where a CUDA device is present."""
    if torch.cuda.is_available():
        return
    from megatron.core.tensor_parallel import random

    cuda: Any = torch.cuda
    cuda.is_available = _constant(False)  # torch would ask device_count, which is 1 from here on
    cuda.current_device = _constant(_CPU)
    cuda.device_count = _constant(1)
    cuda.current_stream = cuda.default_stream = lambda *_, **__: _NullStream()
    cuda.synchronize = cuda.empty_cache = cuda.set_device = _constant(None)
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # The tracker warns when the CPU's generator moved inside a CUDA fork; here they are one.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def _constant(value: object) -> Callable[..., object]:
    return lambda *_, **__: value


def hush() -> None:
    """Silence known noise for good: megatron warns of each optional library that is absent and of GPTModel."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings(
        "ignore", message="The .grad attribute of a Tensor that is not a leaf", category=UserWarning
    )
