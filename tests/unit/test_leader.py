"""Leader election against a server in memory, by a clock that the test moves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from kubernetes.aio.client import Configuration

from starcoder_operator.adapters.errors import Unavailable, Withheld
from starcoder_operator.adapters.kinds import LEASES, PODS, Kind, Manifest
from starcoder_operator.adapters.kube import Kube
from starcoder_operator.leader import Election, Elector, LeadershipLost
from tests.support.simulation.api_server import ApiServer

DURATION, DEADLINE = 15.0, 10.0


class Clock:
    def __init__(self) -> None:
        self.at = 100.0

    def monotonic(self) -> float:
        return self.at

    def now(self) -> str:
        return "2026-01-01T00:00:00.000Z"


class Client:
    """What an elector uses of `Kube`."""

    def __init__(self, api: ApiServer) -> None:
        self._api = api
        self.down = False
        self.asked: asyncio.Queue[None] = asyncio.Queue()
        self.written: asyncio.Queue[None] = asyncio.Queue()

    async def get(self, kind: Kind, namespace: str, name: str) -> Manifest:
        self.asked.put_nowait(None)
        if self.down:
            raise Unavailable("the API server did not answer")
        return self._api.get(kind, namespace, name)

    async def create(self, manifest: Manifest) -> Manifest:
        return self._api.create(manifest, "elector")

    async def replace(self, manifest: Manifest) -> Manifest:
        self.written.put_nowait(None)
        return self._api.replace(manifest, "elector")


class Bench:
    def __init__(self) -> None:
        self.clock = Clock()
        self.api = ApiServer(self.clock.monotonic, self.clock.now)
        self.client = Client(self.api)

    def elector(self, name: str) -> Elector:
        client: Any = self.client
        election = Election("operator", "ns", name, DURATION, DEADLINE, retry_period=0.001)
        return Elector(client, election, self.clock)

    @property
    def holder(self) -> str:
        return str(self.api.get(LEASES, "ns", "operator")["spec"]["holderIdentity"])


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def standing_by(bench: Bench, elector: Elector) -> asyncio.Task[None]:
    """Has tried more than once, and waits."""
    task = asyncio.create_task(elector.acquire())
    await asks(bench)
    assert not task.done()
    return task


async def asks(bench: Bench, times: int = 3) -> None:
    while not bench.client.asked.empty():
        bench.client.asked.get_nowait()
    for _ in range(times):
        await bench.client.asked.get()


async def test_the_first_leads_and_the_second_stands_by(bench):
    first, second = bench.elector("first"), bench.elector("second")
    assert not first.leads()
    await first.acquire()
    waits = await standing_by(bench, second)
    assert (first.leads(), second.leads(), bench.holder) == (True, False, "first")
    waits.cancel()


async def test_a_lease_that_is_not_renewed_for_its_duration_is_taken_over(bench):
    first, second = bench.elector("first"), bench.elector("second")
    await first.acquire()
    waits = await standing_by(bench, second)
    bench.clock.at += DURATION
    await waits
    assert (first.leads(), second.leads(), bench.holder) == (False, True, "second")
    with pytest.raises(LeadershipLost, match="second holds the Lease"):
        await first.keep()


async def test_a_lease_that_is_given_back_is_taken_over_at_once(bench):
    first, second = bench.elector("first"), bench.elector("second")
    await first.acquire()
    waits = await standing_by(bench, second)
    await first.release()
    await waits
    assert (first.leads(), second.leads(), bench.holder) == (False, True, "second")


async def test_whoever_finds_another_holder_leads_no_more(bench):
    first = bench.elector("first")
    await first.acquire()
    there = bench.api.get(LEASES, "ns", "operator")
    bench.api.replace(there | {"spec": there["spec"] | {"holderIdentity": "second"}}, "second")
    with pytest.raises(LeadershipLost, match="second holds the Lease"):
        await first.keep()
    assert not first.leads()


async def test_a_leader_that_stood_still_may_not_lead_however_soon_it_looks_at_its_lease(bench):
    """Between waking up and its next renewal it would act on what it saw before."""
    first = bench.elector("first")
    await first.acquire()
    bench.clock.at += DEADLINE - 0.001
    assert first.leads()
    bench.clock.at += 0.001
    assert not first.leads()
    assert bench.holder == "first"


async def test_a_leader_keeps_on_through_an_outage_shorter_than_its_deadline(bench):
    first = bench.elector("first")
    await first.acquire()
    bench.client.down = True
    keeps = asyncio.create_task(first.keep())
    bench.clock.at += DEADLINE - 1
    await asks(bench)
    bench.client.down = False
    await bench.client.written.get()
    await asks(bench)
    bench.clock.at += 2
    assert first.leads()
    bench.client.down = True
    bench.clock.at += DEADLINE
    with pytest.raises(LeadershipLost, match="could not be renewed in time"):
        await keeps


async def test_writes_of_one_that_may_not_lead_are_not_sent_and_questions_are():
    calls: list[tuple[str, int]] = []
    nobody = Configuration(host="http://127.0.0.1:9")
    nobody.retries = False
    kube = Kube(nobody, count=lambda verb, code: calls.append((verb, code)), may_write=lambda: False)
    try:
        with pytest.raises(Withheld, match="another replica may lead by now"):
            await kube.create({"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "ns", "name": "a"}})
        with pytest.raises(Withheld):
            await kube.delete(PODS, "ns", "a", uid="1")
        assert calls == []
        with pytest.raises(Unavailable):
            await kube.get(PODS, "ns", "a")
        with pytest.raises(Unavailable):
            await kube.may(PODS, "create", namespace="ns")
        assert calls == [("get", 0), ("create", 0)]
    finally:
        await kube.close()
