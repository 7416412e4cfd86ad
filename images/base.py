"""The base image for machines that reach no image registry: a small Debian with Python, made of Debian's packages."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from .buildah import Buildah
from .isolation import BuildFailed, run, say

SUITE = "trixie"
PACKAGES = ("ca-certificates", "libstdc++6", "python3", "python3-venv")
"""Beyond Debian's essential ones. libstdc++6 for torch; the standard library's sources come with python3."""

LEAN = ("path-exclude=/usr/share/man/*", "path-exclude=/usr/share/doc/*", "path-include=/usr/share/doc/*/copyright")
MIRROR = "STARCODER_DEBIAN_MIRROR"
CONTAINERFILE = Path(__file__).parent / "base" / "Containerfile"


def tag() -> str:
    inputs = "\n".join([CONTAINERFILE.read_text(), SUITE, *PACKAGES, *LEAN])
    return f"localhost/starcoder-base:{hashlib.sha256(inputs.encode()).hexdigest()[:16]}"


def ensure(buildah: Buildah, log: Path) -> str:
    """Its tag, built where the storage doesn't have it.

    Raises:
        BuildFailed: also names the variable that sets another mirror.
    """
    if tag() in buildah.tags():
        return tag()
    folder = buildah.scratch / "base"
    folder.mkdir(parents=True)
    mirror = os.environ.get(MIRROR)
    say(f"base: making a Debian {SUITE} with {', '.join(PACKAGES)}")
    try:
        run(
            [
                *("mmdebstrap", "--mode=root", "--variant=essential", f"--include={','.join(PACKAGES)}"),
                '--aptopt=APT::Sandbox::User "root"',  # the cache may lie below a folder that only root enters
                *(f"--dpkgopt={option}" for option in LEAN),
                *(SUITE, folder / "base.tar"),
                *([mirror] if mirror else []),
            ],
            env=os.environ | {"TMPDIR": str(buildah.scratch)},
            log=log,
            what="base",
        )
    except BuildFailed as e:
        raise BuildFailed(f"{e}\nDebian's packages come from its default mirror; {MIRROR}=URL names another") from e
    buildah.build(CONTAINERFILE, folder, tag(), log=log, what="base")
    (folder / "base.tar").unlink()
    return tag()
