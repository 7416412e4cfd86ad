"""The run that nobody disturbs: the trainer under torchrun on this machine, in the layouts that the disturbed run had.

Rounding depends on the layout, and training makes more of it with every iteration: after some thousand, two sound runs
that changed their layouts at other iterations differ by more than any tolerance worth the name. With the layouts the
same at every iteration, each loss is equal to its last digit, or the disturbed run lost something. What a change of
layout itself loses both would lose: so at each the old layout trains on for a while beside the new one.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from devcluster.cluster import Cluster
from examples.demo import stages
from starcoder_operator.api.v1alpha1 import read_run
from starcoder_operator.domain.training_config import training_config
from starcoder_trainer.contract import names
from starcoder_trainer.contract.config import TrainingConfig
from starcoder_trainer.worker import ENV_CREDENTIALS_DIR

from .losses import loss_in
from .trunk import Stretch

SCRIPT = Path(__file__).parents[1] / "torchrun_train.py"
BESIDE = 20
"""Iterations that the layout before a change trains beside the one after it."""
TOLD_EVERY = 500
"""Iterations between two words of how far it is."""
START_SECONDS, ITERATION_SECONDS = 300.0, 5.0
"""Longest time for a start, and for an iteration."""
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class _Part:
    """What one start trains."""

    after: int
    stretch: Stretch
    beside: int
    """Iterations after the stretch, which are not saved."""

    @property
    def last(self) -> int:
        return self.stretch.until + self.beside


@dataclass(frozen=True)
class Undisturbed:
    losses: dict[int, str]
    """By iteration, all digits."""
    beside: dict[int, str]
    """Of iterations after a change of layout, as the layout before it trains them from the same state."""


def train(
    cluster: Cluster, document: dict[str, Any], stretches: tuple[Stretch, ...], say: Callable[[str], None]
) -> Undisturbed:
    """All stretches, one after the other, each from the checkpoint of the one before.

    Args:
        document: the StarCoderRun; its checkpoint URI is empty yet.

    Raises:
        RuntimeError: torchrun failed; the message has the end of what it said.
    """
    found = Undisturbed({}, {})
    with tempfile.TemporaryDirectory(prefix="undisturbed-") as folder:
        root = Path(folder)
        (root / "config.json").write_text(_config(document).to_json())
        for name, value in zip(names.CREDENTIALS_KEYS, (cluster.s3.access_key, cluster.s3.secret_key), strict=True):
            (root / name).write_text(value)
        (root / "scratch").mkdir()
        for at, stretch in enumerate(stretches):
            say(f"undisturbed, to iteration {stretch.until} of {stretches[-1].until}: {stretch.layout}")
            following = stretches[at + 1].until if at + 1 < len(stretches) else stretch.until
            after = stretches[at - 1].until if at else 0
            told = _train(cluster, root, _Part(after, stretch, min(BESIDE, following - stretch.until)), say)
            found.losses.update({i: loss for i, loss in told.items() if i <= stretch.until})
            found.beside.update({i: loss for i, loss in told.items() if i > stretch.until})
    return found


def _config(document: dict[str, Any]) -> TrainingConfig:
    name = document["metadata"]["name"]
    config = training_config(name, stages.NAMESPACE, f"uid-{name}", read_run(document).spec)
    # It saves where a stretch ends; that a checkpoint changes nothing is what the other run shows.
    return dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, every_iterations=config.training.iterations)
    )


def _train(cluster: Cluster, root: Path, part: _Part, say: Callable[[str], None]) -> dict[int, str]:
    """Loss by iteration."""
    workers = part.stretch.layout.world_size
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", str(SCRIPT),
        str(root / "config.json"), str(part.stretch.until), str(part.beside),
    ]  # fmt: skip
    settings = {
        ENV_CREDENTIALS_DIR: str(root),
        "TMPDIR": str(root / "scratch"),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    losses: dict[int, str] = {}
    with (root / "errors").open("w+") as errors:
        with cluster.inside():
            process = subprocess.Popen(
                command, env=os.environ | settings, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert process.stdout is not None
        limit = threading.Timer(START_SECONDS + ITERATION_SECONDS * (part.last - part.after), process.terminate)
        limit.start()
        try:
            for line in process.stdout:
                if told := loss_in(line):
                    losses[told[0]] = told[1]
                    if told[0] % TOLD_EVERY == 0:
                        say(f"undisturbed: iteration {told[0]}")
            code = process.wait()
        finally:
            limit.cancel()
            _end(process)
        if code or part.last not in losses:
            raise RuntimeError(
                f"torchrun ended with {code}, iteration {max(losses, default=part.after)} of {part.last} done:\n"
                f"{_tail(errors)}"
            )
    return losses


def _tail(errors: IO[str]) -> str:
    errors.seek(0)
    return "\n".join(errors.read().splitlines()[-30:])


def _end(process: subprocess.Popen[str]) -> None:
    """torchrun ends its workers on SIGTERM."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
