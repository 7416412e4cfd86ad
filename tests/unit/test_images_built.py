"""Records of built images: which one a reference means, what is kept, and the archive that nodes get."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from devcluster.cluster import ClusterError
from devcluster.images import chain_ids, resolve, upper_folder
from devcluster.node import CommandFailed
from images import archive, built
from images.buildah import StoredLayer
from images.built import BuiltImage

REFERENCE = "localhost/example:dev"
CONFIG = {"architecture": "amd64", "config": {"User": "10001:10001", "Entrypoint": ["example"]}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STARCODER_CACHE", str(tmp_path))
    return tmp_path


def make(cache: Path, key: str, *, name: str = "example", at: int = 0, layers: int = 2) -> BuiltImage:
    """A record as a build leaves it, made at second `at`."""
    stored = []
    for i in range(layers):
        folder = cache / "storage" / f"{key}-{i}"
        folder.mkdir(parents=True, exist_ok=True)
        stored.append(StoredLayer(f"sha256:{hashlib.sha256(f'{key}{i}'.encode()).hexdigest()}", folder, 1000 + i))
    reference = REFERENCE.replace("example", name)
    image = built.record(name, reference, key, config=CONFIG, layers=stored, tags=[f"localhost/{name}:{key}"])
    os.utime(image.archive.parent / "image.json", (at, at))
    return image


def test_a_record_reads_back_as_it_was_written(cache: Path) -> None:
    image = make(cache, "a")
    assert built.find("example", "a") == image
    assert image.size == 2001
    assert [p.name for p in (cache / "images" / "built").iterdir()] == ["example-a"]


def test_a_record_whose_layers_are_gone_counts_as_not_built(cache: Path) -> None:
    image = make(cache, "a")
    shutil.rmtree(image.layers[1].folder)
    assert built.find("example", "a") is None
    assert built.newest(REFERENCE) is None


def test_a_reference_means_the_image_that_was_last_asked_for(cache: Path) -> None:
    make(cache, "a", at=100)
    make(cache, "b", at=200)
    found = built.newest(REFERENCE)
    assert found is not None
    assert found.key == "b"
    assert built.find("example", "a") is not None  # asked for again: its sources are as they were before
    found = built.newest(REFERENCE)
    assert found is not None
    assert found.key == "a"


def test_the_newest_two_of_each_image_stay_and_half_records_go(cache: Path) -> None:
    for i, key in enumerate("abcd"):
        make(cache, key, at=100 + i)
    make(cache, "x", name="other", at=1)
    (cache / "images" / "built" / ".new-cut").mkdir()
    assert [(i.name, i.key) for i in built.prune()] == [("example", "d"), ("example", "c"), ("other", "x")]
    assert {p.name for p in (cache / "images" / "built").iterdir()} == {"example-d", "example-c", "other-x"}


def test_the_archive_is_a_valid_image_whose_layers_are_tiny(cache: Path) -> None:
    image = make(cache, "a")
    with tarfile.open(image.archive) as tar:
        blobs = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    for name, blob in blobs.items():
        if name.startswith("blobs/"):
            assert name == f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}"

    def blob(digest: str) -> Any:
        return json.loads(blobs[f"blobs/sha256/{digest.removeprefix('sha256:')}"])

    (entry,) = json.loads(blobs["index.json"])["manifests"]
    assert entry["digest"] == image.digest
    manifest = blob(image.digest)
    config = blob(manifest["config"]["digest"])
    assert config["config"] == CONFIG["config"]
    assert [layer["digest"] for layer in manifest["layers"]] == config["rootfs"]["diff_ids"]
    assert config["rootfs"]["diff_ids"] == [layer.diff_id for layer in image.layers]
    assert image.archive.stat().st_size < 50_000
    assert archive.references(image.archive) == (REFERENCE,)


def test_another_layer_gives_another_digest_and_the_same_layers_the_same(cache: Path) -> None:
    first = make(cache, "a").digest
    assert make(cache, "b").digest != first
    shutil.rmtree(built.folder())
    assert make(cache, "a").digest == first


def test_an_archive_of_docker_tells_its_names(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps([{"Config": "c", "RepoTags": ["example/app:1"], "Layers": []}]))
    with tarfile.open(tmp_path / "docker.tar", "w") as tar:
        tar.add(manifest, "manifest.json")
    assert archive.references(tmp_path / "docker.tar") == ("example/app:1",)


@pytest.mark.parametrize("content", [b"", b"no tar at all"])
def test_a_file_that_is_no_archive_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file.tar"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.tar"):
        archive.references(file)


def test_an_image_that_was_never_built_is_refused_with_what_there_is_and_what_to_run(cache: Path) -> None:
    make(cache, "a")
    with pytest.raises(ClusterError, match=r"localhost/absent:dev.*built: localhost/example:dev.*make images"):
        resolve("localhost/absent:dev")


def test_snapshots_are_named_as_containerd_names_them() -> None:
    # `printf 'sha256:a sha256:b' | sha256sum`, and the same of that digest and "sha256:c"
    assert chain_ids(["sha256:a", "sha256:b", "sha256:c"]) == [
        "sha256:a",
        "sha256:970a948bffa8de94d6e22d747ba8c95030e6e546909f98f54e99a13005e173a8",
        "sha256:dee159b33409cefa3f6eda71539f006014283e9d9130c18a1dea7bd8a33c9b1b",
    ]


@pytest.mark.parametrize(
    "mount",
    [
        "mount -t bind /var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/7/fs / -o rw,rbind",
        "mount -t overlay overlay / -o index=off,workdir=/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/"
        "snapshots/7/work,upperdir=/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/7/fs,"
        "lowerdir=/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/1/fs",
    ],
)
def test_the_folder_of_a_snapshot_is_found_on_this_machine(mount: str) -> None:
    expected = Path("/disk/io.containerd.snapshotter.v1.overlayfs/snapshots/7/fs")
    assert upper_folder(mount, Path("/disk")) == expected


def test_a_mount_of_another_snapshotter_is_refused_by_name() -> None:
    with pytest.raises(CommandFailed, match="erofs"):
        upper_folder("mount -t erofs /dev/loop0 / -o ro", Path("/disk"))
