"""Real workers that stop making progress: agents notice, take their stacks, and say whose fault it is."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from starcoder_trainer.agent.messages import Identity
from starcoder_trainer.agent.metrics import Metrics
from starcoder_trainer.agent.supervisor import Supervisor, Surroundings
from starcoder_trainer.contract.assignment import Assignment, Layout, Member
from starcoder_trainer.contract.config import HangConfig, TrainingConfig
from starcoder_trainer.contract.ledger import stacks_key
from starcoder_trainer.contract.report import Failure, Report
from starcoder_trainer.storage.open import open_store
from tests.support.forkserver import fork_server, stalled_at
from tests.support.trainer import RUN, make_config

pytestmark = pytest.mark.slow

SECONDS = 240
LAYOUT = Layout(1, 1, 2)
LIMITS = HangConfig(iteration=10.0, first_iteration=120.0, checkpoint=120.0)


@dataclass(frozen=True)
class Container:
    """A worker container: a fork server, kept warm over the tests."""

    process: subprocess.Popen[bytes]
    socket: Path
    log: Path

    def worker(self) -> psutil.Process:
        (only,) = psutil.Process(self.process.pid).children()
        return only


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Container]]:
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(LAYOUT.world_size):
            folder = tmp_path_factory.mktemp("container")
            path, log = folder / "worker.sock", folder / "log"
            found.append(Container(stack.enter_context(fork_server(path, log)), path, log))
        yield found


class Gang:
    """One Pod a rank, with the agents' own supervisors."""

    def __init__(self, containers: list[Container], folder: Path) -> None:
        self.containers = containers
        self.folder = folder
        (folder / "ck").mkdir()
        config = make_config(LAYOUT, iterations=100_000, global_batch=4, every_iterations=50_000)
        checkpoint = replace(config.checkpoint, uri=f"file://{folder}/ck")
        self.config = replace(config, checkpoint=checkpoint, hang=LIMITS)
        self.changed = asyncio.Event()
        self.pods = [self._supervisor(member) for member in range(len(containers))]
        self.tasks = [asyncio.create_task(pod.run()) for pod in self.pods]

    def _supervisor(self, member: int) -> Supervisor:
        container = self.containers[member]
        return Supervisor(
            Identity(
                run_uid=RUN.uid,
                boot_id=f"boot-{member}",
                pod=f"tiny-w{member}-0",
                incarnation=0,
                node=f"n{member}",
                address="127.0.0.1",
                scratch=str(self.folder / f"scratch-{member}"),
                stamps=str(container.socket.parent / "stamps"),
            ),
            Surroundings(
                open_store=lambda uri, storage: open_store(uri, storage, allow_file=True),
                check_data=lambda config, open_uri: None,
                worker_socket=container.socket,
                member=member,
                report=lambda _: self.changed.set(),
                metrics=Metrics("tiny", "test"),
            ),
        )

    @property
    def said(self) -> list[Report]:
        return [pod.report for pod in self.pods]

    def assign(self, attempt: int, phase: str) -> None:
        members = tuple(Member(i, f"boot-{i}") for i in range(len(self.pods)))
        offer = self.said[0].offer if phase == "run" else None
        assignment = Assignment(RUN.uid, attempt, phase, members, 1, LAYOUT, offer)  # type: ignore[arg-type]
        for pod in self.pods:
            pod.assign(assignment, self.config.to_dict())

    async def until(self, true: Callable[[], object]) -> None:
        async with asyncio.timeout(SECONDS):
            while not true():
                self.changed.clear()
                await self.changed.wait()

    def all_say(self, state: str, attempt: int) -> bool:
        return all((r.state, r.attempt) == (state, attempt) for r in self.said)

    async def trains(self, attempt: int, config: TrainingConfig | None = None) -> None:
        """Until the limit of the first iterations is behind it."""
        self.config = config or self.config
        self.assign(attempt, "hold")
        await self.until(lambda: self.said[0].offer and self.all_say("idle", attempt))
        self.assign(attempt, "run")
        await self.until(
            lambda: self.all_say("training", attempt) and (p := self.said[0].progress) and p.iteration >= 5
        )

    async def fails(self, attempt: int) -> list[Failure]:
        await self.until(lambda: self.all_say("failed", attempt))
        return [r.failure for r in self.said if r.failure is not None]

    def kept(self, attempt: int, member: int) -> str:
        """What is in the store by now."""
        path = self.folder / "ck" / stacks_key(attempt, member)
        return path.read_text() if path.exists() else ""

    async def is_kept(self, attempt: int, member: int) -> str:
        async with asyncio.timeout(SECONDS):
            while not (text := self.kept(attempt, member)):  # noqa: ASYNC110 - a file of another thread
                await asyncio.sleep(0.05)
        return text

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.fixture
async def gang(containers: list[Container], tmp_path: Path) -> AsyncIterator[Gang]:
    gang = Gang(containers, tmp_path)
    yield gang
    for container in containers:
        container.process.send_signal(signal.SIGCONT)
    await gang.close()


async def test_a_rank_that_is_stopped_is_told_as_the_hang_with_the_stacks_of_those_that_wait(gang: Gang) -> None:
    await gang.trains(1)
    gang.containers[1].worker().send_signal(signal.SIGSTOP)
    waits, stopped = await gang.fails(1)
    assert (stopped.cause, stopped.rank, stopped.suspicion[0]) == ("Hang", 1, 0)
    assert "is stopped by a signal (process state T)" in stopped.message
    assert waits.cause == "Hang"
    assert "waits since" in waits.message, "torch's flight recorder names the collective"
    assert stopped.suspicion < waits.suspicion, "which the operator compares"

    text = await gang.is_kept(1, 0)
    assert "loop.py" in text
    assert "gloo:" in text
    log = gang.containers[0].log.read_bytes()
    assert b"[rank 0] " in log
    assert b"loop.py" in log
    silent = await gang.is_kept(1, 1)
    assert "rank 1, process" in silent
    assert "it did not answer the signal" in silent

    await gang.trains(2)
    assert gang.all_say("training", 2), "the stopped process is gone, and nothing of attempt 1 judges attempt 2"


async def test_a_store_that_does_not_answer_is_a_stall_of_data(gang: Gang) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as never_answers:
        endpoint = f"http://127.0.0.1:{never_answers.getsockname()[1]}"
        # Samples 40 to 43 are iteration 11, and 42 is of rank 1.
        await gang.trains(1, stalled_at(gang.config, 42, endpoint))
        waits, stalled = await gang.fails(1)
    assert (stalled.cause, stalled.rank, stalled.iteration) == ("DataStall", 1, 10)
    assert "is in phase data after iteration 10" in stalled.message
    assert waits.cause == "Hang"
    assert "get_range" in await gang.is_kept(1, 1)


async def test_a_container_that_does_not_answer_is_a_hang_of_its_own(gang: Gang) -> None:
    await gang.trains(1)
    gang.containers[1].process.send_signal(signal.SIGSTOP)
    await gang.until(lambda: gang.said[1].state == "failed")
    failure = gang.said[1].failure
    assert failure is not None
    assert (failure.cause, failure.suspicion) == ("Hang", (0,))
    assert "the container is stopped, frozen or gets no processor" in failure.message
