"""A connection whose other end is gone without a word is given up by the kernel in seconds."""

import asyncio
import socket

import pytest
from kubernetes.aio.client import Configuration

from starcoder_operator.adapters.connection import watch_session
from starcoder_trainer.agent.connection import api_client
from starcoder_trainer.contract import sockets


def test_the_other_end_is_probed():
    with sockets.probed_socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 1))) as made:
        assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        found = [made.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{n}")) for n in ("KEEPIDLE", "KEEPINTVL")]
        assert found == [sockets.IDLE_SECONDS, sockets.PROBE_SECONDS]
        assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == sockets.PROBES
        assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1000 * sockets.SECONDS


@pytest.fixture
async def sessions():
    """Those of the operator's watches and of an agent."""
    client = api_client()
    made = [await watch_session(Configuration(), []), client.rest_client._create_pool_manager()]
    yield made
    for session in made:
        await session.close()
    await client.close()


async def test_operator_and_agents_watch_over_such_connections(sessions):
    async def begin(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
        await writer.drain()

    server = await asyncio.start_server(begin, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    for session in sessions:
        async with session.get(f"http://{host}:{port}/") as watching:
            connection = watching.connection.transport.get_extra_info("socket")
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == sockets.IDLE_SECONDS
    server.close()
