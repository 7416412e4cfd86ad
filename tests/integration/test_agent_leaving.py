"""Leaving with real workers: two Pods' agents and fork servers without Kubernetes, one of which is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from starcoder_trainer.agent.messages import Identity
from starcoder_trainer.agent.metrics import Metrics
from starcoder_trainer.agent.supervisor import Supervisor, Surroundings
from starcoder_trainer.contract.assignment import Assignment, Layout, Member, Phase
from starcoder_trainer.contract.ledger import HEAD_KEY, Head
from starcoder_trainer.contract.report import Report
from starcoder_trainer.storage.open import open_store
from tests.support.forkserver import fork_server
from tests.support.trainer import RUN, make_config, run_ranks, store_uri, train_and_save

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SECONDS = 300
GPUS, ITERATIONS = 2, 80
LAYOUT = Layout(1, 2, 2)
"""A stage a Pod, so that the ranks of one share no reduction of the loss with those of the other."""


class Pod:
    def __init__(self, gang: Gang, member: int, incarnation: int = 0) -> None:
        self.member, self.gang = member, gang
        self.boot_id = f"boot-{member}-{incarnation}"
        self.folder = gang.folder / self.boot_id
        self.folder.mkdir()
        self.reports: list[Report] = []
        self.stack = contextlib.ExitStack()
        socket = self.folder / "worker.sock"
        self.server: subprocess.Popen[bytes] = self.stack.enter_context(fork_server(socket, self.folder / "log"))
        self.supervisor = Supervisor(
            Identity(RUN.uid, self.boot_id, f"tiny-w{member}-{incarnation}", incarnation, "n1", "127.0.0.1",
                     str(self.folder / "scratch")),
            Surroundings(
                open_store=lambda uri, storage: open_store(uri, storage, allow_file=True),
                check_data=lambda config, open_store: None,
                worker_socket=socket,
                member=member,
                report=self._reported,
                metrics=Metrics("tiny", "test"),
            ),
        )  # fmt: skip
        self.task = asyncio.create_task(self.supervisor.run())

    @property
    def said(self) -> Report:
        return self.supervisor.report

    @property
    def losses(self) -> dict[int, float]:
        """Iteration to loss, as the Pod's lowest rank told it."""
        told = [r.progress for r in self.reports if r.progress is not None and r.progress.loss is not None]
        return {p.iteration: p.loss for p in told if p.loss is not None and p.consumed_tokens}

    def _reported(self, report: Report) -> None:
        self.reports.append(report)
        self.gang.changed.set()

    async def ends_as_the_kubelet_ends_it(self) -> None:
        """SIGTERM to the worker container; when that has ended, to the native sidecar."""
        self.server.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(self.server.wait, SECONDS) == 0
        self.supervisor.terminate()
        await asyncio.wait_for(self.task, SECONDS)

    async def close(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        self.stack.close()


class Gang:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.changed = asyncio.Event()
        (folder / "store").mkdir()
        self.config = make_config(
            LAYOUT, iterations=ITERATIONS, global_batch=4, every_iterations=1000, dropout=0.1,
            checkpoint_uri=store_uri(folder),
        )  # fmt: skip
        self.pods = [Pod(self, member) for member in range(2)]

    def assign(self, attempt: int, phase: Phase) -> None:
        offer = self.pods[0].said.offer if phase == "run" else None
        members = tuple(Member(pod.member, pod.boot_id) for pod in self.pods)
        assignment = Assignment(RUN.uid, attempt, phase, members, GPUS, LAYOUT, offer)
        for pod in self.pods:
            pod.supervisor.assign(assignment, self.config.to_dict())

    async def until(self, true: Callable[[], object]) -> None:
        async with asyncio.timeout(SECONDS):
            while not true():
                self.changed.clear()
                await self.changed.wait()

    async def form(self, attempt: int) -> None:
        self.assign(attempt, "hold")
        await self.until(lambda: self.pods[0].said.offer and self.all_say("idle", attempt))
        self.assign(attempt, "run")

    def all_say(self, state: str, attempt: int) -> bool:
        return all((pod.said.state, pod.said.attempt) == (state, attempt) for pod in self.pods)

    async def until_iteration(self, iteration: int) -> None:
        def reached() -> bool:
            progress = self.pods[0].said.progress
            return progress is not None and progress.iteration >= iteration

        await self.until(reached)

    @property
    def head(self) -> Head:
        return Head.from_json((self.folder / "store" / HEAD_KEY).read_bytes())

    def final_files(self, attempt: int) -> dict[str, bytes]:
        folder = self.folder / "store" / f"a{attempt}" / f"step-{ITERATIONS:08d}"
        return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture
async def gang(tmp_path: Path) -> AsyncIterator[Gang]:
    gang = Gang(tmp_path)
    yield gang
    for pod in gang.pods:
        await pod.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, bytes]]:
    """Losses, and the files of the last checkpoint."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = make_config(LAYOUT, iterations=ITERATIONS, global_batch=4, every_iterations=1000, dropout=0.1)
    losses = run_ranks(LAYOUT, train_and_save, config, LAYOUT, folder)[0]
    saved = folder / "checkpoints" / "a1" / f"step-{ITERATIONS:08d}"
    return losses, {path.name: path.read_bytes() for path in saved.glob("*.safetensors")}


@pytest.mark.parametrize("member", [0, 1], ids=["leader", "follower"])
async def test_a_pod_that_is_told_to_end_takes_the_gang_out_with_a_checkpoint_and_no_iteration_is_lost(
    gang: Gang, undisturbed: tuple[list[float], dict[str, bytes]], member: int
) -> None:
    await gang.form(1)
    await gang.until_iteration(5)
    going, staying = gang.pods[member], gang.pods[1 - member]
    await going.ends_as_the_kubelet_ends_it()
    assert going.said.state == "left"
    await gang.until(lambda: staying.said.state == "left")
    assert staying.said.failure is None
    assert staying.server.poll() is None, "its fork server stays warm"

    progress = going.said.progress, staying.said.progress
    left_at = {p.iteration for p in progress if p is not None}
    assert len(left_at) == 1, "both left at the same iteration"
    (reached,) = left_at
    assert 5 <= reached < ITERATIONS
    assert [(e.attempt, e.step) for e in gang.head.entries] == [(1, reached)]

    await going.close()
    gang.pods[member] = Pod(gang, member, incarnation=1)
    await asyncio.sleep(0)  # it takes assignments from here on
    await gang.form(2)
    await gang.until(lambda: gang.all_say("done", 2))
    losses, files = undisturbed
    again = {i: loss for i, loss in gang.pods[0].losses.items() if i > reached}
    assert again == {i: losses[i - 1] for i in range(reached + 1, ITERATIONS + 1)}
    assert gang.final_files(2) == files


async def test_drain_takes_the_gang_out_and_every_pod_stays_for_the_next_attempt(gang: Gang) -> None:
    await gang.form(1)
    await gang.until_iteration(5)
    gang.assign(1, "drain")
    await gang.until(lambda: gang.all_say("left", 1))
    progress = gang.pods[0].said.progress
    assert progress is not None
    assert [(e.attempt, e.step) for e in gang.head.entries] == [(1, progress.iteration)]
    await gang.form(2)
    await gang.until(lambda: gang.all_say("done", 2))
    started = [
        r.progress.iteration for r in gang.pods[1].reports if r.attempt == 2 and r.state == "training" and r.progress
    ]
    assert min(started) == progress.iteration, "nothing is trained again"
