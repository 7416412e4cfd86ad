"""What a step cost: seconds by phase, floating-point operations, utilisation. Pure but for the clock that is passed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starcoder_trainer.contract.config import ModelConfig

_PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "H20": 148e12,
    "A10": 125e12,
    "L4": 121e12,
}
"""Dense tensor-core peak by what the device's name contains; the first match counts, so H20 stands after H200."""


def peak_flops(device_name: str) -> float | None:
    """bf16 operations a second without sparsity; None for a device that is not in the table."""
    words = device_name.replace("-", " ").split()
    for key, peak in _PEAK_BF16_FLOPS.items():
        if all(part in words for part in key.split()):
            return peak
    return None


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Forward and backward of one token: 6 a weight that is multiplied (tied output layer included), and the s x s
    products of attention counted in full, as Megatron-LM and PaLM count them; recomputation is not counted."""
    width = model.attention_heads * model.head_dim
    kv = 2 * model.query_groups * model.head_dim
    layer = model.hidden_size * (2 * width + kv) + 2 * model.hidden_size * model.ffn_hidden_size
    weights = model.layers * layer + model.vocab_size * model.hidden_size
    return 6.0 * weights + 12.0 * model.layers * width * sequence_length


def utilisation(flops_a_token: float, tokens_per_second: float, devices: int, peak: float | None) -> float | None:
    """Share of the devices' peak; None where the peak is not known."""
    return None if peak is None else flops_a_token * tokens_per_second / (devices * peak)


class PhaseTimer:
    """Seconds by phase since the last `take()`. On CUDA `synchronise` makes the clock wait for the device."""

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        synchronise: Callable[[], None] | None = None,
        entered: Callable[[str], None] | None = None,
    ) -> None:
        """`entered` is told each phase as it begins."""
        self._clock = clock
        self._synchronise = synchronise or (lambda: None)
        self._entered = entered or (lambda _: None)
        self._seconds: dict[str, float] = {}
        self._since = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._entered(name)
        start = self._clock()
        try:
            yield
        finally:
            self._synchronise()
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def take(self) -> dict[str, float]:
        """Sums by phase and `total` (wall time) since the last call; starts anew."""
        now = self._clock()
        seconds = {**self._seconds, "total": now - self._since}
        self._seconds, self._since = {}, now
        return seconds
