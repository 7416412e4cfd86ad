"""Since when have we seen what we see? Ages by our own clock, which clocks of other machines can't upset."""

from __future__ import annotations

from dataclasses import dataclass, field

from starcoder_trainer.contract.names import ANNOTATION_REPORT

from .clock import Clock
from .kinds import Manifest

FORGET_AFTER = 3600.0
"""Seconds after which a thing nobody asks about is forgotten."""


@dataclass
class _Sighting:
    print: str
    since: float
    asked: float


@dataclass
class Sightings:
    """Remembers for each thing its last look and since when it looks so.

    A thing seen for the first time has age 0: after a start of the operator nothing is old. The same after a time in
    which we could not see (`blind`): silence then says nothing about the thing.
    """

    clock: Clock
    _seen: dict[str, _Sighting] = field(default_factory=dict)
    _blind_until: float = float("-inf")

    def age(self, key: str, fingerprint: str = "") -> float:
        """Seconds for which `key` has been seen to look like `fingerprint`."""
        now = self.clock.monotonic()
        sighting = self._seen.get(key)
        if sighting is None or sighting.print != fingerprint:
            self._forget(now)
            self._seen[key] = _Sighting(fingerprint, now, now)
            return 0.0
        sighting.asked = now
        return now - max(sighting.since, self._blind_until)

    def blind(self) -> None:
        """Until now we could not see."""
        self._blind_until = self.clock.monotonic()

    def _forget(self, now: float) -> None:
        if len(self._seen) % 256 == 0:
            for key in [k for k, s in self._seen.items() if now - s.asked > FORGET_AFTER]:
                del self._seen[key]


def lease_sighting(lease: Manifest) -> tuple[str, str]:
    """(key, look) of a member's Lease for `Sightings`: it looks new when it was renewed or its report changed."""
    meta = lease["metadata"]
    report = (meta.get("annotations") or {}).get(ANNOTATION_REPORT, "")
    renewed = (lease.get("spec") or {}).get("renewTime") or ""
    return f"lease/{meta.get('uid', '')}", f"{renewed}\n{report}"
