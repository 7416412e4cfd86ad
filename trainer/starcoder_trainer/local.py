"""`starcoder-trainer local run.yaml --workers N`: the same spec without Kubernetes, on one machine.

Fork server, workers, supervisor, ledger and uploads are those of a Pod; in place of the operator stands the few lines
of `Attempts` below, which form attempts of one member. Only here may URIs be `file://`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from starcoder_operator.api.v1alpha1 import InvalidRun, StarCoderRun, read_run
from starcoder_operator.domain import validation
from starcoder_operator.domain.layout import layout_of
from starcoder_operator.domain.training_config import training_config
from starcoder_trainer.agent.logs import log_json
from starcoder_trainer.agent.messages import GRACE_SECONDS, Identity
from starcoder_trainer.agent.metrics import Metrics
from starcoder_trainer.agent.supervisor import Supervisor, Surroundings
from starcoder_trainer.contract import names
from starcoder_trainer.contract.assignment import Assignment, Layout, Member, Offer, Phase
from starcoder_trainer.contract.codec import ContractError
from starcoder_trainer.contract.config import StorageConfig, TrainingConfig
from starcoder_trainer.contract.ledger import HEAD_KEY, Head
from starcoder_trainer.contract.report import Failure, Report
from starcoder_trainer.local_progress import Summary, View, view
from starcoder_trainer.storage.file import FileStore
from starcoder_trainer.storage.open import open_store
from starcoder_trainer.storage.store import NotFound, ObjectStore, PreconditionFailed, StorageError

LOCALHOST = "127.0.0.1"
UID_KEY = "local-run-uid"
"""Beside HEAD.json: started again with the same checkpoint.uri, a local run is the same run."""
WAITED_OUT = ("StorageUnreachable", "WorkerNotReady")
"""Problems that may mend themselves; for the others a person is needed, and at a terminal there is one."""
STOP_SECONDS = 10.0
POLL_SECONDS = 0.2


class BadInput(Exception):
    """The command line or the file can't be trained; the message says what and why."""


Ending = Literal["complete", "failed", "interrupted"]


def read(path: Path, overrides: Sequence[str], workers: int) -> StarCoderRun:
    """The run in `path` with `a.b.c=value` applied and its gang replaced by `workers` workers in one member.

    Raises:
        BadInput: no YAML, no StarCoderRun, or one that can't be trained on so many workers.
    """
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as e:
        raise BadInput(f"{path}: {e}") from e
    if not isinstance(document, dict):
        raise BadInput(f"{path}: found no object, expected one StarCoderRun")
    for override in overrides:
        _override(document, override)
    spec = document.setdefault("spec", {})
    if isinstance(spec, dict) and isinstance(spec.setdefault("workers", {}), dict):
        spec.pop("elasticity", None)
        spec["workers"] |= {"replicas": 1, "gpusPerWorker": workers}
    try:
        run = read_run(document)
    except InvalidRun as e:
        raise BadInput(f"{path}: " + "; ".join(e.problems)) from e
    if found := validation.problems(run.spec, allow_files=True):
        raise BadInput(f"{path}: " + "; ".join(str(v) for v in found))
    return run


