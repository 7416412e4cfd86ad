"""Which agents are heard, and by whom: what Leases, and the suspicions written in them, say about silence.

An agent renews its Lease, or beats to a relay that speaks for it (`LeaseView.age` takes both in). A suspicion alone
condemns nobody: whoever renews its own Lease all the same lives, and has only lost its way to the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from starcoder_trainer.contract.heartbeat import Rhythm

from .snapshot import LeaseView, Snapshot, own_assignment


@dataclass(frozen=True)
class Limits:
    """Seconds of silence and what they mean."""

    stale: float = 15.0
    """An agent that nobody suspects is not counted on any more."""
    suspected: float = 3.0
    """Nor is one that is suspected and has not renewed its own Lease for so long."""
    heard: float = 6.0
    """For so long after its last sign of life an agent's own suspicions count, and it vouches for a node whose kubelet
    is silent: where the API server was away, nodes are Unknown for a moment though nothing happened to them. It is also
    the grace of a suspect after the operator or the API server was away."""

    @classmethod
    def of(cls, rhythm: Rhythm, stale: float) -> Limits:
        beats = rhythm.seconds * rhythm.missed
        return cls(stale=stale, suspected=beats, heard=2 * beats)

    def of_suspect(self, lease: LeaseView) -> float:
        """Seconds without a renewal of its own after which a suspect is not counted on."""
        return self.suspected if lease.witnessed else self.heard


USUAL = Limits()


def suspects(snapshot: Snapshot, limits: Limits) -> frozenset[int]:
    """Members that missed several heartbeats in a row, by agents that are heard themselves: the relay suspects those
    that beat to it, and they suspect it."""
    current = own_assignment(snapshot)
    relay = current.relay if current is not None else None
    if relay is None:
        return frozenset()

    def said() -> Iterator[int]:
        for lease in snapshot.leases:
            report = lease.report
            if report is None or not lease.witnessed or lease.renewed >= limits.heard:
                continue
            if report.boot_id == relay.boot_id:
                yield from report.suspects
            elif relay.member in report.suspects:
                yield relay.member

    return frozenset(said())
