"""Heartbeats between real sockets of loopback, twenty times as fast as usual."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable

import pytest

from starcoder_trainer.agent.heartbeat_tcp import HeartbeatService
from starcoder_trainer.agent.heartbeats import Heartbeats, Standing
from starcoder_trainer.agent.metrics import Metrics
from starcoder_trainer.contract.assignment import Assignment, Endpoint, Layout, Member, Relay
from starcoder_trainer.contract.heartbeat import MOST_BYTES, Answer, Beat, Rhythm

PATIENCE = 60.0
RHYTHM = Rhythm(seconds=0.05, missed=3)


class Agent:
    def __init__(self, member: int, gang: Gang) -> None:
        self.member, self.boot_id, self.gang = member, f"boot-{member}", gang
        self.said = Standing()
        self.metrics = Metrics("demo", "test")
        hearing = Heartbeats(member=member, incarnation=0, boot_id=self.boot_id, rhythm=RHYTHM, now=time.monotonic())
        self.service = HeartbeatService(
            hearing, address="127.0.0.1", rhythm=RHYTHM, changed=self._changed, metrics=self.metrics
        )

    def _changed(self, standing: Standing) -> None:
        self.said = standing
        self.gang.changed.set()

    async def start(self) -> None:
        self.endpoint = await self.service.listen()
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        """A relay's Lease is renewed all the time."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.service.run())
            while True:
                self.service.renewed()
                await asyncio.sleep(RHYTHM.seconds)

    async def stop(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


class Gang:
    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.agents: list[Agent] = []

    async def start(self, size: int) -> None:
        for i in range(size):
            self.agents.append(Agent(i, self))
            await self.agents[i].start()

    def assign(self, attempt: int, relay: int, members: tuple[int, ...]) -> None:
        by = self.agents[relay]
        listed = tuple(Member(i, self.agents[i].boot_id) for i in members)
        written = Assignment(
            "uid-1", attempt, "run", listed, 1, Layout(1, 1, len(listed)),
            relay=Relay(relay, by.boot_id, by.endpoint),
        )  # fmt: skip
        for i in members:
            self.agents[i].service.assigned(written)

    async def until(self, met: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not met():
                self.changed.clear()
                await self.changed.wait()


@pytest.fixture
async def gang() -> AsyncIterator[Gang]:
    found = Gang()
    await found.start(3)
    found.assign(1, 0, (0, 1, 2))
    await found.until(lambda: all(a.said.relayed_by == "boot-0" for a in found.agents[1:]))
    yield found
    for agent in found.agents:
        await agent.stop()


async def say(endpoint: Endpoint, line: bytes) -> bytes:
    """What is answered; empty where the connection is closed instead."""
    reader, writer = await asyncio.open_connection(endpoint.address, endpoint.port)
    try:
        writer.write(line)
        return await asyncio.wait_for(reader.readline(), PATIENCE)
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_a_relay_names_the_agent_whose_connection_is_gone_and_clears_it_when_it_is_back(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rhythm, "stall", 1e6)  # of one that is only slow nothing would be said
    await gang.agents[2].stop()
    await gang.until(lambda: gang.agents[0].said.suspects == (2,))
    assert gang.agents[0].metrics.registry.get_sample_value("starcoder_heartbeat_suspects") == 1
    returned = gang.agents[2] = Agent(2, gang)
    await returned.start()
    gang.assign(2, 0, (0, 1, 2))
    await gang.until(lambda: not gang.agents[0].said.suspects and returned.said.relayed_by == "boot-0")


async def test_agents_name_the_relay_that_went_silent_and_follow_the_next(gang: Gang) -> None:
    await gang.agents[0].stop()
    await gang.until(lambda: all(a.said == Standing(suspects=(0,)) for a in gang.agents[1:]))
    gang.assign(2, 1, (1, 2))
    await gang.until(lambda: gang.agents[2].said == Standing("boot-1"))
    assert gang.agents[1].said == Standing()


async def test_a_connection_that_breaks_is_made_anew_before_anybody_is_suspect(gang: Gang) -> None:
    heard: list[Standing] = []
    gang.agents[0].service._changed = heard.append
    for writer in list(gang.agents[0].service._open):
        writer.transport.abort()
    beats = await _next_connections(gang, 2)
    assert beats == 2
    assert heard == []
    assert gang.agents[1].said == gang.agents[2].said == Standing("boot-0")


async def _next_connections(gang: Gang, number: int) -> int:
    async with asyncio.timeout(PATIENCE):
        while len(gang.agents[0].service._open) < number:  # noqa: ASYNC110
            await asyncio.sleep(RHYTHM.seconds / 4)
    return len(gang.agents[0].service._open)


async def test_a_later_pod_of_the_member_ends_the_beats_of_the_one_before(gang: Gang) -> None:
    gang.agents[1].service.cease()
    await gang.until(lambda: gang.agents[0].said.suspects == (1,))


async def test_a_beat_for_another_agent_is_refused(gang: Gang) -> None:
    answer = await say(gang.agents[0].endpoint, Beat("boot-9", 1, 0, "boot-1", 1).to_json().encode() + b"\n")
    assert Answer.from_json(answer).refused == "the beat is for agent boot-9, this is boot-0"


@pytest.mark.parametrize(
    "line",
    [b"GET / HTTP/1.1\r\n", b"{}\n", json.dumps(["x"]).encode() + b"\n", b"x" * (4 * MOST_BYTES) + b"\n"],
    ids=["http", "empty", "list", "too long"],
)
async def test_what_is_no_beat_ends_its_connection_and_hurts_nobody(gang: Gang, line: bytes) -> None:
    assert await say(gang.agents[0].endpoint, line) == b""
    assert Answer.from_json(
        await say(gang.agents[0].endpoint, Beat("boot-0", 1, 0, "boot-1", 1).to_json().encode() + b"\n")
    ).relays


async def test_connections_are_bounded(gang: Gang, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starcoder_trainer.agent.heartbeat_tcp.MOST_CONNECTIONS", 2)
    assert await say(gang.agents[0].endpoint, Beat("boot-0", 1, 0, "boot-1", 1).to_json().encode() + b"\n") == b""


async def test_a_connection_that_says_nothing_is_closed(gang: Gang) -> None:
    reader, writer = await asyncio.open_connection(gang.agents[0].endpoint.address, gang.agents[0].endpoint.port)
    assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
    writer.close()
