"""No gang: each Pod is placed by itself, and those that found a place wait for the others."""

from __future__ import annotations

from starcoder_operator.adapters.kinds import Manifest
from starcoder_operator.api.v1alpha1 import StarCoderRunSpec

from .protocol import Group


class Alone:
    @property
    def group(self) -> Group | None:
        return None

    def joined(self, spec: StarCoderRunSpec, name: str, *, size: int, member: int) -> Manifest:
        return {}

    def membership(self, pod: Manifest) -> str:
        return ""

    def size(self, pod: Manifest) -> int:
        return 0
