"""buildah on a storage of its own below the cache, and what it left there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .installer import Installer
from .isolation import BuildFailed, capture, run


@dataclass(frozen=True)
class StoredLayer:
    diff_id: str
    """`sha256:…` of the layer's tar."""
    folder: Path
    """What the layer changes, in overlayfs' own form."""
    size: int
    """Bytes of the layer's tar."""


@dataclass(frozen=True)
class Buildah:
    """One user at a time: whoever holds the lock of the images' folder."""

    storage: Path
    scratch: Path
    """For temporary files; a layer passes through here as a tar."""

    def build(
        self,
        containerfile: Path,
        context: Path,
        tag: str,
        *,
        log: Path,
        what: str,
        target: str = "",
        base: str = "",
        installer: Installer | None = None,
    ) -> None:
        """Tags the result. Steps that were built before with the same inputs are taken from the storage.

        Raises:
            BuildFailed
        """
        # The context is what the ignore file admitted. Without another one named, buildah would look for it again.
        nothing_ignored = self.scratch / "ignore"
        nothing_ignored.touch()
        options: list[str | Path] = ["--isolation", "chroot", "--network", "host", "--layers", "--pull-never"]
        options += ["--ignorefile", nothing_ignored, "--file", containerfile, "--tag", tag]
        if target:
            options += ["--target", target]
        if base:
            options += ["--build-arg", f"BASE={base}"]
        secret = self.scratch / "installer-env"
        if installer is not None:
            secret.touch(mode=0o600)
            secret.write_text(installer.secret())
            options += ["--secret", f"id=installer-env,src={secret}"]
            for here, inside, mode in installer.mounts:
                options += ["--volume", f"{here}:{inside}:{mode}"]
        try:
            run(self._argv("build", *options, context), env=self._env(), log=log, what=what, steps="STEP ")
        finally:
            secret.unlink(missing_ok=True)

    def push(self, tag: str, destination: str, *, log: Path) -> None:
        """To `docker://REGISTRY/NAME:TAG`, or any other transport of containers-transports(5). Raises BuildFailed."""
        run(self._argv("push", tag, destination), env=self._env(), log=log, what=f"push to {destination}")

    def config(self, tag: str) -> dict[str, Any]:
        """The OCI image configuration. Raises BuildFailed."""
        inspected = json.loads(capture(self._argv("inspect", "--type", "image", tag), env=self._env()))
        config: dict[str, Any] = inspected["OCIv1"]
        return config

    def layers(self, tag: str) -> tuple[StoredLayer, ...]:
        """Lowest first. Raises BuildFailed where the storage isn't laid out as expected."""
        try:
            images = json.loads((self.storage / "overlay-images" / "images.json").read_text())
            stored = {e["id"]: e for e in json.loads((self.storage / "overlay-layers" / "layers.json").read_text())}
            at: str | None = next(i["layer"] for i in images if tag in i.get("names", ()))
            found: list[StoredLayer] = []
            while at:
                entry = stored[at]
                folder = self.storage / "overlay" / at / "diff"
                if not folder.is_dir():
                    raise KeyError(str(folder))
                found.append(StoredLayer(entry["diff-digest"], folder, entry["diff-size"]))
                at = entry.get("parent")
        except (OSError, KeyError, StopIteration) as e:
            raise BuildFailed(
                f"{tag} is not in {self.storage} as this buildah's overlay storage should have it ({e!r}); "
                "delete that folder and build again"
            ) from e
        return tuple(reversed(found))

    def tags(self) -> frozenset[str]:
        try:
            images = json.loads((self.storage / "overlay-images" / "images.json").read_text())
        except FileNotFoundError:
            return frozenset()
        return frozenset(name for image in images for name in image.get("names", ()))

    def clear_up(self) -> None:
        """Removes what a build that was killed has left. Raises BuildFailed."""
        for folder in self.scratch.glob("*"):
            shutil.rmtree(folder) if folder.is_dir() and not folder.is_symlink() else folder.unlink()
        if (self.storage / "overlay-containers" / "containers.json").exists():
            capture(self._argv("rm", "--all"), env=self._env())

    def keep(self, tags: Iterable[str]) -> None:
        """Removes every other tag, and the layers that no tag leads to. Raises BuildFailed."""
        if dead := sorted(self.tags() - frozenset(tags)):
            capture(self._argv("rmi", *dead), env=self._env())
        capture(self._argv("rmi", "--prune"), env=self._env())

    def _argv(self, *arguments: str | Path) -> Sequence[str | Path]:
        # A new run folder each time: it counts mounts, and those die with the process.
        runroot = self.scratch / f"run-{os.urandom(4).hex()}"
        return ("buildah", "--root", self.storage, "--runroot", runroot, "--storage-driver", "overlay", *arguments)

    def _env(self) -> Mapping[str, str]:
        self.scratch.mkdir(parents=True, exist_ok=True)
        kept = ("HOME", "LANG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "http_proxy", "https_proxy", "no_proxy")
        return {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "TMPDIR": str(self.scratch),
            **{name: os.environ[name] for name in kept if name in os.environ},
        }
