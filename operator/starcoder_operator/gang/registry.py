"""Which gang a run asks for."""

from __future__ import annotations

from starcoder_operator.api.v1alpha1 import StarCoderRunSpec

from .kueue import Kueue
from .native import Native
from .none import Alone
from .protocol import Gang

GANGS: dict[str, Gang] = {"Native": Native(), "Kueue": Kueue(), "None": Alone()}
"""Value of `spec.scheduling.gang` -> what carries it out."""


def gang_of(spec: StarCoderRunSpec) -> Gang:
    return GANGS[spec.scheduling.gang]
