"""What builds have left for later commands: one record an image and set of inputs."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devcluster.paths import cache

from . import archive
from .buildah import StoredLayer

KEPT = 2
"""Records of each image that `prune` leaves: the newest, and the one before, for going back and forth."""


@dataclass(frozen=True)
class Layer:
    diff_id: str
    """Of its stand-in in the archive."""
    folder: str
    """Its files, on this machine; never to be written to."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class BuiltImage:
    name: str
    reference: str
    digest: str
    """Of the manifest, as nodes report it."""
    key: str
    """Hash of all inputs."""
    config: Mapping[str, Any]
    """OCI: User, Env, Entrypoint, WorkingDir, Labels."""
    layers: tuple[Layer, ...]
    """Lowest first."""
    tags: tuple[str, ...]
    """In buildah's storage, which must keep them."""

    @property
    def size(self) -> int:
        """Bytes, uncompressed."""
        return sum(layer.size for layer in self.layers)

    @property
    def archive(self) -> Path:
        """Manifest and configuration, without the layers' content."""
        return _folder(self.name, self.key) / "image.tar"

    @property
    def whole(self) -> bool:
        return self.archive.exists() and all(Path(layer.folder).is_dir() for layer in self.layers)


def folder() -> Path:
    """Everything about images, below the cache: storage, records, logs, temporary files."""
    return cache() / "images"


def record(
    name: str,
    reference: str,
    key: str,
    *,
    config: Mapping[str, Any],
    layers: Sequence[StoredLayer],
    tags: Sequence[str],
) -> BuiltImage:
    """Written whole or not at all."""
    records = folder() / "built"
    records.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=records, prefix=".new-") as new:
        digest, diff_ids = archive.write(Path(new) / "image.tar", reference, config, [x.diff_id for x in layers])
        kept = tuple(Layer(d, str(x.folder), x.size) for d, x in zip(diff_ids, layers, strict=True))
        image = BuiltImage(name, reference, digest, key, config.get("config", {}), kept, tuple(tags))
        (Path(new) / "image.json").write_text(json.dumps(dataclasses.asdict(image), indent=1))
        place = _folder(name, key)
        shutil.rmtree(place, ignore_errors=True)  # of a storage that was deleted meanwhile
        Path(new).rename(place)
        Path(new).mkdir()  # which TemporaryDirectory removes
    return image


def find(name: str, key: str) -> BuiltImage | None:
    """The record, which thereby becomes the newest of its image; None where it or a layer of it is not there."""
    image = _read(_folder(name, key))
    if image is not None:
        os.utime(image.archive.parent / "image.json")
    return image


def newest(reference: str) -> BuiltImage | None:
    """The image of that reference that was last built, or asked to be."""
    return next((image for image in all_records() if image.reference == reference), None)


def all_records() -> list[BuiltImage]:
    """Newest first."""
    files = (folder() / "built").glob("[!.]*/image.json")
    found = (_read(f.parent) for f in sorted(files, key=lambda f: f.stat().st_mtime_ns, reverse=True))
    return [image for image in found if image is not None]


def prune() -> list[BuiltImage]:
    """Removes all but the newest `KEPT` of each image, and half a record; returns those left."""
    kept: list[BuiltImage] = []
    for image in all_records():
        if sum(k.name == image.name for k in kept) < KEPT:
            kept.append(image)
    wanted = {image.archive.parent for image in kept}
    for place in (folder() / "built").glob("*"):
        if place not in wanted:
            shutil.rmtree(place)
    return kept


def _folder(name: str, key: str) -> Path:
    return folder() / "built" / f"{name}-{key[:16]}"


def _read(place: Path) -> BuiltImage | None:
    try:
        read = json.loads((place / "image.json").read_text())
        read["layers"] = tuple(Layer(**layer) for layer in read["layers"])
        image = BuiltImage(**read | {"tags": tuple(read["tags"])})
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None  # absent, or of another version of this file: built anew
    return image if image.whole else None
