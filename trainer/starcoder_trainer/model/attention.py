"""Causal attention for multi-query and grouped-query heads, by the fastest kernel that can do what is asked.

Megatron's own DotProductAttention materialises the `[b * heads, s, s]` scores: at 8,192 tokens that is 256 MiB a head
in fp32, so it is not among the choices.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from starcoder_trainer.failures import ConfigurationError

Backend = Literal["flash-attn-4", "flash-attn-3", "flash-attn-2", "sdpa"]
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(q `[b, s, heads, d]`, k and v `[b, s, groups, d]`, dropout probability) -> `[b, s, heads, d]`."""


@dataclass(frozen=True)
class Demands:
    """What the kernel must be able to do."""

    cuda_capability: tuple[int, int] | None
    """None: no CUDA device."""
    half_precision: bool
    dropout: bool


@dataclass(frozen=True)
class _FlashVersion:
    backend: Backend
    module: str
    capabilities: tuple[int, ...]
    """Major compute capabilities it has kernels for."""
    has_dropout: bool


_FLASH = (
    _FlashVersion("flash-attn-4", "flash_attn.cute", (9, 10), False),
    _FlashVersion("flash-attn-3", "flash_attn_interface", (9,), False),
    _FlashVersion("flash-attn-2", "flash_attn", (8, 9, 10, 12), True),
)


def demands(half_precision: bool, dropout: float) -> Demands:
    """Of this process's device. Touches CUDA where there is one."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return Demands(capability, half_precision, dropout > 0)


def choose(asked: str, needs: Demands) -> tuple[Backend, str]:
    """The backend and why, e.g. `("sdpa", "flash-attn-4: no CUDA device; ...")`.

    Raises:
        ConfigurationError: `asked` is not `auto` and can't be used here.
    """
    if asked == "sdpa":
        return "sdpa", "asked for"
    reasons: list[str] = []
    for version in _FLASH:
        if asked not in ("auto", version.backend):
            continue
        obstacle = _obstacle(version, needs)
        if obstacle is None:
            return version.backend, "asked for" if asked != "auto" else "; ".join([*reasons, "usable"])
        reasons.append(f"{version.backend}: {obstacle}")
    if asked != "auto":
        raise ConfigurationError(
            f"training.attentionBackend: {asked} was asked for and can't be used ({'; '.join(reasons) or 'unknown'}); "
            "install it in the image, or choose auto"
        )
    return "sdpa", "; ".join(reasons)


def _obstacle(version: _FlashVersion, needs: Demands) -> str | None:
    if needs.cuda_capability is None:
        return "no CUDA device"
    if needs.cuda_capability[0] not in version.capabilities:
        return "no kernel for compute capability {}.{}".format(*needs.cuda_capability)
    if not needs.half_precision:
        return "needs bf16"
    if needs.dropout and not version.has_dropout:
        return "has no dropout"
    try:
        importlib.import_module(version.module)
    except ImportError as e:
        return f"not importable ({e})"
    return None


def kernel(backend: Backend) -> Kernel:
    """Imports what the backend needs."""
    if backend == "sdpa":
        return _sdpa
    version = next(v for v in _FLASH if v.backend == backend)
    flash = importlib.import_module(version.module).flash_attn_func

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
        out = flash(q, k, v, dropout_p=dropout, causal=True) if version.has_dropout else flash(q, k, v, causal=True)
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result

    return call


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    share = q.shape[1] // k.shape[1]
    if share > 1:
        # Stride 0 for MQA: no copy of keys and values is made for each head.
        k, v = (
            x.unsqueeze(2).expand(-1, -1, share, -1, -1).reshape(q.shape) if x.shape[1] > 1 else x.expand(q.shape)
            for x in (k, v)
        )
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True).transpose(1, 2)


class CoreAttention(torch.nn.Module):
    """Megatron's `core_attention`: softmax(q k^T / sqrt(d)) v under a causal mask.

    Head counts come from the shapes: under tensor parallelism each rank sees its share of query heads, and with MQA
    the one key/value head.
    """

    def __init__(self, config: Any, *, backend: Backend, **_megatron: Any) -> None:
        super().__init__()
        self.kernel = kernel(backend)
        self.dropout = float(config.attention_dropout)
        self.sequence_parallel = bool(config.sequence_parallel)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **_megatron: Any,
    ) -> torch.Tensor:
        """q `[s, b, heads / TP, d]`, k and v `[s, b, groups / TP, d]` -> `[s, b, heads / TP * d]`.

        Raises:
            ValueError: a mask was passed; the mask here is always causal.
        """
        if attention_mask is not None:
            raise ValueError("CoreAttention: found an attention mask, expected None (it is causal by itself)")
        dropout = self.dropout if self.training else 0.0
        # Each tensor rank drops other heads' weights. Under sequence parallelism the block has forked already.
        with self._rng() if dropout > 0 and not self.sequence_parallel else contextlib.nullcontext():
            out = self.kernel(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), dropout)
        s, b = query.shape[:2]
        return out.transpose(0, 1).reshape(s, b, math.prod(query.shape[2:]))

    @staticmethod
    def _rng() -> contextlib.AbstractContextManager[None]:
        from megatron.core import tensor_parallel

        fork: contextlib.AbstractContextManager[None] = tensor_parallel.get_cuda_rng_tracker().fork()
        return fork
