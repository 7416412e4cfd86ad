"""Debian packages that the dev cluster and the image builder need: found, installed when root, or named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

CLUSTER = (
    "busybox-static",
    "catatonit",
    "containernetworking-plugins",
    "iproute2",
    "nftables",
    "openssl",
    "runc",
    "util-linux",
)


class PackagesMissing(RuntimeError):
    """Packages are not there and can't be installed here; the message says how to get them."""


def missing(*packages: str) -> tuple[str, ...]:
    """Those of `packages` that dpkg doesn't have, in order. Without dpkg: all."""
    if shutil.which("dpkg-query") is None:
        return packages
    found = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", *packages],
        capture_output=True,
        text=True,
        check=False,  # 1 where one of them is unknown; the others are listed all the same
    )
    installed = {line.split()[0] for line in found.stdout.splitlines() if line.endswith(" installed")}
    return tuple(p for p in packages if p not in installed)


def ensure(*packages: str) -> None:
    """Returns once every package is there. Raises PackagesMissing: which, and what to type."""
    wanted = missing(*packages)
    if not wanted:
        return
    command = f"apt-get install {' '.join(wanted)}"
    if shutil.which("apt-get") is None:
        raise PackagesMissing(
            f"found no apt-get; expected the programs of the Debian packages {', '.join(wanted)}; "
            "run this on Debian >= 12 or Ubuntu >= 24.04 (a container with --privileged will do)"
        )
    if os.geteuid() != 0:
        raise PackagesMissing(f"not installed: {', '.join(wanted)}; run as root, or first: sudo {command}")
    print(f"packages: installing {', '.join(wanted)}", file=sys.stderr, flush=True)
    _apt("update", "-qq")
    _apt("install", "-qq", "--no-install-recommends", *wanted)
    if still := missing(*wanted):
        raise PackagesMissing(f"`{command}` succeeded, yet dpkg doesn't list {', '.join(still)} as installed")


def _apt(*arguments: str) -> None:
    done = subprocess.run(
        ["apt-get", "-y", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        check=False,
    )
    if done.returncode:
        command = " ".join(["apt-get", *arguments])
        raise PackagesMissing(f"`{command}` failed with exit code {done.returncode}:\n{done.stdout.rstrip()}")
