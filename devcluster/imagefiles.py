"""Images of a few files, made here because there is no registry to take them from: the pause container and busybox."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

PAUSE = "localhost/pause:1"
BUSYBOX = "localhost/busybox:1"


@dataclass(frozen=True)
class TinyImage:
    """One layer of static programs: path in the image to path here, and links by path to target."""

    reference: str
    files: tuple[tuple[str, Path], ...]
    links: tuple[tuple[str, str], ...] = ()
    command: tuple[str, ...] = ()
    user: str = ""


def pause() -> TinyImage:
    """Holds a Pod's namespaces and reaps its orphans: what catatonit's -P is for."""
    return TinyImage(
        PAUSE, (("catatonit", Path("/usr/bin/catatonit")),), command=("/catatonit", "-P"), user="65535:65535"
    )


def busybox() -> TinyImage:
    """A shell and its tools, for tests."""
    program = Path("/bin/busybox")
    applets = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    links = tuple((f"bin/{a}", "busybox") for a in applets if a != "busybox")
    return TinyImage(BUSYBOX, (("bin/busybox", program),), links, ("sh",))


def write_archive(image: TinyImage, path: Path) -> None:
    """A docker-archive, as `ctr images import` takes it; the same bytes each time."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        folders = {"tmp": 0o1777} | {Path(name).parent.as_posix(): 0o755 for name, _ in image.files}
        for folder, mode in sorted(folders.items()):
            if folder != ".":
                entry = tarfile.TarInfo(folder)
                entry.type, entry.mode = tarfile.DIRTYPE, mode
                tar.addfile(entry)
        for name, source in image.files:
            _add(tar, name, source.read_bytes(), 0o755)
        for name, target in image.links:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
    content = layer.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    config = json.dumps(
        {
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()],
            "os": "linux",
            "config": {"Cmd": image.command, "Env": ["PATH=/bin"], "User": image.user},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        }
    ).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = [{"Config": config_name, "RepoTags": [image.reference], "Layers": [f"{digest}.tar"]}]
    with tarfile.open(path, "w") as tar:
        _add(tar, f"{digest}.tar", content)
        _add(tar, config_name, config)
        _add(tar, "manifest.json", json.dumps(manifest).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))
