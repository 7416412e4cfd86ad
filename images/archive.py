"""An image's manifest and configuration as an OCI archive whose layers are empty.

A node that fills each layer's snapshot from a folder needs no more, and several GB are neither packed nor unpacked nor
stored a second time. Each layer's stand-in names the layer it stands for, so that digests still tell images apart.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write(path: Path, reference: str, config: Mapping[str, Any], layers: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Digest of the manifest, and the diff ID of each stand-in.

    Args:
        config: OCI image configuration.
        layers: real diff IDs, lowest first.
    """
    stand_ins = [_stand_in(diff_id) for diff_id in layers]
    diff_ids = tuple(map(digest, stand_ins))
    config_blob = _json(
        {
            "architecture": config.get("architecture") or {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()],
            "os": "linux",
            "config": config.get("config", {}),
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }
    )
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": _descriptor("application/vnd.oci.image.config.v1+json", config_blob),
            "layers": [_descriptor("application/vnd.oci.image.layer.v1.tar", blob) for blob in stand_ins],
        }
    )
    entry = _descriptor("application/vnd.oci.image.manifest.v1+json", manifest)
    index = _json({"schemaVersion": 2, "manifests": [entry | {"annotations": {"io.containerd.image.name": reference}}]})
    with tarfile.open(path, "w") as tar:
        _add(tar, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
        _add(tar, "index.json", index)
        for blob in dict.fromkeys([*stand_ins, config_blob, manifest]):
            _add(tar, f"blobs/sha256/{digest(blob).removeprefix('sha256:')}", blob)
    return digest(manifest), diff_ids


def references(path: Path) -> tuple[str, ...]:
    """Names of the images in an OCI or docker archive. Raises ValueError."""
    try:
        with tarfile.open(path) as tar:
            if "manifest.json" in tar.getnames():
                found = [name for image in _read(tar, "manifest.json") for name in image.get("RepoTags") or ()]
            else:
                manifests = _read(tar, "index.json")["manifests"]
                keys = ("io.containerd.image.name", "org.opencontainers.image.ref.name")
                notes = [m.get("annotations", {}) for m in manifests]
                found = [next(n[k] for k in keys if k in n) for n in notes if any(k in n for k in keys)]
    except (tarfile.TarError, KeyError, ValueError) as e:
        raise ValueError(f"{path} is neither an OCI archive nor a docker archive: {e}") from e
    if not found:
        raise ValueError(f"{path} names no image; expected a reference, as `docker save NAME` writes it")
    return tuple(found)


def digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _stand_in(diff_id: str) -> bytes:
    blob = io.BytesIO()
    with tarfile.open(fileobj=blob, mode="w") as tar:
        _add(tar, ".layer", diff_id.encode())
    return blob.getvalue()


def _descriptor(media_type: str, blob: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest(blob), "size": len(blob)}


def _json(document: object) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _read(tar: tarfile.TarFile, name: str) -> Any:
    member = tar.extractfile(name)
    if member is None:
        raise ValueError(f"{name} is no file")
    return json.load(member)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o644
    tar.addfile(entry, io.BytesIO(content))
