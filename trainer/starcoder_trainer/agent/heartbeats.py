"""Heartbeats without the network: whom an agent hears, who hears it, and what it has to say about that.

One agent, the relay, takes the beats of all others and names in its report those that it hears no more; the others
then need not renew their Leases. Where the relay is silent, each speaks for itself again. Pure, like `machine`.

An agent that only has no CPU is not lost: its kernel still answers, so its connection stands. It is suspected later.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from starcoder_trainer.contract.assignment import Assignment, Endpoint, Relay
from starcoder_trainer.contract.heartbeat import Answer, Beat, Rhythm
from starcoder_trainer.contract.report import Report

TRUSTED_RENEWALS = 3
"""A relay whose Lease was not renewed for so many renewals speaks for nobody: the operator does not hear it."""


@dataclass(frozen=True)
class Standing:
    """What an agent's report says of heartbeats."""

    relayed_by: str = ""
    suspects: tuple[int, ...] = ()

    def told(self, report: Report, listens: Endpoint) -> Report:
        """The report as it goes into the Lease of an agent that takes heartbeats at `listens`."""
        return replace(report, listens=listens, relayed_by=self.relayed_by, suspects=self.suspects)


def is_news(before: Report, report: Report) -> bool:
    """Whether more than progress changed. That a relay now speaks for this agent can wait, that none does can't."""
    if before.relayed_by and before.relayed_by != report.relayed_by:
        return True
    return replace(before, progress=None, relayed_by="") != replace(report, progress=None, relayed_by="")


def is_relayed(written: Report, report: Report) -> bool:
    """Whether a relay speaks for this agent and the Lease as `written` says so: then it is not renewed."""
    return bool(written.relayed_by) and report.relayed_by == written.relayed_by


@dataclass
class _Heard:
    boot_id: str
    incarnation: int
    """-1: it is listed and has not beaten yet."""
    at: float
    connected: bool = False
    """Its connection stands: the kernel of its machine answers, whatever keeps the agent from beating."""


class WakingTime:
    """Seconds for which this agent was awake.

    In a standstill of its own (a stopped process, a machine out of CPU) it hears nobody, which says nothing of the
    others: of a gap between two questions no more than `longest` seconds count.
    """

    def __init__(self, now: float, longest: float) -> None:
        self._last, self._longest, self._slept = now, longest, 0.0

    def __call__(self, now: float) -> float:
        self._slept += max(0.0, now - self._last - self._longest)
        self._last = now
        return now - self._slept


class Heartbeats:
    """One agent's part. `now` is in seconds of any clock that only goes forward; asked at least once a beat."""

    def __init__(self, *, member: int, incarnation: int, boot_id: str, rhythm: Rhythm, now: float) -> None:
        self._member, self._incarnation, self._boot_id = member, incarnation, boot_id
        self._rhythm = rhythm
        self._awake = WakingTime(now, 1.25 * rhythm.seconds)
        self._attempt = 0
        self._relay: Relay | None = None
        self._listed: dict[int, str] = {}
        self._heard: dict[int, _Heard] = {}
        self._renewed = self._answered = self._reached = self._awake(now)
        self._answer: Answer | None = None

    # What happens

    def assigned(self, now: float, assignment: Assignment) -> None:
        """The assignment as the API server has it now."""
        if assignment.attempt < self._attempt:
            return
        at = self._awake(now)
        self._attempt = assignment.attempt
        if assignment.relay != self._relay:
            self._relay, self._answer, self._answered, self._reached = assignment.relay, None, at, at
        if not self._is_relay:
            self._listed, self._heard = {}, {}
            return
        self._listed = {m.index: m.boot_id for m in assignment.members if m.boot_id and m.index != self._member}
        for member, boot_id in self._listed.items():
            known = self._heard.get(member)
            if known is None or known.boot_id != boot_id:
                self._heard[member] = _Heard(boot_id, -1, at)

    def renewed(self, now: float) -> None:
        """The API server has taken this agent's Lease."""
        self._renewed = self._awake(now)

    def take(self, now: float, beat: Beat) -> Answer:
        """Another agent's beat has come in."""
        at = self._awake(now)
        if refused := self._refusal(beat):
            return Answer(self._boot_id, refused=refused)
        if not self._is_relay:
            return Answer(self._boot_id)
        self._heard[beat.member] = _Heard(beat.boot_id, beat.incarnation, at, connected=True)
        return Answer(self._boot_id, relays=at - self._renewed < TRUSTED_RENEWALS * self._rhythm.renewal)

    def broke(self, boot_id: str) -> None:
        """The last connection over which that agent beat is gone."""
        for heard in self._heard.values():
            if heard.boot_id == boot_id:
                heard.connected = False

    def reached(self, now: float) -> None:
        """A connection to the relay was made: its machine answers, and something listens there."""
        self._reached = self._awake(now)

    def answered(self, now: float, answer: Answer) -> None:
        """The relay, if it is the one, has answered a beat."""
        if self._relay is not None and answer.boot_id == self._relay.boot_id:
            self._answer, self._answered = answer, self._awake(now)
            self._reached = self._answered

    # What follows

    @property
    def connected(self) -> tuple[str, ...]:
        """Boot ids of the agents whose connections stand, as far as this one was told."""
        return tuple(heard.boot_id for heard in self._heard.values() if heard.connected)

    @property
    def target(self) -> Relay | None:
        """Whom to beat to; None: nobody."""
        return None if self._is_relay else self._relay

    def beat(self, relay: Relay) -> Beat:
        return Beat(relay.boot_id, self._member, self._incarnation, self._boot_id, self._attempt)

    def standing(self, now: float) -> Standing:
        at, relay = self._awake(now), self._relay
        if relay is None:
            return Standing()
        if self._is_relay:
            silent = (m for m, heard in self._heard.items() if self._is_suspect(at - heard.at, heard.connected))
            return Standing(suspects=tuple(sorted(silent)))
        silence = at - self._answered
        if self._answer is not None and self._answer.relays and silence < self._rhythm.worry:
            return Standing(relayed_by=relay.boot_id)
        suspect = self._is_suspect(silence, at - self._reached < self._rhythm.silence)
        return Standing(suspects=(relay.member,) if suspect else ())

    def longest_silence(self, now: float) -> float:
        """Seconds since the quietest of those that this agent listens to was heard; 0 where there is none."""
        at = self._awake(now)
        if self._is_relay:
            return at - min((heard.at for heard in self._heard.values()), default=at)
        return at - self._answered if self._relay is not None else 0.0

    @property
    def _is_relay(self) -> bool:
        return self._relay is not None and self._relay.boot_id == self._boot_id

    def _is_suspect(self, silence: float, machine_answers: bool) -> bool:
        return silence >= (self._rhythm.stall if machine_answers else self._rhythm.silence)

    def _refusal(self, beat: Beat) -> str:
        if beat.to != self._boot_id:
            return f"the beat is for agent {beat.to}, this is {self._boot_id}"
        if beat.attempt < self._attempt:
            return f"the beat is of attempt {beat.attempt}, this is {self._attempt}"
        listed = self._listed.get(beat.member, beat.boot_id)
        if listed != beat.boot_id:
            return f"attempt {self._attempt} lists agent {listed} for member {beat.member}, not {beat.boot_id}"
        known = self._heard.get(beat.member)
        if known is not None and known.incarnation > beat.incarnation:
            return f"Pod {known.incarnation} of member {beat.member} is heard, later than {beat.incarnation}"
        return ""
