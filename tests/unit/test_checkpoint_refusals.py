"""From rank manifests to HEAD and back: what is not whole is neither listed nor loaded, and the message says where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from starcoder_trainer.agent.ledger import Claimed, Committed, Ledger, reference
from starcoder_trainer.agent.messages import Upload
from starcoder_trainer.agent.upload import upload_shard
from starcoder_trainer.agent.verify import Corrupt
from starcoder_trainer.checkpoint.common import Position, describe, position_of
from starcoder_trainer.checkpoint.index import read_index
from starcoder_trainer.contract.assignment import CheckpointRef, Layout
from starcoder_trainer.contract.ledger import Piece, RankManifest, checkpoint_prefix
from starcoder_trainer.contract.worker import Saved
from starcoder_trainer.failures import ConfigurationError, DamagedCheckpointError
from starcoder_trainer.storage.file import FileStore
from tests.support.trainer import RUN, make_config

ATTEMPT, STEP, RANKS = 1, 4, 2
CONFIG = make_config()
COMMON = describe(CONFIG, Layout(1, 1, 2), Position(STEP, 24, STEP))
TENSOR = "param/w@0_0x2_6"


class Saves:
    """Two ranks with half of one tensor each, saved as workers save."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "scratch"
        self.store = FileStore(f"file://{root}/store")
        self.store.root.mkdir()
        self.folder.mkdir()
        self.manifests = {}
        for rank in range(RANKS):
            file = f"rank-{rank:05d}.safetensors"
            (self.folder / file).write_bytes(bytes(8 + 24))
            piece = Piece(TENSOR, "float32", 12, 6 * rank, 6, file, 8)
            self.manifests[rank] = RankManifest(ATTEMPT, STEP, rank, (file,), (piece,), COMMON)

    def change(self, rank: int, **fields: object) -> None:
        manifest = self.manifests[rank]
        self.manifests[rank] = replace(manifest, pieces=(replace(manifest.pieces[0], **fields),))  # type: ignore[arg-type]

    def commit(self) -> CheckpointRef:
        for rank, manifest in self.manifests.items():
            (self.folder / f"rank-{rank:05d}.json").write_text(manifest.to_json())
        ledger = Ledger(self.store, RUN, "boot", 3, pause=lambda _: None)
        assert isinstance(ledger.claim(ATTEMPT, "Own"), Claimed)
        for rank in range(RANKS):
            saved = Saved(ATTEMPT, rank, STEP, str(self.folder), 0.1, 32)
            upload_shard(self.store, rank, Upload(ATTEMPT, STEP, RANKS, (saved,)))
        committed = ledger.commit(ATTEMPT, STEP)
        assert isinstance(committed, Committed)
        return reference(committed.entry)

    def uploaded(self, name: str) -> Path:
        return self.store.root / checkpoint_prefix(ATTEMPT, STEP) / name


@pytest.fixture
def saves(tmp_path: Path) -> Saves:
    return Saves(tmp_path)


def test_whole_saves_are_committed_and_read_back(saves: Saves) -> None:
    index = read_index(saves.store, saves.commit())
    assert [(p.start, p.count) for (name, pieces) in index.tensors.items() for p in pieces] == [(0, 6), (6, 6)]
    assert position_of(index.common, CONFIG) == Position(STEP, 24, STEP)
    assert [str(box) for box in index.boxes_of("param", "w", (2, 6))] == [TENSOR]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 7, "count": 5}, r"elements \[6, 7\) are missing"),
        ({"start": 5, "offset": 4, "count": 7}, r"elements \[5, 6\) are present twice"),
        ({"dtype": "bfloat16"}, "found bfloat16"),
        ({"offset": 12}, r"bytes \[12, 36\) of rank-00001.safetensors, found a file of 32 bytes"),
    ],
    ids=["missing piece", "overlapping piece", "wrong type", "file cut short"],
)
def test_what_does_not_make_whole_tensors_is_never_listed(
    saves: Saves, change: dict[str, object], message: str
) -> None:
    saves.change(1, **change)
    with pytest.raises(Corrupt, match=message):
        saves.commit()


def test_a_manifest_that_was_overwritten_is_not_loaded(saves: Saves) -> None:
    checkpoint = saves.commit()
    path = saves.uploaded("manifest.json")
    path.write_text(path.read_text().replace('"step":4', '"step":5'))
    with pytest.raises(
        DamagedCheckpointError, match=r"manifest\.json: found sha256:.*, HEAD says sha256:.*overwritten"
    ):
        read_index(saves.store, checkpoint)


def test_what_becomes_of_shard_manifests_after_the_commit_does_not_matter(saves: Saves) -> None:
    checkpoint = saves.commit()
    before = read_index(saves.store, checkpoint)
    saves.uploaded("shard-00001.json").unlink()
    assert read_index(saves.store, checkpoint) == before


def test_a_checkpoint_of_another_model_is_refused_by_field() -> None:
    other = replace(CONFIG, model=replace(CONFIG.model, hidden_size=64, vocab_size=101))
    with pytest.raises(ConfigurationError, match=r"hidden_size 48 \(this run: 64\), vocab_size 100 \(this run: 101\)"):
        position_of(COMMON, other)


def test_a_sample_length_of_its_own_does_not_make_it_another_model() -> None:
    shorter = replace(CONFIG, data=replace(CONFIG.data, sequence_length=16))
    assert position_of(COMMON, shorter).iteration == STEP


@pytest.mark.parametrize(
    ("common", "message"),
    [
        ({**COMMON, "format": '"dcp-3"'}, "found dcp-3, this trainer reads starcoder-flat-1"),
        ({k: v for k, v in COMMON.items() if k != "iteration"}, "written by another program"),
    ],
)
def test_a_checkpoint_of_another_format_is_refused(common: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        position_of(common, CONFIG)
