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
    changed: bool
    """It has looked otherwise before."""
    returned: float = float("-inf")
    """When it changed after having been silent."""


@dataclass
class Sightings:
    """Remembers for each thing its last look and since when it looks so.

    A thing seen for the first time has age 0: after a start of the operator nothing is old. The same after a time in
    which we could not see (`blind`): silence then says nothing about the thing.
    """

    clock: Clock
    silent: float = 15.0
    """Seconds without a change after which one is silent."""
    _seen: dict[str, _Sighting] = field(default_factory=dict)
    _unheard: dict[str, dict[int, float]] = field(default_factory=dict)
    """Boot id of a relay -> its suspects and when it spoke for each the last time."""
    _blind_until: float = float("-inf")

    def age(self, key: str, fingerprint: str = "") -> float:
        """Seconds for which `key` has been seen to look like `fingerprint`."""
        now = self.clock.monotonic()
        sighting = self._seen.get(key)
        if sighting is None or sighting.print != fingerprint:
            self._forget(now)
            new = self._seen[key] = _Sighting(fingerprint, now, now, sighting is not None)
            if sighting is not None:
                new.returned = now if now - sighting.since >= self.silent else sighting.returned
            return 0.0
        sighting.asked = now
        return now - max(sighting.since, self._blind_until)

    def speaks(self, group: str, key: str, fingerprint: str) -> float:
        """As `age`, of one of a group that is silent as long as all its members are."""
        known = self._seen.get(key)
        if known is None or known.print != fingerprint:
            self.age(group, f"{key} {fingerprint}")
        return self.age(key, fingerprint)

    def relay(self, boot_id: str, renewed: str, suspects: tuple[int, ...]) -> None:
        """An agent has renewed its Lease, and speaks for whoever names it its relay, but for its suspects."""
        key = f"agent/{boot_id}"
        before, known = self._seen.get(key), self._unheard.pop(boot_id, {})
        self.age(key, renewed)
        last = before.since if before is not None else self.clock.monotonic()
        if suspects:
            self._unheard[boot_id] = {member: known.get(member, last) for member in suspects}

    def age_by(self, boot_id: str, member: int) -> float | None:
        """Seconds since that agent, which may be gone, spoke for the member; None where it was never seen."""
        sighting = self._seen.get(f"agent/{boot_id}")
        if sighting is None:
            return None
        now = sighting.asked = self.clock.monotonic()
        return now - max(self._unheard.get(boot_id, {}).get(member, sighting.since), self._blind_until)

    def heard_for(self, key: str) -> float:
        """Seconds since `key` was silent the last time: 0 while it is, infinite where it never was."""
        sighting = self._seen.get(key)
        now = self.clock.monotonic()
        return 0.0 if sighting is None or now - sighting.since >= self.silent else now - sighting.returned

    def witnessed(self, key: str) -> bool:
        """Whether `key` was seen to change since we can see."""
        sighting = self._seen.get(key)
        return sighting is not None and sighting.changed and sighting.since > self._blind_until

    def blind(self) -> None:
        """Until now we could not see."""
        self._blind_until = self.clock.monotonic()

    def _forget(self, now: float) -> None:
        if len(self._seen) % 256 == 0:
            for key in [k for k, s in self._seen.items() if now - s.asked > FORGET_AFTER]:
                del self._seen[key]
                self._unheard.pop(key.removeprefix("agent/"), None)


def agents_of(namespace: str, run: str) -> str:
    """Key of all agents of a run."""
    return f"agents/{namespace}/{run}"


def lease_sighting(lease: Manifest) -> tuple[str, str]:
    """(key, look) of a member's Lease for `Sightings`: it looks new when it was renewed or its report changed."""
    meta = lease["metadata"]
    report = (meta.get("annotations") or {}).get(ANNOTATION_REPORT, "")
    return f"lease/{meta.get('uid', '')}", f"{renewed(lease)}\n{report}"


def renewed(lease: Manifest) -> str:
    return (lease.get("spec") or {}).get("renewTime") or ""
