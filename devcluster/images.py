"""Images onto nodes that have no registry to pull from.

An image that `images.build` made is not copied: each layer becomes a snapshot of hard links to the one set of files in
the builder's storage, so that a 6 GB image costs a node seconds and no space, and the page cache holds one copy.
containerd gets manifest and configuration from the image's archive and finds that every layer is already unpacked.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from images import archive, built
from images.built import BuiltImage

from .cluster import Cluster, ClusterError
from .node import CommandFailed, Node

PINNED = "io.cri-containerd.pinned=pinned"
"""Label that keeps the kubelet's garbage collection off an image."""

ROOTED = "containerd.io/gc.root"
"""Label that keeps containerd's garbage collection off a snapshot until an image leads to it."""


def load(cluster: Cluster, image: str | Path, *, tag: str = "") -> None:
    """Puts an image on every running node, under its own name or `tag`.

    Args:
        image: reference of an image that was built here, or path of an OCI or docker archive.

    Raises:
        ClusterError: no such image, or no node runs.
        devcluster.node.CommandFailed: containerd refuses.
    """
    nodes = [node for node in cluster.nodes if node.running]
    if not nodes:
        raise ClusterError(f"no node of cluster {cluster.name} runs; start one with `start-node`")
    source = resolve(image)
    started = time.monotonic()
    with ThreadPoolExecutor(max_workers=len(nodes)) as pool:
        list(pool.map(lambda node: load_on_node(node, source, tag=tag), nodes))
    where = ", ".join(node.name for node in nodes)
    print(f"{tag or image} is on {where} ({time.monotonic() - started:.1f} s)", file=sys.stderr, flush=True)


def resolve(image: str | Path) -> BuiltImage | Path:
    """Raises ClusterError: what is there instead."""
    if (found := built.newest(str(image))) is not None:
        return found
    if Path(image).is_file():
        return Path(image).resolve()
    there = ", ".join(sorted({i.reference for i in built.all_records()})) or "none"
    raise ClusterError(
        f"no image {str(image)!r} was built here (built: {there}) and it is no file; run `make images`, or name an "
        "OCI or docker archive (docker save -o FILE)"
    )


def load_on_node(node: Node, image: BuiltImage | Path, *, tag: str = "") -> None:
    """The same for one node, as one that came later. An image that is there already costs nothing.

    Raises:
        ClusterError: the archive is none.
        devcluster.node.CommandFailed
    """
    match image:
        case BuiltImage():
            if _has(node, image):
                names: tuple[str, ...] = (image.reference,)
            else:
                names = _link(node, image)
        case Path():
            try:
                names = archive.references(image)
            except ValueError as e:
                raise ClusterError(str(e)) from e
            node.ctr("images", "import", "--local", "--label", PINNED, image)
    if tag:
        node.ctr("images", "tag", "--force", names[0], tag)
        node.ctr("images", "label", tag, PINNED)


def _has(node: Node, image: BuiltImage) -> bool:
    lines = node.ctr("images", "list", f"name=={image.reference}").stdout.splitlines()[1:]
    return any(line.split()[2:3] == [image.digest] and PINNED in line for line in lines)


def _link(node: Node, image: BuiltImage) -> tuple[str, ...]:
    chain = chain_ids([layer.diff_id for layer in image.layers])
    there = {line.split()[0] for line in node.ctr("snapshots", "list").stdout.splitlines()[1:]}
    parent = ""
    for layer, snapshot in zip(image.layers, chain, strict=True):
        if snapshot not in there:
            _fill(node, Path(layer.folder), snapshot, parent, there)
        parent = snapshot
    node.ctr("images", "import", "--local", "--label", PINNED, image.archive)
    for snapshot in chain:  # from here on the image keeps them, and they go with it
        node.ctr("snapshots", "label", snapshot, f"{ROOTED}=")
    return (image.reference,)


def _fill(node: Node, source: Path, snapshot: str, parent: str, there: set[str]) -> None:
    """A committed snapshot of hard links to `source`."""
    active = f"fill-{snapshot}"
    if active in there:  # of a load that was cut
        node.ctr("snapshots", "remove", active)
    node.ctr("snapshots", "prepare", active, *([parent] if parent else []))
    mount = node.ctr("snapshots", "mounts", "/", active).stdout
    folder = upper_folder(mount, node.containerd_root)
    # Overlayfs never writes to a lower folder, so that nothing in a container reaches the files behind the links.
    linked = source.stat().st_dev == folder.stat().st_dev
    how = ("--archive", "--link") if linked else ("--archive", "--reflink=auto")
    copy = [*past_mounts(source), "cp", *how, f"{source}/.", f"{folder}/"]
    copied = subprocess.run(copy, capture_output=True, text=True, check=False)
    if copied.returncode:
        raise CommandFailed(f"can't fill {folder} from {source}: {copied.stderr.strip()[:500]}")
    node.ctr("snapshots", "commit", snapshot, active)


def past_mounts(source: Path) -> tuple[str, ...]:
    """What a command is to be started by so that it sees `source` on the file system it is stored on.

    buildah, used by hand, leaves a bind mount over its storage, and links do not cross mounts.
    """
    points = {line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()}
    hiding = [str(place) for place in source.parents if place.is_relative_to(built.folder()) and str(place) in points]
    if not hiding:
        return ()
    script = 'umount "$1" && shift && exec "$@"'
    return ("unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", hiding[0])


def upper_folder(mount: str, containerd_root: Path) -> Path:
    """Where an active snapshot's own files are, as this machine sees it.

    Args:
        mount: as `ctr snapshots mounts` prints it: a bind mount for the lowest layer, else an overlay.

    Raises:
        CommandFailed: it holds no such folder.
    """
    words = mount.replace(",", " ").split()
    named = [w.removeprefix("upperdir=") for w in words if w.startswith("upperdir=")] or [
        w for w in words if w.endswith("/fs")
    ]
    inside = Path("/var/lib/containerd")
    if not named or not Path(named[0]).is_relative_to(inside):
        raise CommandFailed(f"found no folder below {inside} in the snapshot's mount {mount.strip()!r}")
    return containerd_root / Path(named[0]).relative_to(inside)


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """Names of the snapshots of layers on top of each other, lowest first (OCI image specification, "ChainID")."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(f"sha256:{hashlib.sha256(f'{chain[-1]} {diff_id}'.encode()).hexdigest()}" if chain else diff_id)
    return chain
