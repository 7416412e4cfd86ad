"""Binaries: built once for the same sources, resumed after a cut, and a missing or old Go is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from devcluster import binaries
from devcluster.binaries import BuildFailed, Module, Program

FAKE_GO = """#!/bin/sh
[ "$1" = version ] && { echo "go version go%(version)s linux/amd64"; exit 0; }
echo "$CGO_ENABLED $GOFLAGS $GOCACHE $GOMODCACHE" >> "%(log)s"
echo "$@" >> "%(log)s"
case "$*" in *./broken*) exit 1;; esac
while [ "$1" != -o ]; do shift; done
echo built > "$2"
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of two programs, whose builds a script records in `go.log`."""
    monkeypatch.setenv("STARCODER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "source" / "a").mkdir(parents=True)
    (tmp_path / "source" / "go.mod").write_text("module a")
    (tmp_path / "source" / "a" / "main.go").write_text("package main")
    install_go(tmp_path, monkeypatch)
    return Module(tmp_path / "source", (Program("a", "./a", links=("alias",)), Program("b", "./b")), tags="x,y")


def install_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str = "1.26.0") -> None:
    folder = tmp_path / "path"
    folder.mkdir(exist_ok=True)
    (folder / "go").write_text(FAKE_GO % {"version": version, "log": tmp_path / "go.log"})
    (folder / "go").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")


def builds(tmp_path: Path) -> list[str]:
    log = tmp_path / "go.log"
    return [line for line in log.read_text().splitlines() if line.startswith("build")] if log.exists() else []


def test_each_program_is_built_once_with_caches_of_our_own(module, tmp_path):
    folder = binaries.folder(module)
    assert binaries.folder(module) == folder
    assert [line.split()[-1] for line in builds(tmp_path)] == ["./a", "./b"]
    assert all("-trimpath" in line and "-tags x,y" in line for line in builds(tmp_path))
    cache = tmp_path / "cache"
    assert (tmp_path / "go.log").read_text().startswith(f"0 -buildvcs=false {cache}/go-build {cache}/go-mod\n")
    assert (folder / "alias").read_text() == "built\n"
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", ["go.mod", "go.sum", "a/main.go"])
def test_a_change_of_any_source_is_another_folder(module, name):
    before = module.digest()
    with (module.folder / name).open("a") as file:
        file.write("\n// changed")
    assert module.digest() != before


def test_a_change_of_flags_is_another_folder(module):
    changed = Module(module.folder, module.programs, tags="x")
    assert changed.digest() != module.digest()


def test_a_build_that_failed_keeps_what_it_finished(module, tmp_path):
    broken = Module(module.folder, (Program("a", "./a"), Program("b", "./broken")))
    for _ in range(2):
        with pytest.raises(BuildFailed, match=r"`go build ./broken` in .* failed with exit code 1"):
            binaries.folder(broken)
    assert [line.split()[-1] for line in builds(tmp_path)] == ["./a", "./broken", "./broken"]


def test_an_old_go_is_named(module, tmp_path, monkeypatch):
    install_go(tmp_path, monkeypatch, "1.25.9")
    with pytest.raises(BuildFailed, match=r"found go version go1\.25\.9 .*; expected Go >= 1\.26"):
        binaries.folder(module)


def test_a_missing_go_is_told_with_what_to_do(module, monkeypatch):
    monkeypatch.setattr(binaries.shutil, "which", lambda *_, **__: None)
    with pytest.raises(BuildFailed, match=r"found no `go`.*install Go >= 1\.26"):
        binaries.folder(module)


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("go version go1.26.8 linux/amd64", (1, 26)),
        ("go version go1.27rc1 linux/arm64", (1, 27)),
        ("go version devel +abc linux/amd64", None),
    ],
)
def test_the_version_is_read_from_what_go_says(said, version):
    assert binaries.go_version(said) == version


def test_every_program_has_a_module():
    names = {n for m in binaries.MODULES for p in m.programs for n in (p.name, *p.links)}
    assert names >= {"etcd", "kube-apiserver", "kubelet", "kubectl", "helm", "ctr", "coredns", "gpuplugin", "versitygw"}
    for module in binaries.MODULES:
        assert (module.folder / "go.sum").exists()
        for program in module.programs:
            if program.package.startswith("./"):
                assert (module.folder / program.package / "main.go").exists()


def test_an_unknown_program_is_refused_by_name():
    with pytest.raises(KeyError, match="kubeadm is none of kube, etcd"):
        binaries.path("kubeadm")
