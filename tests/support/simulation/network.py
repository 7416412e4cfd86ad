"""What the network and the servers at its end do to calls: the faults that a schedule has ordered, as they fall due."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from starcoder_operator.adapters.errors import Conflict, KubeError, Unavailable

ApiFault = Literal["conflict", "429", "500", "request lost", "answer lost", "slow answer", "slow request", "stale"]
"""conflict, 429, 500: the server's answer, nothing is done. request lost, answer lost: a time-out, nothing or all is
done. slow answer: what is read is old when it arrives. slow request: what is written arrives late. stale: a list is
answered from a server that is behind, as one with a watch cache may; a get is a read of etcd's quorum, its answer is
no older than its request."""
API_FAULTS: tuple[ApiFault, ...] = (
    "conflict", "429", "500", "request lost", "answer lost", "slow answer", "slow request", "stale",
)  # fmt: skip
StoreFault = Literal["request lost", "answer lost", "500", "delayed"]
"""delayed: the client gives up, and the write arrives long after."""
STORE_FAULTS: tuple[StoreFault, ...] = ("request lost", "answer lost", "500", "delayed")

LATENCY = 0.004
SLOW = 4.0
STALE = 2.0
"""Seconds that a server is behind."""
TIMEOUT = 5.0
"""Seconds until a client gives up on a server that is silent."""
DELAYED = 25.0


@dataclass
class Network:
    """Shared by all clients of a simulation."""

    rng: random.Random
    jitter: bool = False
    """Latencies differ; without it the same order of things comes out as long as no fault is ordered."""
    api_down: bool = False
    store_down: bool = False
    upload_seconds: float = 0.0
    """Seconds that the upload of a file takes beyond that."""
    api_faults: dict[str, deque[tuple[int, ApiFault]]] = field(default_factory=dict)
    """Class of client (operator, agent) -> (calls to let pass first, fault)."""
    store_faults: deque[tuple[int, StoreFault]] = field(default_factory=deque)
    told: Callable[[str], None] = lambda text: None

    def latency(self) -> float:
        return LATENCY * (1 + self.rng.random() * 10) if self.jitter else 0.0

    def store_answers_at_once(self) -> bool:
        """No fault is ordered and latencies are all the same: what agents ask of S3 is done without a gap in it."""
        return not (self.jitter or self.store_down or self.upload_seconds or self.store_faults)

    def order(self, client: str, skip: int, fault: ApiFault) -> None:
        self.api_faults.setdefault(client, deque()).append((skip, fault))

    def next_api_fault(self, client: str) -> ApiFault | None:
        return _due(self.api_faults.get(client))

    def next_store_fault(self) -> StoreFault | None:
        return _due(self.store_faults)

    def calm(self) -> None:
        """All faults that last end; those that are ordered for a later call still come, each once."""
        self.api_down = self.store_down = False

    async def api_call(
        self,
        client: str,
        what: str,
        perform: Callable[[], Any],
        *,
        writes: bool,
        past: Callable[[float], Any] | None = None,
    ) -> Any:
        """One call to the API server, with what befalls it.

        Args:
            perform: does it, at the moment at which the server does.
            past: answers a list as the server would have so many seconds ago.
        """
        if self.api_down:
            await asyncio.sleep(TIMEOUT)
            raise Unavailable(f"{what}: the API server did not answer")
        fault = self.next_api_fault(client) if self.api_faults else None
        if fault is None:
            await asyncio.sleep(self.latency())
            return perform()
        if fault == "stale" and past is None:
            fault = "slow request" if writes else "slow answer"
        if fault == "conflict" and not writes:
            fault = "500"
        self.told(f"{what}: {fault}")
        return await self._befallen(fault, what, perform, past)

    async def _befallen(
        self, fault: ApiFault, what: str, perform: Callable[[], Any], past: Callable[[float], Any] | None
    ) -> Any:
        await asyncio.sleep(self.latency())
        match fault:
            case "conflict":
                raise Conflict(f"{what}: the object has been modified", code=409, reason="Conflict")
            case "429":
                raise Unavailable(f"{what}: too many requests", code=429, retry_after=1.0)
            case "500":
                raise Unavailable(f"{what}: etcdserver: leader changed", code=500)
            case "request lost":
                await asyncio.sleep(TIMEOUT)
                raise Unavailable(f"{what}: the API server did not answer")
            case "answer lost":
                with contextlib.suppress(KubeError):
                    perform()
                await asyncio.sleep(TIMEOUT)
                raise Unavailable(f"{what}: the API server did not answer")
            case "slow answer":
                try:
                    answer = perform()
                finally:
                    await asyncio.sleep(SLOW)
                return answer
            case "slow request":
                # it arrives whether or not its sender still lives
                arrived = asyncio.get_running_loop().create_future()
                asyncio.get_running_loop().call_later(SLOW, _arrives, arrived, perform)
                return await asyncio.shield(arrived)
            case "stale":
                assert past is not None
                return past(STALE)


def _arrives(arrived: asyncio.Future[Any], perform: Callable[[], Any]) -> None:
    try:
        arrived.set_result(perform())
    except (KubeError, TimeoutError) as e:
        arrived.set_exception(e)
        arrived.exception()  # nobody may be there any more to take it


def _due[F](ordered: deque[tuple[int, F]] | None) -> F | None:
    if not ordered:
        return None
    skip, fault = ordered[0]
    if skip > 0:
        ordered[0] = (skip - 1, fault)
        return None
    ordered.popleft()
    return fault
