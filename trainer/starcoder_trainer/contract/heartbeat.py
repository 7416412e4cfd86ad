"""Heartbeats: what agents say to the one that takes them, their relay (`Assignment.relay`), and how often.

One JSON object a line over TCP; each beat is answered before the next. Nothing here is a secret: the relay's boot id,
which comes with the assignment, only keeps a beat from being taken by whoever got the address of an agent that is gone.
"""

from __future__ import annotations

from dataclasses import dataclass

from .codec import Document

MOST_BYTES = 1024
"""A line that is longer is no beat and no answer."""


@dataclass(frozen=True)
class Rhythm:
    seconds: float = 1.0
    """Between two beats."""
    missed: int = 3
    """So many in a row make an agent suspect; one that is late never does."""

    @property
    def silence(self) -> float:
        """Seconds without a beat after which an agent is suspect whose machine does not answer either, with a quarter
        of one for a beat on its way."""
        return self.seconds * (self.missed + 0.25)

    @property
    def stall(self) -> float:
        """The same of an agent that is silent though its machine answers: slow is not lost."""
        return 4 * self.silence

    @property
    def worry(self) -> float:
        """Seconds without an answer after which an agent speaks for itself: a beat before the relay suspects it."""
        return self.seconds * (self.missed - 0.75)

    @property
    def renewal(self) -> float:
        """Seconds between two renewals of the Lease of an agent that nobody speaks for."""
        return 2 * self.seconds


USUAL = Rhythm()


@dataclass(frozen=True)
class Beat(Document):
    to: str
    """Boot id of the agent that this is for."""
    member: int
    incarnation: int
    boot_id: str
    attempt: int
    """Highest that this agent knows of."""


@dataclass(frozen=True)
class Answer(Document):
    boot_id: str
    """Of the agent that answers."""
    relays: bool = False
    """It speaks for whoever beats to it: its own Lease is renewed, and names those it hears no more."""
    refused: str = ""
    """Why this beat does not count; empty where it does."""
