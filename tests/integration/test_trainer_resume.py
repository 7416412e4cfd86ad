"""Saved by workers, committed by the agents' code, loaded again: in the same layout bitwise, in another within 1e-6."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from starcoder_trainer.contract.assignment import CheckpointRef, Layout
from starcoder_trainer.contract.config import TrainingConfig
from starcoder_trainer.contract.ledger import MANIFEST, Manifest, checkpoint_prefix
from starcoder_trainer.model.transformer import parameter_count
from tests.support.trainer import ONE, RankFailed, commit, make_config, resume, run_ranks, train_and_save

pytestmark = pytest.mark.slow

ITERATIONS, SAVED_AT = 8, 4
DATA_2, DATA_3 = Layout(1, 1, 2), Layout(1, 1, 3)
TENSOR_2, PIPELINE_2 = Layout(2, 1, 1), Layout(1, 2, 1)
TENSOR_2_DATA_2 = Layout(2, 1, 2, sequence=True)


@dataclass(frozen=True)
class Run:
    """An undisturbed run, and the checkpoint of its middle."""

    layout: Layout
    config: TrainingConfig
    root: Path
    losses: list[float]
    checkpoint: CheckpointRef

    def files(self, attempt: int, step: int) -> dict[str, bytes]:
        folder = self.root / "checkpoints" / checkpoint_prefix(attempt, step)
        return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}

    def manifest(self) -> Manifest:
        folder = self.root / "store" / checkpoint_prefix(self.checkpoint.attempt, self.checkpoint.step)
        return Manifest.from_json((folder / MANIFEST).read_bytes())


def config_for(layout: Layout, **changes: Any) -> TrainingConfig:
    return make_config(layout, iterations=ITERATIONS, global_batch=8, every_iterations=SAVED_AT, **changes)


def run(layout: Layout, root: Path, **changes: Any) -> Run:
    config = config_for(layout, **changes)
    losses = run_ranks(layout, train_and_save, config, layout, root)[0]
    return Run(layout, config, root, losses, commit(root, 1, SAVED_AT, layout.world_size))


def resumed(run: Run, layout: Layout, *, local: bool = False, **changes: Any) -> list[float]:
    work = functools.partial(resume, local=local)
    losses: list[float] = run_ranks(layout, work, config_for(layout, **changes), layout, run.root, run.checkpoint)[0]
    assert len(losses) == ITERATIONS - SAVED_AT
    return losses


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Run]:
    layouts = (DATA_2, DATA_3, TENSOR_2, TENSOR_2_DATA_2)
    return {layout: run(layout, tmp_path_factory.mktemp("run")) for layout in layouts}


@pytest.mark.parametrize(("layout", "precision"), [(TENSOR_2_DATA_2, "fp32"), (DATA_2, "bf16")], ids=str)
def test_in_the_same_layout_losses_weights_and_moments_are_bitwise_those_of_the_undisturbed_run(
    tmp_path: Path, layout: Layout, precision: str
) -> None:
    changes: dict[str, Any] = {"dropout": 0.1, "precision": precision}
    undisturbed = run(layout, tmp_path, **changes)
    assert resumed(undisturbed, layout, **changes) == undisturbed.losses[SAVED_AT:]
    before, after = undisturbed.files(1, ITERATIONS), undisturbed.files(2, ITERATIONS)
    assert before.keys() == after.keys() == {f"rank-{r:05d}.safetensors" for r in range(layout.world_size)}
    assert before == after
    assert before != undisturbed.files(1, SAVED_AT)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (DATA_2, ONE),
        (DATA_3, DATA_2),
        (DATA_2, DATA_3),
        (DATA_2, TENSOR_2_DATA_2),
        (TENSOR_2, PIPELINE_2),
        (TENSOR_2_DATA_2, DATA_3),
        (TENSOR_2_DATA_2, Layout(1, 2, 2)),
    ],
    ids=[
        "shrunk, data 2 -> 1", "shrunk, data 3 -> 2", "grown, data 2 -> 3", "data 2 -> tensor 2 x data 2",
        "tensor 2 -> pipeline 2", "tensor 2 x data 2 -> data 3", "tensor 2 x data 2 -> pipeline 2 x data 2",
    ],
)  # fmt: skip
def test_in_another_layout_losses_are_within_a_millionth(runs: dict[Layout, Run], old: Layout, new: Layout) -> None:
    assert resumed(runs[old], new) == pytest.approx(runs[old].losses[SAVED_AT:], abs=1e-6, rel=0)


def test_what_the_disk_still_holds_is_not_read_from_the_store(tmp_path: Path) -> None:
    undisturbed = run(DATA_2, tmp_path)
    for path in (tmp_path / "store" / checkpoint_prefix(1, SAVED_AT)).glob("*.safetensors"):
        path.unlink()
    with pytest.raises(RankFailed, match=r"rank-0000\d\.safetensors"):
        resumed(undisturbed, DATA_2)
    assert resumed(undisturbed, DATA_2, local=True) == undisturbed.losses[SAVED_AT:]


@pytest.mark.parametrize("layout", [DATA_2, TENSOR_2, TENSOR_2_DATA_2], ids=str)
def test_a_checkpoint_holds_12_bytes_a_parameter_and_no_model_weights(runs: dict[Layout, Run], layout: Layout) -> None:
    found = runs[layout]
    data = 0
    for name, content in found.files(1, SAVED_AT).items():
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        assert {entry["dtype"] for entry in header.values()} == {"F32"}, name
        assert {key.split("/")[0] for key in header} == {"param", "exp_avg", "exp_avg_sq"}, name
        data += len(content) - 8 - length
    assert data == 12 * parameter_count(found.config.model)
    manifest = found.manifest()
    assert manifest.world_size == layout.world_size
    assert json.loads(manifest.common["iteration"]) == SAVED_AT
    assert json.loads(manifest.common["consumedSamples"]) == SAVED_AT * found.config.training.global_batch_size


def test_files_of_a_checkpoint_open_with_the_safetensors_library(runs: dict[Layout, Run]) -> None:
    from safetensors.numpy import load_file

    folder = runs[DATA_2].root / "store" / checkpoint_prefix(1, SAVED_AT)
    ranks = [load_file(folder / f"rank-{rank:05d}.safetensors") for rank in range(2)]
    assert all(values.ndim == 1 and values.dtype == "float32" for tensors in ranks for values in tensors.values())
    name = "param/decoder.layers.0.self_attention.linear_qkv.weight@0_0x72_48"
    assert sum(tensors[name].size for tensors in ranks if name in tensors) == 72 * 48
