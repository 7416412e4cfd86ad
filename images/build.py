"""`python -m images.build operator trainer`: the images, from their Containerfiles, without a Docker daemon.

Debian's buildah carries the Containerfiles out. What it has done before with the same inputs it takes from its storage:
a change of the project's own sources costs seconds, dependencies are installed anew only when their pins change.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from devcluster import packages
from devcluster.lock import locked

from . import base, built
from .buildah import Buildah
from .built import BuiltImage
from .context import REPOSITORY, stage
from .installer import installer
from .isolation import BuildFailed, say

IMAGES = {"operator": "localhost/starcoder-operator:dev", "trainer": "localhost/starcoder-trainer:dev"}
"""Image to its reference on the dev cluster's nodes."""

PACKAGES = ("buildah", "ca-certificates", "debian-archive-keyring", "mmdebstrap", "util-linux")
ROOM = {"operator": 3, "trainer": 20}
"""GB that must be free: the image, its layer once more while it is packed, and what the installers download."""

__all__ = ["IMAGES", "BuildFailed", "BuiltImage", "build", "push"]


def build(*names: str) -> dict[str, BuiltImage]:
    """The images called that (all of `IMAGES` when none is), built where their inputs have changed.

    Raises:
        BuildFailed: the message says what to do.
        devcluster.packages.PackagesMissing: Debian's buildah or mmdebstrap can't be installed here.
    """
    names = names or tuple(IMAGES)
    if unknown := sorted(set(names) - set(IMAGES)):
        raise BuildFailed(f"no image is called {', '.join(unknown)}; there are {', '.join(IMAGES)}")
    if sys.platform != "linux" or os.geteuid() != 0:
        raise BuildFailed(
            f"building without a Docker daemon needs root on Linux; found {sys.platform}, uid {os.geteuid()}: run it "
            "with sudo, or `docker build -f images/NAME/Containerfile .`"
        )
    folder = built.folder()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", "build of images"):
        buildah = Buildah(folder / "storage", folder / "tmp")
        found: dict[str, BuiltImage] = {}
        fresh = False
        for name in names:
            context = folder / "context" / name
            shutil.rmtree(context, ignore_errors=True)
            context.mkdir(parents=True)
            key = _key(name, context)
            image = built.find(name, key)
            if image is None:
                if not fresh:
                    packages.ensure(*PACKAGES)
                    buildah.clear_up()
                    fresh = True
                image = _build(name, key, context, buildah)
            found[name] = image
            shutil.rmtree(context)
        if fresh:
            buildah.keep(tag for image in built.prune() for tag in image.tags)
            buildah.clear_up()
        return found


def push(image: BuiltImage, destination: str) -> None:
    """Sends the image with all its layers to a registry or an archive. Raises BuildFailed."""
    folder = built.folder()
    with locked(folder / "lock", "build of images"):
        say(f"{image.name}: pushing {image.size / 1e6:,.0f} MB to {destination}")
        Buildah(folder / "storage", folder / "tmp").push(image.tags[0], destination, log=folder / "log" / "push.log")


def _key(name: str, context: Path) -> str:
    """Hash of everything the image is made from, which is in `context` afterwards."""
    containerfile = REPOSITORY / "images" / name / "Containerfile"
    staged = stage(containerfile.with_name("Containerfile.dockerignore"), context)
    return hashlib.sha256("\n".join([staged, containerfile.read_text(), base.tag()]).encode()).hexdigest()


def _build(name: str, key: str, context: Path, buildah: Buildah) -> BuiltImage:
    started = time.monotonic()
    folder = built.folder()
    free = shutil.disk_usage(folder).free / 1e9
    containerfile = REPOSITORY / "images" / name / "Containerfile"
    tags = (f"localhost/starcoder-{name}:{key[:16]}", f"localhost/starcoder-{name}-project:{key[:16]}", base.tag())
    if free < ROOM[name]:
        raise BuildFailed(
            f"{folder} has {free:.0f} GB free; the {name} image needs up to {ROOM[name]} GB: make room, or set "
            "STARCODER_CACHE to a folder on a larger disk"
        )
    say(f"{name}: building{'; the first time installs 6 GB and takes about 5 minutes' if name == 'trainer' else ''}")
    log = folder / "log" / f"{name}.log"
    log.unlink(missing_ok=True)
    base.ensure(buildah, folder / "log" / "base.log")
    settings = installer(folder.parent)
    # The stage that isn't shipped keeps a tag too: its steps are then found again next time.
    for tag, target in ((tags[1], "project"), (tags[0], "")):
        buildah.build(
            containerfile, context, tag, log=log, what=name, target=target, base=base.tag(), installer=settings
        )
    image = built.record(
        name, IMAGES[name], key, config=buildah.config(tags[0]), layers=buildah.layers(tags[0]), tags=tags
    )
    say(
        f"{name}: {image.reference} built in {time.monotonic() - started:.0f} s; {image.size / 1e6:,.0f} MB in "
        f"{len(image.layers)} layers, {shutil.disk_usage(folder).free / 1e9:.0f} GB of disk free"
    )
    return image


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="images.build", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="IMAGE", help=f"{' or '.join(IMAGES)} (default: all)")
    parser.add_argument(
        "--to",
        metavar="DESTINATION",
        help="also push it, whole: docker://REGISTRY/NAME:TAG (after `buildah login`), or oci-archive:FILE:NAME:TAG",
    )
    arguments = parser.parse_args(argv)
    if arguments.to and len(arguments.names) != 1:
        parser.error("--to takes exactly one image")
    try:
        for image in build(*arguments.names).values():
            if arguments.to:
                push(image, arguments.to)
            print(f"{image.reference} {image.digest}")
    except (BuildFailed, FileNotFoundError, packages.PackagesMissing) as e:
        print(f"images: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("images: interrupted; what was built so far is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
