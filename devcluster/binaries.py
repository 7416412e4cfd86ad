"""The cluster's programs, built from Go modules at pinned versions and kept in the cache.

Each module's outputs lie in `bin/<hash of all that goes in>/`, so a checkout with the same sources builds nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .lock import locked
from .paths import cache

KUBERNETES = "v1.37.2"
CONTAINERD = "2.4.2"
GO = (1, 26)
"""Oldest Go that compiles the modules."""

STRIP = "-s -w"


def _kubernetes_version() -> str:
    """Linker flags that give Kubernetes' programs and helm their version; without them kubectl reports v0.0.0."""
    major, minor, _ = KUBERNETES.removeprefix("v").split(".")
    values = {
        "gitVersion": KUBERNETES,
        "gitMajor": major,
        "gitMinor": minor,
        "gitTreeState": "clean",
        "gitCommit": "0" * 40,
        "buildDate": "2026-11-01T00:00:00Z",
    }
    packages = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    return " ".join([STRIP, *(f"-X {p}.{key}={value}" for p in packages for key, value in values.items())])


@dataclass(frozen=True)
class Program:
    """One `go build`, and the names under which its output answers."""

    name: str
    package: str
    ldflags: str = STRIP
    links: tuple[str, ...] = ()


@dataclass(frozen=True)
class Module:
    """A go.mod with what is built from it."""

    folder: Path
    programs: tuple[Program, ...]
    tags: str = ""

    def digest(self) -> str:
        """Hash of go.mod, go.sum, every source and every flag."""
        seen = hashlib.sha256(repr((self.programs, self.tags, ENVIRONMENT)).encode())
        for path in sorted(p for p in self.folder.rglob("*") if p.suffix in (".go", ".mod", ".sum")):
            seen.update(f"\0{path.relative_to(self.folder)}\0".encode() + path.read_bytes())
        return seen.hexdigest()[:16]


ENVIRONMENT = {"CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false", "GOWORK": "off"}
CONTAINERD_VERSION = f"{STRIP} -X github.com/containerd/containerd/v2/version.Version={CONTAINERD}"
HERE = Path(__file__).parent

CLUSTER = Module(
    HERE / "build",
    (
        Program(
            "kube",
            "./kube",
            _kubernetes_version(),
            (
                "etcd",
                "kube-apiserver",
                "kube-controller-manager",
                "kube-scheduler",
                "kubelet",
                "kube-proxy",
                "kubectl",
            ),
        ),
        Program("containerd", "./containerd", CONTAINERD_VERSION, ("ctr",)),
        Program("containerd-shim-runc-v2", "./shim", CONTAINERD_VERSION),
        Program("coredns", "./coredns"),
        Program("gpuplugin", "./gpuplugin"),
        Program("helm", "helm.sh/helm/v4/cmd/helm", _kubernetes_version()),
    ),
    tags="no_btrfs,no_zfs,no_devmapper",
)
S3 = Module(HERE / "build-versitygw", (Program("versitygw", "github.com/versity/versitygw/cmd/versitygw"),))
MODULES = (CLUSTER, S3)


class BuildFailed(RuntimeError):
    """Go is missing or too old, or a build failed; the message says which and what to do."""


def path(name: str) -> Path:
    """The built program `name` (kubectl, helm, etcd, versitygw, ...), building its module first when need be.

    Raises BuildFailed; KeyError where no module has such a program.
    """
    for module in MODULES:
        if any(name in (p.name, *p.links) for p in module.programs):
            return folder(module) / name
    raise KeyError(f"{name} is none of {', '.join(n for m in MODULES for p in m.programs for n in (p.name, *p.links))}")


def build() -> None:
    """Builds what is not built yet. Raises BuildFailed."""
    for module in MODULES:
        folder(module)


def folder(module: Module) -> Path:
    """The folder of a module's programs, all there."""
    base = cache() / "bin"
    done = base / module.digest()
    if done.is_dir():
        return done
    base.mkdir(parents=True, exist_ok=True)
    with locked(base / f"{done.name}.lock", f"build of {module.folder.name}"):
        if not done.is_dir():
            partial = base / f"{done.name}.partial"  # kept when a build is cut: what it finished is not linked again
            partial.mkdir(exist_ok=True)
            _build(module, partial)
            partial.rename(done)
    return done


def _build(module: Module, target: Path) -> None:
    go = _go()
    _say(f"building {', '.join(p.name for p in module.programs)} (the first time: 8 to 16 minutes on 2 cores)")
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "GOCACHE": str(cache() / "go-build"),
        "GOMODCACHE": str(cache() / "go-mod"),
    }
    for number, program in enumerate(module.programs, 1):
        output = target / program.name
        if not output.exists():
            began = time.monotonic()
            _say(f"[{number}/{len(module.programs)}] {program.name} …")
            temporary = target / f"{program.name}.tmp"
            argv = [go, "build", "-trimpath", "-ldflags", program.ldflags, "-o", str(temporary)]
            argv += ["-tags", module.tags] if module.tags else []
            done = subprocess.run([*argv, program.package], cwd=module.folder, env=environment, check=False)
            if done.returncode:
                raise BuildFailed(
                    f"`go build {program.package}` in {module.folder} failed with exit code {done.returncode}; Go's "
                    "words are above. Modules come from the proxy that `go env GOPROXY` names: is it reachable?"
                )
            temporary.rename(output)
            _say(f"[{number}/{len(module.programs)}] {program.name}: {time.monotonic() - began:.0f} s")
        for link in program.links:
            (target / link).unlink(missing_ok=True)
            (target / link).symlink_to(program.name)


def _go() -> str:
    """Path of a Go that is new enough. Raises BuildFailed."""
    wanted = ".".join(map(str, GO))
    remedy = f"install Go >= {wanted} from your distribution or from the Go project's download page, and put it on PATH"
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin:/usr/lib/go/bin")
    if go is None:
        raise BuildFailed(f"found no `go` on PATH or in /usr/local/go/bin; {remedy}")
    # In the module's folder `go` would fetch the toolchain that go.mod names; here the installed one answers.
    said = subprocess.run([go, "version"], capture_output=True, text=True, check=True, cwd="/").stdout
    found = go_version(said)
    if found is None or found < GO:
        raise BuildFailed(f"found {said.strip()} at {go}; expected Go >= {wanted}; {remedy}")
    return go


def go_version(said: str) -> tuple[int, int] | None:
    """Major and minor of what `go version` said; None for a development build."""
    match = re.search(r"\bgo(\d+)\.(\d+)", said)
    return (int(match[1]), int(match[2])) if match else None


def _say(text: str) -> None:
    print(f"binaries: {text}", file=sys.stderr, flush=True)
