"""No gang: each Pod is placed by itself, and those that found a place wait for the others."""

from __future__ import annotations

from starcoder_operator.adapters.kinds import Manifest

from .protocol import Group


class Alone:
    @property
    def group(self) -> Group | None:
        return None

    def joined(self, name: str) -> Manifest:
        return {}

    def membership(self, pod: Manifest) -> str:
        return ""