def _override(document: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    *parents, last = path.split(".")
    if not equals or not last:
        raise BadInput(f"--set {override}: expected path=value, e.g. spec.training.iterations=100")
    place = document
    for name in parents:
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise BadInput(f"--set {override}: {name} is no object")
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise BadInput(f"--set {override}: {e}") from e


def run_uid(store: ObjectStore) -> str:
    """Identity of the run that owns this checkpoint URI; made by its first start."""
    with contextlib.suppress(PreconditionFailed):
        try:
            return store.get(UID_KEY).data.decode()
        except NotFound:
            store.put_if_absent(UID_KEY, f"local-{uuid.uuid4()}".encode())
    return store.get(UID_KEY).data.decode()


def next_attempt(store: ObjectStore) -> int:
    try:
        return Head.from_json(store.get(HEAD_KEY).data).attempt + 1
    except (NotFound, ContractError):
        return 1  # what is wrong with HEAD is told by the claim


@dataclass
class Attempts:
    """The operator's part for a gang of one: hold, run, hold the next after a failure, stop at the end.

    Failures are counted since the last newer verified checkpoint, as `failurePolicy` says.
    """

    run_uid: str
    boot_id: str
    layout: Layout
    attempt: int
    most_failures: int
    view: View
    summary: Summary
    phase: Phase = "hold"
    failures: int = 0
    newest: int = -1
    ending: Ending | None = None
    explanation: str = ""
    told: str = ""

    def assignment(self, phase: Phase, offer: Offer | None = None) -> Assignment:
        self.phase = phase
        members = (Member(0, self.boot_id),)
        return Assignment(self.run_uid, self.attempt, phase, members, self.layout.world_size, self.layout, offer)

    def reported(self, report: Report) -> Assignment | None:
        """What the only member is told on each change of its report."""
        if report.progress:
            self.summary.progress(report.progress)
            if report.state == "training":
                self.view.progress(report.progress)
        if report.verified and report.verified.checkpoint.step > self.newest:
            self.newest, self.failures = report.verified.checkpoint.step, 0
            self.summary.verified = report.verified
        if self.ending:
            return None
        if report.problem and report.problem.message != self.told:
            self.told = report.problem.message
            self.view.say(f"{report.problem.reason}: {report.problem.message}")
            if report.problem.reason not in WAITED_OUT:
                return self._end("failed", "stopped: mend what is said above and start again")
        if report.fenced_by is not None and report.fenced_by >= self.attempt:
            self.attempt = report.fenced_by + 1
            return self.assignment("hold")
        if report.attempt != self.attempt:
            return None
        if self.phase == "hold" and report.state == "idle" and report.offer:
            start = report.offer.checkpoint
            self.view.say(f"attempt {self.attempt}: starting at iteration {start.step if start else 0}")
            return self.assignment("run", report.offer)
        if self.phase == "run" and report.state == "failed" and report.failure:
            return self._failed(report.failure)
        if report.state == "done":
            return self._end("complete", "complete")
        return None

    def _failed(self, failure: Failure) -> Assignment:
        self.failures += 1
        where = "" if failure.rank is None else f" (rank {failure.rank})"
        self.view.say(f"attempt {self.attempt} failed{where}: {failure.cause}: {failure.message}")
        if failure.cause == "UserError":
            return self._end("failed", "failed: another try would meet the same error")
        if self.failures > self.most_failures:
            return self._end("failed", f"failed: {self.failures} failures since the last new checkpoint")
        self.summary.restarts += 1
        self.attempt += 1
        return self.assignment("hold")

    def _end(self, ending: Ending, explanation: str) -> Assignment:
        self.ending, self.explanation = ending, explanation
        return self.assignment("stop")


def cache_dir() -> Path:
    return Path(os.environ.get("STARCODER_CACHE") or Path.home() / ".cache" / "starcoder-operator")


def open_here(uri: str, storage: StorageConfig) -> ObjectStore:
    return open_store(uri, storage, allow_file=True)


def train(run: StarCoderRun, scratch: Path) -> Ending:
    """Until the last iteration, a failure that restarts can't mend, or SIGINT."""
    spec = run.spec
    checkpoints = open_here(spec.checkpoint.uri, training_config(run.metadata.name, "local", "", spec).storage)
    if isinstance(checkpoints, FileStore):
        checkpoints.root.mkdir(parents=True, exist_ok=True)
    config = training_config(run.metadata.name, "local", run_uid(checkpoints), spec)
    scratch.mkdir(parents=True, exist_ok=True)
    summary, shown, log_file = Summary(), view(spec.training.iterations), scratch / "workers.log"
    attempts = Attempts(
        run_uid=config.run.uid,
        boot_id=uuid.uuid4().hex[:16],
        layout=layout_of(spec),
        attempt=next_attempt(checkpoints),
        most_failures=spec.failure_policy.max_restarts_without_progress,
        view=shown,
        summary=summary,
    )
    shown.say(f"{attempts.layout.world_size} workers; their output is in {log_file}")
    try:
        with tempfile.TemporaryDirectory(prefix="starcoder-") as folder:
            worker_socket = Path(folder) / "worker.sock"
            with fork_server(worker_socket, log_file) as server:
                asyncio.run(_supervise(config, attempts, server, worker_socket, scratch))
    finally:
        shown.close()
    if attempts.ending is None:
        attempts.ending = "failed"
        attempts.explanation = f"failed: the fork server ended with exit code {server.returncode}; see {log_file}"
    for line in summary.lines(attempts.explanation):
        print(line)
    return attempts.ending


@contextlib.contextmanager
def fork_server(worker_socket: Path, log_file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The worker container of a Pod, as a process; it and its workers are gone afterwards."""
    with log_file.open("ab") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "starcoder_trainer", "worker"],
            env={**os.environ, names.ENV_WORKER_SOCKET: str(worker_socket), names.ENV_ALLOW_FILE: "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is ours to hand on
        )
    try:
        yield server
    finally:
        _stop(server)


async def _supervise(
    config: TrainingConfig, attempts: Attempts, server: subprocess.Popen[bytes], worker_socket: Path, scratch: Path
) -> None:
    """Until the run ended, the fork server did, or a signal asks to stop: workers then leave with a checkpoint."""
    from starcoder_trainer.data import preflight as data

    over, hurried = asyncio.Event(), asyncio.Event()

    def reported(report: Report) -> None:
        if assignment := attempts.reported(report):
            supervisor.assign(assignment, config.to_dict())
        if attempts.ending:
            over.set()

    def interrupted() -> None:
        if attempts.ending == "interrupted":
            hurried.set()
        elif attempts.ending is None:
            attempts.view.say("interrupted: workers save and leave; once more to leave without")
        attempts.ending = attempts.ending or "interrupted"
        attempts.explanation = attempts.explanation or "interrupted; start again to go on from the last checkpoint"
        over.set()

    async def watch_server() -> None:
        while server.poll() is None:  # noqa: ASYNC110 - its end is no event of this loop
            await asyncio.sleep(POLL_SECONDS)
        over.set()

    supervisor = Supervisor(
        Identity(
            run_uid=config.run.uid,
            boot_id=attempts.boot_id,
            pod="local",
            incarnation=0,
            node="localhost",
            address=LOCALHOST,
            scratch=str(scratch),
            stamps=str(worker_socket.parent / "stamps"),
        ),
        Surroundings(
            open_store=open_here,
            check_data=data.check,
            worker_socket=worker_socket,
            member=0,
            report=reported,
            metrics=Metrics(config.run.name, "local"),
        ),
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted)
    supervising = asyncio.create_task(supervisor.run())
    supervising.add_done_callback(lambda _: over.set())
    watching = asyncio.create_task(watch_server())
    await asyncio.sleep(0)  # the supervisor takes events from here on
    supervisor.assign(attempts.assignment("hold"), config.to_dict())
    await over.wait()
    supervisor.terminate()
    enough = asyncio.create_task(hurried.wait())
    patience = GRACE_SECONDS if attempts.ending == "interrupted" else STOP_SECONDS
    await asyncio.wait({supervising, enough}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
    for task in (supervising, enough, watching):
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await supervising


def _stop(server: subprocess.Popen[bytes]) -> None:
    """The fork server stops its workers when the supervisor disconnects; it goes itself when asked."""
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="starcoder-trainer local", description="Train a StarCoderRun on this machine, without Kubernetes."
    )
    parser.add_argument("run", type=Path, metavar="run.yaml", help="a StarCoderRun; its URIs may be file:///path")
    parser.add_argument("--workers", type=int, required=True, metavar="N", help="worker processes, one a GPU if any")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="local checkpoints, data cache and workers' output")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE",
        help="override a field, e.g. spec.training.iterations=100; may be repeated",
    )  # fmt: skip
    args = parser.parse_args(argv)
    # Reports and the view say what a person needs; the rest is for whoever looks deeper.
    log_json({"run": "local"})
    logging.getLogger().setLevel(os.environ.get("STARCODER_LOG_LEVEL", "CRITICAL").upper())
    try:
        if args.workers < 1:
            raise BadInput(f"--workers {args.workers}: expected at least 1")
        run = read(args.run, args.overrides, args.workers)
        key = hashlib.sha256(run.spec.checkpoint.uri.encode()).hexdigest()[:16]
        ending = train(run, (args.scratch or cache_dir() / "local" / key).absolute())
    except (BadInput, StorageError) as e:
        print(f"starcoder-trainer local: {e}", file=sys.stderr)
        return 1
    return {"complete": 0, "failed": 1, "interrupted": 130}[ending]
