"""A real fork server in a process of its own, and the agent's end of its socket."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from starcoder_trainer.contract.config import StorageConfig, TrainingConfig
from starcoder_trainer.contract.names import CREDENTIALS_KEYS
from starcoder_trainer.contract.worker import Message, Start, decode_line, encode_line
from starcoder_trainer.failures import ConfigurationError
from starcoder_trainer.storage.open import open_store
from starcoder_trainer.storage.store import ObjectStore
from starcoder_trainer.worker import enter
from tests.support.trainer import Walks, WalkSample, walks_for

DEADLINE = 120.0


class Agent:
    """Speaks to a fork server as an agent does."""

    def __init__(self, path: Path) -> None:
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.settimeout(DEADLINE)
        self.connection.connect(str(path))
        self._lines = self.connection.makefile("rb")

    def send(self, message: Message, listener: socket.socket | None = None) -> None:
        socket.send_fds(self.connection, [encode_line(message)], [listener.fileno()] if listener else [])

    def receive(self) -> Message:
        """The next message; an AssertionError where the server closed."""
        line = self._lines.readline()
        assert line, "the fork server closed the connection"
        return decode_line(line)

    def until(self, *kinds: type[Any]) -> Any:
        """Skip to the next message of these kinds."""
        while not isinstance(message := self.receive(), kinds):
            pass
        return message

    def close(self) -> None:
        self._lines.close()
        self.connection.close()


@contextlib.contextmanager
def fork_server(
    path: Path, log: Path, module: str = "tests.support.forkserver", *arguments: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Killed at the end, if it did not end before. Its log, with the workers' output, goes to `log`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={
                **os.environ,
                "STARCODER_WORKER_SOCKET": str(path),
                "STARCODER_ALLOW_FILE": "1",
                "OPENBLAS_NUM_THREADS": "1",
                "STARCODER_FORMATION_SECONDS": "10",
            },
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def connect(path: Path, process: subprocess.Popen[bytes]) -> Agent:
    """As soon as it listens."""
    while True:
        assert process.poll() is None, "the fork server ended"
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            return Agent(path)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)


@dataclass(frozen=True)
class _Broken:
    """Samples of which one can't be read."""

    walks: Walks
    bad: int
    error: Exception

    def sample(self, i: int) -> WalkSample:
        if i == self.bad:
            raise self.error
        return self.walks.sample(i)


def broken_at(config: TrainingConfig, sample: int, error: str) -> TrainingConfig:
    """A configuration whose sample raises `error`, a name of `ERRORS`, in the server below."""
    return replace(config, data=replace(config.data, tokenizer=f"file:///{error}/{sample}"))


@dataclass(frozen=True)
class _Stalled:
    """Samples of which one is read from a store that takes the request and never answers it."""

    walks: Walks
    bad: int
    store: ObjectStore

    def sample(self, i: int) -> WalkSample:
        if i == self.bad:
            self.store.get_range("tokens.bin", 0, 100)
        return self.walks.sample(i)


def stalled_at(config: TrainingConfig, sample: int, endpoint: str) -> TrainingConfig:
    """A configuration whose sample is read from an S3 service at `endpoint`, in the server below."""
    return replace(broken_at(config, sample, STALL), storage=StorageConfig(endpoint, path_style=True))


STALL = "stall"
IMPORTED = "imported after the fork:"
"""What the server writes to its log as a worker ends well or not."""
ERRORS = {"configuration": ConfigurationError("sample is bad"), "arithmetic": ZeroDivisionError("division by zero")}


def _samples(config: TrainingConfig, _open: object, cache: Path) -> Walks | _Broken | _Stalled:
    _, error, sample = config.data.tokenizer.rsplit("/", 2)
    if error == STALL:
        cache.mkdir(parents=True, exist_ok=True)
        for key in CREDENTIALS_KEYS:
            (cache / key).write_text("anything")
        return _Stalled(walks_for(config), int(sample), open_store("s3://corpus/code", config.storage, cache))
    return _Broken(walks_for(config), int(sample), ERRORS[error]) if error in ERRORS else walks_for(config)


def _enter(start: Start, rank: int, channel: socket.socket, listen_fd: int | None) -> int:
    had = set(sys.modules)
    code = enter(start, rank, channel, listen_fd, _samples)
    print(f"{IMPORTED} {sorted(sys.modules.keys() - had)}")
    return code


if __name__ == "__main__":
    from starcoder_trainer.forkserver import main

    main(_enter)
