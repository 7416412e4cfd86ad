"""Agents as processes of their own, forked from one that has imported everything, so that 64 fit a small machine. Each
has a fork server beside it that is ready and never forks.

`python -m tests.support.agent_processes` reads one JSON object a line, starts an agent for it and answers with its pid.
At the end of its input it kills those that are left and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, Self

from kubernetes.aio import client

from starcoder_trainer.agent.main import Settings, serve
from starcoder_trainer.contract import names
from starcoder_trainer.contract.heartbeat import Rhythm
from starcoder_trainer.contract.worker import Ready, encode_line


class AgentProcesses:
    """The test's end.

    Args:
        folder: for sockets and scratch, which nobody uses, and the agents' log.
    """

    def __init__(self, folder: Path, *, host: str, ca: str, token: str, namespace: str, run: str) -> None:
        self._common = {
            "folder": str(folder),
            "host": host,
            "ca": ca,
            "token": token,
            "namespace": namespace,
            "run": run,
        }
        self.log = folder / "agents.log"
        self.pids: dict[int, int] = {}
        """Member to the process of its agent."""

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self._parent = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._parent.stdin is not None
        self._parent.stdin.close()
        self._parent.wait()

    def start(self, member: int, incarnation: int = 0) -> None:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        asked = {**self._common, "member": member, "incarnation": incarnation}
        self._parent.stdin.write(json.dumps(asked) + "\n")
        self._parent.stdin.flush()
        self.pids[member] = int(self._parent.stdout.readline())

    def signal(self, member: int, number: signal.Signals) -> None:
        os.kill(self.pids[member], number)


def _settings(asked: dict[str, Any]) -> Settings:
    member, incarnation, folder = asked["member"], asked["incarnation"], Path(asked["folder"])
    return Settings(
        run=asked["run"],
        run_uid="uid-1",
        namespace=asked["namespace"],
        member=member,
        incarnation=incarnation,
        pod=names.pod_name(asked["run"], member, incarnation),
        pod_ip="127.0.0.1",
        node=f"n{member}",
        grace_seconds=30.0,
        rhythm=Rhythm(),
        worker_socket=folder / f"{member}-{incarnation}.sock",
        scratch=str(folder / "scratch"),
        credentials_dir=folder,
        metrics_port=0,
    )


async def _ready(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A fork server that has preloaded, and no worker."""
    writer.write(encode_line(Ready(os.getpid(), 0.0)))
    await reader.read()


async def _agent(asked: dict[str, Any]) -> None:
    own = client.Configuration()
    own.host, own.ssl_ca_cert = asked["host"], asked["ca"]
    own.api_key["BearerToken"] = f"Bearer {asked['token']}"
    settings = _settings(asked)
    server = await asyncio.start_unix_server(_ready, settings.worker_socket)
    async with server, client.ApiClient(own) as api:
        await serve(settings, api, lambda config, open_store: None, asyncio.Event())


def _child(asked: dict[str, Any]) -> None:
    """Never returns, so that nothing of the parent's is done twice."""
    try:
        asyncio.run(_agent(asked))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _main() -> None:
    children: list[int] = []
    try:
        for line in sys.stdin:
            pid = os.fork()
            if pid == 0:
                _child(json.loads(line))
            children.append(pid)
            print(pid, flush=True)
    finally:  # also where the test has ended and its end of the pipe is closed
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in children:
            os.waitpid(pid, 0)


if __name__ == "__main__":
    _main()
