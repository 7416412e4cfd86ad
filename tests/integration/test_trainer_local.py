"""`starcoder-trainer local` as a person uses it: prepared data, a bar in a terminal, Ctrl-C, a second start."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from starcoder_trainer.contract.codec import ContractError
from starcoder_trainer.contract.ledger import HEAD_KEY, Head

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "local.yaml"
ITERATIONS, EVERY = 100, 10
SECONDS = 240


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of Python's own sources."""
    import json

    folder = tmp_path_factory.mktemp("corpus")
    command = [sys.executable, "-m", "starcoder_trainer", "prepare", "--input", str(Path(json.__file__).parent)]
    subprocess.run([*command, "--output", str(folder), "--vocab-size", "600"], check=True)
    return folder


@dataclass
class Local:
    """One start of the command, its stderr a terminal."""

    corpus: Path
    checkpoints: Path
    scratch: Path
    screen: bytearray = field(default_factory=bytearray)

    @contextlib.contextmanager
    def start(self, workers: int = 2, **overrides: object) -> Iterator[subprocess.Popen[str]]:
        fields = {
            "spec.data.tokenizer": f"file://{self.corpus}/tokenizer.json",
            "spec.data.sources": f"[{{uri: 'file://{self.corpus}'}}]",
            "spec.data.sequenceLength": 32,
            "spec.data.fim": "{rate: 0.5}",
            "spec.model": "{preset: starcoder-tiny, layers: 2, hiddenSize: 32, headDim: 8, ffnHiddenSize: 64}",
            "spec.training.iterations": ITERATIONS,
            "spec.training.globalBatchSize": 4,
            "spec.checkpoint": f"{{uri: 'file://{self.checkpoints}', everyIterations: {EVERY}}}",
        } | overrides
        command = [sys.executable, "-m", "starcoder_trainer", "local", str(EXAMPLE), f"--workers={workers}"]
        command += [f"--scratch={self.scratch}", *(f"--set={name}={value}" for name, value in fields.items())]
        ours, terminal = pty.openpty()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, text=True, start_new_session=True)
        os.close(terminal)
        reader = threading.Thread(target=self._watch, args=(ours,))
        reader.start()
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            reader.join()
            os.close(ours)

    def _watch(self, terminal: int) -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(terminal, 65536):
                self.screen += data

    @property
    def shown(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.screen.decode(errors="replace"))

    def final_files(self) -> dict[str, bytes]:
        (folder,) = self.checkpoints.glob(f"a*/step-{ITERATIONS:08d}")
        return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}

    def head(self) -> Head | None:
        with contextlib.suppress(FileNotFoundError, ContractError):
            return Head.from_json((self.checkpoints / HEAD_KEY).read_bytes())
        return None


def fields(summary: str) -> dict[str, str]:
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in summary.splitlines()[1:]}


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Local, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    local = Local(corpus, folder / "checkpoints", folder / "scratch")
    with local.start() as process:
        summary, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, local.shown
    return local, summary


def test_it_trains_to_the_end_and_says_what_came_of_it(undisturbed: tuple[Local, str]) -> None:
    _, summary = undisturbed
    assert summary.startswith("complete\n")
    said = fields(summary)
    assert said["iterations"] == f"1 to {ITERATIONS}"
    first, last = map(float, said["loss"].split(" to "))
    assert last < first - 1
    assert said["tokens"] == f"{ITERATIONS * 4 * 32:,} in all"
    assert said["checkpoint"].startswith(f"iteration {ITERATIONS}, ")


def test_in_a_terminal_a_bar_shows_iteration_loss_rate_and_time_left(undisturbed: tuple[Local, str]) -> None:
    shown = undisturbed[0].shown
    assert re.search(rf"iteration \d+/{ITERATIONS} .*loss \d\.\d{{4}} .*[\d,]+ tokens/s .*ETA", shown), shown[-2000:]


def test_after_ctrl_c_a_second_start_goes_on_and_ends_where_the_undisturbed_run_did(
    undisturbed: tuple[Local, str], tmp_path: Path
) -> None:
    local = Local(undisturbed[0].corpus, tmp_path / "checkpoints", tmp_path / "scratch")
    with local.start() as process:
        while not ((head := local.head()) and head.entries):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
            assert process.poll() is None, local.shown
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 3, "a fork server and two workers"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        summary, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert summary.startswith("interrupted; start again to go on from the last checkpoint\n")
    assert psutil.wait_procs(children, timeout=SECONDS)[1] == [], "no process is left"
    head = local.head()
    assert head is not None
    reached = head.entries[-1].step
    assert 0 < reached < ITERATIONS

    with local.start() as process:
        summary, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, local.shown
    assert f"attempt 2: starting at iteration {reached}" in local.shown
    assert fields(summary)["loss"].split(" to ")[1] == fields(undisturbed[1])["loss"].split(" to ")[1]
    assert local.final_files() == undisturbed[0].final_files()


def test_started_again_when_it_is_complete_it_trains_nothing(undisturbed: tuple[Local, str]) -> None:
    local, _ = undisturbed
    before = local.final_files()
    with local.start() as process:
        summary, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert summary.startswith("complete\n")
    assert local.final_files() == before


def test_missing_data_ends_it_at_once_with_what_to_do(corpus: Path, tmp_path: Path) -> None:
    local = Local(corpus, tmp_path / "checkpoints", tmp_path / "scratch")
    with local.start(**{"spec.data.tokenizer": f"file://{tmp_path}/tokenizer.json"}) as process:
        summary, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert f"DataNotFound: data.tokenizer: read file://{tmp_path}/tokenizer.json: no such file" in local.shown
    assert summary.startswith("stopped: mend what is said above and start again\n")
