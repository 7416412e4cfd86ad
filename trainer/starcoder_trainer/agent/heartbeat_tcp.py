"""Heartbeats over TCP: every agent listens on a port of its own and beats to whichever is its relay."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import time
from collections import Counter
from collections.abc import Callable

from starcoder_trainer.agent.heartbeats import Heartbeats, Standing
from starcoder_trainer.agent.metrics import Metrics
from starcoder_trainer.contract.assignment import Assignment, Endpoint, Relay
from starcoder_trainer.contract.codec import ContractError
from starcoder_trainer.contract.heartbeat import MOST_BYTES, Answer, Beat, Rhythm

log = logging.getLogger(__name__)

MOST_CONNECTIONS = 4096
"""Others are closed at once."""
LOOKS_A_BEAT = 4
"""How often the silence of others is measured."""

NO_ANSWER = (OSError, TimeoutError, EOFError, ContractError, ValueError)
"""Of a peer that is gone, silent, or none of ours; ValueError is a line that is too long."""

_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class HeartbeatService:
    """Carries beats and answers, and tells of each change of what follows from them.

    Args:
        address: IP of the Pod, on which others reach this agent.
        changed: told the standing whenever it is another.
    """

    def __init__(
        self,
        heartbeats: Heartbeats,
        *,
        address: str,
        rhythm: Rhythm,
        changed: Callable[[Standing], None],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._heartbeats = heartbeats
        self._address = address
        self._rhythm = rhythm
        self._changed = changed
        self._metrics = metrics
        self._clock = clock
        self._standing = Standing()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._connections: Counter[str] = Counter()
        """Boot id -> connections over which that agent beats."""
        self._moved = asyncio.Event()
        self._ceased = False
        self._trouble = ""
        """Why the last beat did no good."""

    async def listen(self) -> Endpoint:
        """Where others are to beat to. Raises OSError where the address is not this machine's."""
        self._server = await asyncio.start_server(
            self._serve, self._address, 0, limit=MOST_BYTES, backlog=MOST_CONNECTIONS
        )
        return Endpoint(self._address, self._server.sockets[0].getsockname()[1])

    async def run(self) -> None:
        """Until cancelled; after `listen`."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._beat())
                tasks.create_task(self._watch())
        finally:
            if self._server is not None:
                self._server.close()
            for writer in self._open:
                writer.transport.abort()

    def assigned(self, assignment: Assignment) -> None:
        before = self._heartbeats.target
        self._heartbeats.assigned(self._clock(), assignment)
        if self._heartbeats.target != before:
            self._moved.set()
        self._look()

    def renewed(self) -> None:
        """The API server has taken this agent's Lease."""
        self._heartbeats.renewed(self._clock())

    def cease(self) -> None:
        """A later Pod beats for this member."""
        self._ceased = True
        self._moved.set()

    # The relay's side

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= MOST_CONNECTIONS:
            writer.transport.abort()
            return
        self._open.add(writer)
        _notice_dead_peers(writer, self._rhythm)
        of = ""
        try:
            while True:
                line = await asyncio.wait_for(reader.readline(), self._rhythm.stall)
                if not line:
                    return
                beat = Beat.from_json(line)
                answer = self._heartbeats.take(self._clock(), beat)
                if not answer.refused and of != beat.boot_id:
                    self._disconnected(of)
                    of = beat.boot_id
                    self._connections[of] += 1
                writer.write(answer.to_json().encode() + b"\n")
                await writer.drain()
        except NO_ANSWER as e:
            log.debug("heartbeats from %s: %s: %s", _peer(writer), type(e).__name__, e)
        finally:
            self._disconnected(of)
            self._open.discard(writer)
            writer.close()

    def _disconnected(self, boot_id: str) -> None:
        if boot_id:
            self._connections[boot_id] -= 1
            if not self._connections[boot_id]:
                del self._connections[boot_id]
                self._heartbeats.broke(boot_id)

    # The others' side

    async def _beat(self) -> None:
        stream: _Stream | None = None
        of: Relay | None = None
        try:
            while True:
                self._moved.clear()
                relay = None if self._ceased else self._heartbeats.target
                if relay != of:
                    _close(stream)
                    stream, of = None, relay
                    if relay is not None:  # the whole gang learns of its relay at the same moment
                        await self._pause(random.uniform(0, self._rhythm.seconds / 2))  # noqa: S311
                        continue
                if relay is None:
                    await self._moved.wait()
                    continue
                begun = self._clock()
                try:
                    async with asyncio.timeout(self._rhythm.seconds):
                        stream = await self._exchange(stream, relay)
                except NO_ANSWER as e:
                    self._trouble = f"{type(e).__name__}: {e}"
                    _close(stream)
                    stream = None
                await self._pause(begun + self._rhythm.seconds - self._clock())
        finally:
            _close(stream)

    async def _exchange(self, stream: _Stream | None, relay: Relay) -> _Stream:
        """One beat and its answer; over a new connection where there is none or it broke."""
        if stream is not None:
            try:
                await self._ask(stream, relay)
                return stream
            except (OSError, EOFError):
                _close(stream)
        stream = await asyncio.open_connection(relay.endpoint.address, relay.endpoint.port, limit=MOST_BYTES)
        self._heartbeats.reached(self._clock())
        try:
            await self._ask(stream, relay)
        except BaseException:
            _close(stream)
            raise
        return stream

    async def _ask(self, stream: _Stream, relay: Relay) -> None:
        reader, writer = stream
        writer.write(self._heartbeats.beat(relay).to_json().encode() + b"\n")
        await writer.drain()
        line = await reader.readline()
        if not line:
            raise EOFError("closed by the relay")
        answer = Answer.from_json(line)
        self._trouble = answer.refused or ("" if answer.relays else "it does not relay now")
        self._heartbeats.answered(self._clock(), answer)

    async def _pause(self, seconds: float) -> None:
        """Shorter where the relay becomes another."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._moved.wait(), max(0.0, seconds))

    # What both see

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._rhythm.seconds / LOOKS_A_BEAT)
            self._look()
            self._metrics.heard(self._heartbeats.longest_silence(self._clock()))

    def _look(self) -> None:
        standing = self._heartbeats.standing(self._clock())
        if standing == self._standing:
            return
        before, self._standing = self._standing, standing
        if before.relayed_by and not standing.relayed_by:
            log.warning(
                "no relay speaks for this agent any more (%s); its Lease is renewed", self._trouble or "another"
            )
        if new := set(standing.suspects) - set(before.suspects):
            log.warning("members %s have missed %d heartbeats", sorted(new), self._rhythm.missed)
        if cleared := set(before.suspects) - set(standing.suspects):
            log.info("members %s are not suspect any more", sorted(cleared))
        self._metrics.stands(standing)
        self._changed(standing)


def _notice_dead_peers(writer: asyncio.StreamWriter, rhythm: Rhythm) -> None:
    """Has the kernel break the connection after as many beats in which the other machine does not answer. It asks that
    kernel, not the agent."""
    connection: socket.socket = writer.get_extra_info("socket")
    beat = max(1, round(rhythm.seconds))
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, beat),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, beat),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, rhythm.missed),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * rhythm.seconds * rhythm.missed)),
    ):
        connection.setsockopt(level, option, value)


def _close(stream: _Stream | None) -> None:
    if stream is not None:
        stream[1].transport.abort()


def _peer(writer: asyncio.StreamWriter) -> str:
    return str((writer.get_extra_info("peername") or ("somebody",))[0])
