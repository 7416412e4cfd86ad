"""Leader election by a Lease: one replica acts, the others stand by (docs/adr/0004).

Times of other machines are never compared with ours: a holder counts as gone when *we* have seen its Lease unchanged
for the duration it promised. Election is for liveness; against two leaders at once every change carries uid and
resourceVersion. A creation can't; what a leader that stood still would still create is withheld (`Elector.leads`), but
for a request that was under way by then, and what comes of that the next leader finds and removes.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass
from typing import Any

from .adapters.clock import Clock, micro_time
from .adapters.errors import AlreadyExists, Conflict, KubeError, NotFound
from .adapters.kinds import LEASES, Manifest
from .adapters.kube import Kube

log = logging.getLogger(__name__)


class LeadershipLost(Exception):
    """Another replica leads, or may: stop acting at once."""


@dataclass(frozen=True)
class Election:
    name: str
    namespace: str
    identity: str
    duration: float
    """Seconds without a renewal after which others take over."""
    renew_deadline: float
    """Seconds without a successful renewal after which a leader gives up; below `duration`."""
    retry_period: float
    """Seconds between tries."""

    def __post_init__(self) -> None:
        if not self.retry_period < self.renew_deadline < self.duration:
            raise ValueError(
                f"leader election: found retry period {self.retry_period} s, renew deadline {self.renew_deadline} s, "
                f"lease duration {self.duration} s; expected each to be shorter than the next"
            )


class Elector:
    """Takes, keeps and gives back one Lease.

    `kube` should be a client of its own with a short time-out, so that a queue of other calls can't delay a renewal.
    """

    def __init__(self, kube: Kube, election: Election, clock: Clock) -> None:
        self._kube = kube
        self._election = election
        self._clock = clock
        self._seen: tuple[str, float] = ("", 0.0)
        """resourceVersion last seen, and since when [s]."""
        self._lease: Manifest | None = None
        """As last written by us."""
        self.last_contact: float | None = None
        """When the API server last answered [s]."""
        self.holder = ""
        """Who leads, as last seen."""
        self._renewed: float | None = None
        """When the last renewal that went through was asked for [s]; None: the Lease is not ours."""

    def leads(self) -> bool:
        """Whether nobody else can have taken over by now, however long this process stood still."""
        return self._left() > 0

    async def acquire(self) -> None:
        """Returns when we lead. Waits through outages."""
        announced = ""
        while True:
            try:
                if await self._renew():
                    return
                if self.holder != announced:
                    announced = self.holder
                    log.info("standing by", extra={"leader": self.holder})
            except KubeError as e:
                log.warning("leader election: %s", e.message)
            await asyncio.sleep(self._election.retry_period * (1 + random.random() / 5))  # noqa: S311

    async def keep(self) -> None:
        """Renews for as long as we lead, after `acquire`.

        Raises:
            LeadershipLost: another replica has the Lease, or no renewal went through within the deadline.
        """
        while True:
            await asyncio.sleep(self._election.retry_period)
            try:
                async with asyncio.timeout(max(self._left(), 0.0)):
                    if await self._renew():
                        continue
                raise LeadershipLost(f"{self.holder} holds the Lease {self._election.name} now")
            except Conflict:
                # somebody touched the Lease; the next try reads who holds it
                log.info("leader election: the Lease changed under us, reading it again")
            except KubeError as e:
                log.warning("leader election: renewal failed: %s", e.message)
            except TimeoutError:
                pass
            if self._left() <= 0:
                raise LeadershipLost(f"the Lease {self._election.name} could not be renewed in time")

    def _left(self) -> float:
        """Seconds until we must have renewed; 0 where the Lease is not ours."""
        if self._renewed is None:
            return 0.0
        return self._renewed + self._election.renew_deadline - self._clock.monotonic()

    async def _renew(self) -> bool:
        """Take or renew; False where another holds it."""
        asked = self._clock.monotonic()
        ours = await self._try()
        self._renewed = asked if ours else None
        return ours

    async def release(self) -> None:
        """Give the Lease back, so that the next leader need not wait. Does nothing where we don't hold it."""
        self._renewed = None
        if self._lease is None:
            return
        lease = self._lease | {"spec": self._lease["spec"] | {"holderIdentity": "", "leaseDurationSeconds": 1}}
        try:
            await self._kube.replace(lease)
            log.info("Lease given back")
        except KubeError as e:
            log.warning("the Lease could not be given back, the next leader waits for it: %s", e.message)

    async def _try(self) -> bool:
        try:
            there = await self._kube.get(LEASES, self._election.namespace, self._election.name)
        except NotFound:
            self._contact()
            return await self._create()
        self._contact()
        spec = there.get("spec") or {}
        self.holder = spec.get("holderIdentity") or ""
        version = there["metadata"]["resourceVersion"]
        now = self._clock.monotonic()
        if self._seen[0] != version:
            self._seen = (version, now)
        if self.holder not in ("", self._election.identity):
            self._lease = None
            promised = float(spec.get("leaseDurationSeconds") or self._election.duration)
            if now - self._seen[1] < promised:
                return False
            log.info("taking over: the Lease was not renewed", extra={"from": self.holder, "silent": promised})
        mine = self.holder == self._election.identity
        self._lease = await self._kube.replace(there | {"spec": self._spec(spec, mine)})
        self._contact()
        self.holder = self._election.identity
        return True

    async def _create(self) -> bool:
        manifest = {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": {"name": self._election.name, "namespace": self._election.namespace},
            "spec": self._spec({}, mine=False),
        }
        try:
            self._lease = await self._kube.create(manifest)
        except AlreadyExists:
            return False
        self.holder = self._election.identity
        return True

    def _spec(self, spec: dict[str, Any], mine: bool) -> dict[str, Any]:
        now = micro_time()
        return spec | {
            "holderIdentity": self._election.identity,
            "leaseDurationSeconds": round(self._election.duration),
            "acquireTime": spec.get("acquireTime", now) if mine else now,
            "renewTime": now,
            "leaseTransitions": int(spec.get("leaseTransitions") or 0) + (0 if mine else 1),
        }

    def _contact(self) -> None:
        self.last_contact = self._clock.monotonic()
