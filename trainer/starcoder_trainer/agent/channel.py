"""The agent's end of the Unix socket to the fork server (contract/worker.py)."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from pathlib import Path

from starcoder_trainer.contract.codec import ContractError
from starcoder_trainer.contract.worker import Message, decode_line, encode_line

log = logging.getLogger(__name__)

RECONNECT_SECONDS = 0.2
_READ_BYTES = 1 << 16


class NotConnected(Exception):
    """The fork server is not there; its workers, if it had any, went with it."""


class Channel:
    """Connects whenever the server listens, again and again; hands over what it says and that it went."""

    def __init__(self, path: Path, on_message: Callable[[Message], None], on_lost: Callable[[str], None]) -> None:
        self._path = path
        self._on_message = on_message
        self._on_lost = on_lost
        self._socket: socket.socket | None = None
        self._sending = asyncio.Lock()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            connected = await self._connect()
            try:
                why = await self._read(connected)
            finally:
                self._socket = None
                connected.close()
            self._on_lost(why)

    async def send(self, message: Message, listener: socket.socket | None = None) -> None:
        """`listener` goes along as ancillary data; the caller still has to close its own copy.

        Raises:
            NotConnected: the message did not go out whole.
        """
        connected = self._socket
        if connected is None:
            raise NotConnected(f"{self._path}: not connected, can't send {type(message).__name__}")
        loop, data = asyncio.get_running_loop(), encode_line(message)
        async with self._sending:
            try:
                if listener is not None:
                    data = data[await self._send_with(connected, data, listener) :]
                await loop.sock_sendall(connected, data)
            except OSError as e:
                raise NotConnected(f"{self._path}: {e}, can't send {type(message).__name__}") from e

    async def _connect(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        while True:
            candidate = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            candidate.setblocking(False)
            try:
                await loop.sock_connect(candidate, str(self._path))
            except OSError:
                candidate.close()
                await asyncio.sleep(RECONNECT_SECONDS)
            except BaseException:
                candidate.close()
                raise
            else:
                self._socket = candidate
                return candidate

    async def _read(self, connected: socket.socket) -> str:
        loop, rest = asyncio.get_running_loop(), b""
        while True:
            try:
                data = await loop.sock_recv(connected, _READ_BYTES)
            except OSError as e:
                return str(e)
            if not data:
                return "closed by the fork server"
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                try:
                    self._on_message(decode_line(line))
                except ContractError as e:
                    log.error("ignored: %s", e)

    async def _send_with(self, connected: socket.socket, data: bytes, listener: socket.socket) -> int:
        """Bytes that went out with the descriptor."""
        while True:
            try:
                return socket.send_fds(connected, [data], [listener.fileno()])
            except BlockingIOError:
                await _writable(connected)


async def _writable(connected: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_writer(connected, ready.cancel)
    try:
        await asyncio.wait([ready])
    finally:
        loop.remove_writer(connected)
