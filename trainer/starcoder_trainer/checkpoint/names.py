"""Names of a checkpoint's tensors: state, parameter, and the box of the whole parameter that it holds."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from starcoder_trainer.failures import ConfigurationError

STATES = ("param", "exp_avg", "exp_avg_sq")

_PATTERN = re.compile(r"([a-z_]+)/([\w.]+)@(\d+(?:_\d+)*)x(\d+(?:_\d+)*)")


@dataclass(frozen=True)
class TensorName:
    state: str
    parameter: str
    offset: tuple[int, ...]
    """Of the first element in the whole parameter."""
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.state}/{self.parameter}@{'_'.join(map(str, self.offset))}x{'_'.join(map(str, self.shape))}"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def parse(text: str) -> TensorName:
    """Raises ConfigurationError for what is no such name."""
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ConfigurationError(
            f"checkpoint tensor {text!r}: expected <state>/<parameter>@<offset>x<shape>; "
            "it was written by another program"
        )
    offset, shape = (tuple(map(int, match[i].split("_"))) for i in (3, 4))
    if len(offset) != len(shape):
        raise ConfigurationError(f"checkpoint tensor {text!r}: offset and shape have different numbers of axes")
    return TensorName(match[1], match[2], offset, shape)
