"""The run that nobody disturbs: the trainer under torchrun on this machine, in the layouts that the disturbed run had.

Rounding depends on the layout, and training makes more of it with every iteration: after some thousand, two sound runs
that changed their layouts at other iterations differ by more than any tolerance worth the name. With the layouts the
same at every iteration, each loss is equal to its last digit, or something was lost.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.soak.losses import loss_in
from devcluster.cluster import Cluster
from examples.demo import stages
from starcoder_operator.api.v1alpha1 import read_run
from starcoder_operator.domain.training_config import training_config
from starcoder_trainer.contract import names
from starcoder_trainer.contract.assignment import Layout
from starcoder_trainer.contract.config import TrainingConfig
from starcoder_trainer.worker import ENV_CREDENTIALS_DIR

SCRIPT = Path(__file__).parents[1] / "torchrun_train.py"
TOLD_EVERY = 500
"""Iterations between two words of how far it is."""
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Stretch:
    """Iterations that one layout trained, up to and with `until`."""

    until: int
    layout: Layout


def stretches(committed: Mapping[int, int], layouts: Mapping[int, Layout]) -> tuple[Stretch, ...]:
    """Which layout trained what a checkpoint holds.

    Only the attempt that commits a checkpoint has trained the iterations since the one before: it began there or at
    one of its own, and whoever trained them earlier was cut off from committing.

    Args:
        committed: attempt by iteration of all checkpoints that HEAD listed.
        layouts: by attempt.
    """
    found: list[Stretch] = []
    for until, attempt in sorted(committed.items()):
        if found and found[-1].layout == layouts[attempt]:
            found.pop()
        found.append(Stretch(until, layouts[attempt]))
    return tuple(found)


def train(
    cluster: Cluster, document: dict[str, Any], parts: tuple[Stretch, ...], say: Callable[[str], None]
) -> dict[int, str]:
    """Loss by iteration, all digits.

    Args:
        document: the StarCoderRun; its checkpoint URI is empty yet.

    Raises:
        RuntimeError: torchrun failed; the message has the end of what it said.
    """
    losses: dict[int, str] = {}
    with tempfile.TemporaryDirectory(prefix="undisturbed-") as folder:
        root = Path(folder)
        (root / "config.json").write_text(_config(document).to_json())
        for name, value in zip(names.CREDENTIALS_KEYS, (cluster.s3.access_key, cluster.s3.secret_key), strict=True):
            (root / name).write_text(value)
        (root / "scratch").mkdir()
        for part in parts:
            say(f"undisturbed, up to iteration {part.until} of {parts[-1].until}: {part.layout.world_size} workers")
            _train(cluster, root, part, losses, say)
    return losses


def _config(document: dict[str, Any]) -> TrainingConfig:
    name = document["metadata"]["name"]
    config = training_config(name, stages.NAMESPACE, f"uid-{name}", read_run(document).spec)
    # It saves where a stretch ends; that a checkpoint changes nothing is what the other run shows.
    return dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, every_iterations=config.training.iterations)
    )


def _train(cluster: Cluster, root: Path, part: Stretch, losses: dict[int, str], say: Callable[[str], None]) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={part.layout.world_size}",
        str(SCRIPT), str(root / "config.json"), str(part.until),
    ]  # fmt: skip
    settings = {
        ENV_CREDENTIALS_DIR: str(root),
        "TMPDIR": str(root / "scratch"),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    with (root / "errors").open("w+") as errors:
        with cluster.inside():
            process = subprocess.Popen(
                command, env=os.environ | settings, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if told := loss_in(line):
                    losses[told[0]] = told[1]
                    if told[0] % TOLD_EVERY == 0:
                        say(f"undisturbed: iteration {told[0]}")
            code = process.wait()
        finally:
            _end(process)
        if code or part.until not in losses:
            raise RuntimeError(
                f"torchrun ended with {code}, and told no loss of iteration {part.until}:\n{_tail(errors)}"
            )


def _tail(errors: Any) -> str:
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
