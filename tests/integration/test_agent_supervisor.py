"""A gang of agents without Kubernetes: real sockets, fork-server processes, store, ledger and uploads."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from starcoder_trainer.agent.messages import Identity
from starcoder_trainer.agent.metrics import Metrics
from starcoder_trainer.agent.supervisor import Supervisor, Surroundings
from starcoder_trainer.contract.assignment import Assignment, Layout, Member
from starcoder_trainer.contract.config import StorageConfig
from starcoder_trainer.contract.ledger import HEAD_KEY, Head
from starcoder_trainer.contract.report import Report
from starcoder_trainer.data.errors import DataNotFound
from starcoder_trainer.storage.open import open_store
from starcoder_trainer.storage.store import ObjectStore
from tests.support.training import training_config

pytestmark = pytest.mark.integration

SECONDS = 60
GPUS = 2
GRACE = 2.0
"""Seconds; the scripted workers of these tests don't know how to leave."""


def store_of(uri: str, storage: StorageConfig) -> ObjectStore:
    """Each region has objects of its own."""
    return open_store(f"{uri}/{storage.region}", storage, allow_file=True)


class Pod:
    """A supervisor and its fork-server process."""

    def __init__(self, gang: "Gang", member: int) -> None:
        self.member = member
        self.boot_id = f"boot-{member}"
        self.folder = Path(tempfile.mkdtemp(prefix="pod-"))
        self.reports: list[Report] = []
        self.gang = gang
        self.metrics = Metrics("demo", "test")
        self.supervisor = Supervisor(
            Identity(
                "uid-1", self.boot_id, f"demo-w{member}-0", 0, "n1", "127.0.0.1", str(self.folder / "scratch"), GRACE
            ),
            Surroundings(
                open_store=store_of,
                check_data=lambda config, open_store: gang.check_data(member),
                worker_socket=self.folder / "worker.sock",
                member=member,
                report=self._reported,
                metrics=self.metrics,
                retry_seconds=0.1,
            ),
        )
        self.server = self.start_server()
        self.task = asyncio.create_task(self.supervisor.run())

    def start_server(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.support.fork_server", self.folder / "worker.sock", self.gang.plan],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    @property
    def said(self) -> Report:
        return self.supervisor.report

    def _reported(self, report: Report) -> None:
        self.reports.append(report)
        self.gang.changed.set()

    async def close(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        self.server.kill()
        self.server.wait()
        shutil.rmtree(self.folder)


class Gang:
    def __init__(self, tmp_path: Path, size: int) -> None:
        self.changed = asyncio.Event()
        self.plan = tmp_path / "plan.json"
        for region in ("us-east-1", "elsewhere"):
            (tmp_path / "ck" / region).mkdir(parents=True)
        self.config = training_config(iterations=4, checkpoint_uri=f"file://{tmp_path}/ck")
        self.store = store_of(self.config.checkpoint.uri, self.config.storage)
        self.data_error: Exception | None = None
        self.data_error_of = 0
        """Member that meets it."""
        self.pods = [Pod(self, member) for member in range(size)]

    def check_data(self, member: int) -> None:
        if self.data_error and member == self.data_error_of:
            raise self.data_error

    def plans(self, **plan) -> None:
        self.plan.write_text(json.dumps({"iterations": 4, "every": 2} | plan))

    def assign(self, attempt: int, phase: str, leader: int = 0) -> None:
        offer = self.pods[leader].said.offer if phase == "run" else None
        in_order = [*self.pods[leader:], *self.pods[:leader]]
        members = tuple(Member(pod.member, pod.boot_id) for pod in in_order)
        layout = Layout(1, 1, GPUS * len(self.pods))
        assignment = Assignment("uid-1", attempt, phase, members, GPUS, layout, offer)
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

    @property
    def head(self) -> Head:
        return Head.from_json(self.store.get(HEAD_KEY).data)


@pytest.fixture
async def gang(tmp_path):
    gang = Gang(tmp_path, size=2)
    gang.plans()
    yield gang
    for pod in gang.pods:
        await pod.close()


async def test_a_gang_trains_to_the_end_and_the_leader_is_done_with_the_last_step_in_head(gang):
    await gang.form(1)
    await gang.until(lambda: gang.all_say("done", 1))
    # the newest is committed first; older ones that were not listed by then are history
    assert [e.step for e in gang.head.entries] in ([2, 4], [4])
    assert gang.pods[0].said.verified.checkpoint.step == 4
    assert gang.pods[1].said.verified is None
    states = [r.state for r in gang.pods[1].reports]
    assert states.index("idle") < states.index("starting") < states.index("training") < states.index("done")
    gang.assign(1, "stop")
    for pod in gang.pods:
        assert await asyncio.to_thread(pod.server.wait, SECONDS) == 0


def local_files(pod) -> list[str]:
    root = pod.folder / "scratch" / "checkpoints"
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def files_of(attempt: int, step: int, *ranks: int) -> list[str]:
    folder = f"a{attempt}/step-{step:08d}"
    return [f"{folder}/rank-{rank:05d}.{kind}" for rank in ranks for kind in ("json", "safetensors")]


async def test_of_local_files_those_of_the_step_that_was_uploaded_last_stay(gang):
    await gang.form(1)
    await gang.until(lambda: gang.all_say("done", 1))
    assert [local_files(pod) for pod in gang.pods] == [files_of(1, 4, 0, 1), files_of(1, 4, 2, 3)]


async def test_an_attempt_begins_with_the_local_files_of_its_checkpoint_and_no_others(gang):
    fuse = gang.plan.parent / "fuse"
    gang.plans(hang=3, fail={"attempt": 1, "iteration": 3, "when": str(fuse)})
    await gang.form(1)
    await gang.until(lambda: gang.pods[0].said.verified)
    for pod, rank in zip(gang.pods, (1, 2), strict=True):
        for folder in ("a1/step-00000003", "a0/step-00000002"):
            left = pod.folder / "scratch" / "checkpoints" / folder
            left.mkdir(parents=True)
            (left / f".rank-{rank:05d}.bin.partial").touch()
    fuse.touch()
    await gang.until(lambda: all(pod.said.state == "failed" for pod in gang.pods))
    await gang.form(2)
    await gang.until(lambda: gang.all_say("training", 2))
    assert [local_files(pod) for pod in gang.pods] == [files_of(1, 2, 0, 1), files_of(1, 2, 2, 3)]


async def test_after_a_crash_the_next_attempt_resumes_at_the_last_verified_step(gang):
    fuse = gang.plan.parent / "fuse"
    gang.plans(fail={"attempt": 1, "iteration": 3, "when": str(fuse)})
    await gang.form(1)
    await gang.until(lambda: gang.pods[0].said.verified)
    fuse.touch()
    await gang.until(lambda: all(pod.said.state == "failed" for pod in gang.pods))
    failure = gang.pods[0].said.failure
    assert (failure.cause, failure.iteration) == ("Crash", 3)
    await gang.form(2)
    await gang.until(lambda: gang.all_say("done", 2))
    assert [(e.attempt, e.step) for e in gang.head.entries] == [(1, 2), (2, 4)]


async def test_a_killed_fork_server_fails_the_attempt_and_idle_waits_for_the_new_one(gang):
    gang.plans(hang=3)
    await gang.form(1)
    await gang.until(lambda: gang.all_say("training", 1) and gang.pods[0].said.verified)
    gang.pods[1].server.send_signal(signal.SIGKILL)
    await gang.until(lambda: gang.pods[1].said.state == "failed")
    assert "kubectl logs demo-w1-0 -c worker" in gang.pods[1].said.failure.message
    gang.plans()
    gang.assign(2, "hold")
    await gang.until(lambda: gang.pods[0].said.attempt == 2)
    assert gang.pods[1].said.attempt == 1
    gang.pods[1].server.wait()
    gang.pods[1].server = gang.pods[1].start_server()
    await gang.form(2)
    await gang.until(lambda: gang.all_say("done", 2))


async def test_missing_data_is_told_and_mended_without_using_up_an_attempt(gang):
    gang.data_error = DataNotFound("s3://corpus/code: found no .idx file")
    gang.assign(1, "hold")
    await gang.until(lambda: gang.pods[0].said.problem)
    assert gang.pods[0].said.problem.reason == "DataNotFound"
    assert not list(gang.store.list("HEAD")), "HEAD was claimed before the data was found"
    gang.data_error = None
    await gang.until(lambda: gang.pods[0].said.offer)
    assert gang.pods[0].said.problem is None


async def test_a_leader_that_was_hindered_tries_no_more_where_another_leads(gang):
    gang.data_error = DataNotFound("s3://corpus/code: found no .idx file")
    gang.assign(1, "hold")
    await gang.until(lambda: gang.pods[0].said.problem)
    gang.assign(2, "hold", leader=1)
    await gang.until(lambda: gang.pods[1].said.offer and gang.all_say("idle", 2))
    assert gang.pods[0].said.problem is None
    await asyncio.wait_for(asyncio.shield(gang.pods[0].supervisor._preparing), SECONDS)
    assert (gang.head.attempt, gang.head.holder) == (2, "boot-1")
    assert gang.pods[0].said.problem is None


@pytest.mark.parametrize(("cause", "again"), [("Storage", True), ("Crash", False)])
async def test_after_a_failed_read_the_leader_looks_at_the_data_again(gang, cause, again):
    gang.plans(fail={"attempt": 1, "iteration": 1, "cause": cause})
    await gang.form(1)
    await gang.until(lambda: gang.pods[0].said.state == "failed")
    gang.data_error = DataNotFound("s3://corpus/code: found prepared.json but not all it describes")
    gang.plans()
    gang.assign(2, "hold")
    await gang.until(lambda: gang.pods[0].said.attempt == 2 and (gang.pods[0].said.problem or gang.pods[0].said.offer))
    assert (gang.pods[0].said.problem is not None) == again
    if again:
        assert gang.pods[0].said.problem.reason == "DataNotFound"


async def test_a_foreign_head_is_told_and_adopted_when_asked(gang):
    foreign = Head("uid-0", "older", 6, "nonce", "someone")
    gang.store.put(HEAD_KEY, foreign.to_json().encode())
    gang.assign(1, "hold")
    await gang.until(lambda: gang.pods[0].said.problem)
    assert gang.pods[0].said.problem.reason == "CheckpointForeign"
    gang.config = replace(gang.config, checkpoint=replace(gang.config.checkpoint, resume="Adopt"))
    gang.assign(2, "hold")
    await gang.until(lambda: gang.pods[0].said.fenced_by == 6)
    gang.assign(7, "hold")
    await gang.until(lambda: gang.pods[0].said.offer)
    assert gang.head.run_uid == "uid-1"


async def test_the_next_attempt_takes_up_a_spec_whose_storage_and_number_of_checkpoints_were_changed(gang):
    gang.plans(fail={"attempt": 1, "iteration": 3, "cause": "Crash"})
    await gang.form(1)
    await gang.until(lambda: gang.pods[0].said.state == "failed")
    gang.plans()
    elsewhere = replace(gang.config.storage, region="elsewhere")
    gang.config = replace(gang.config, storage=elsewhere, checkpoint=replace(gang.config.checkpoint, keep_last=1))
    await gang.form(2)
    await gang.until(lambda: gang.all_say("done", 2))
    assert gang.head.attempt == 1
    found = Head.from_json(store_of(gang.config.checkpoint.uri, elsewhere).get(HEAD_KEY).data)
    assert (found.attempt, [entry.step for entry in found.entries]) == (2, [4])


async def test_an_agent_whose_workers_do_not_leave_ends_before_its_grace_period_does_and_says_what_is_lost(gang):
    gang.plans(hang=3)
    await gang.form(1)
    await gang.until(lambda: gang.all_say("training", 1))
    gang.pods[1].supervisor.terminate()
    await asyncio.wait_for(gang.pods[1].task, SECONDS)
    assert gang.pods[1].said.state == "draining"
    assert gang.pods[1].said.problem.reason == "GraceExceeded"
    assert gang.pods[0].said.state == "training", "it was asked to leave nowhere"


async def test_metrics_show_what_the_workers_said(gang):
    await gang.form(1)
    await gang.until(lambda: gang.all_say("done", 1))
    value = gang.pods[0].metrics.registry.get_sample_value
    assert value("starcoder_iteration") == 4
    assert value("starcoder_loss") == 5.0
    assert value("starcoder_tokens_per_second_per_gpu") == 640.0 / 4
    assert value("starcoder_step_seconds", {"phase": "total"}) == 0.01
    assert value("starcoder_state", {"state": "done"}) == 1
    assert value("starcoder_checkpoint_verified_iteration") == 4
    assert value("starcoder_checkpoint_uploaded_bytes_total") > 0
