"""Packages: what dpkg has is left alone, what it lacks is installed or named."""

from __future__ import annotations

import subprocess

import pytest

from devcluster import packages


@pytest.fixture
def dpkg(monkeypatch):
    """Answers of dpkg and apt-get; `ran` lists what was run, `installs` says whether apt-get installs."""

    class Dpkg:
        installed: frozenset[str] = frozenset({"openssl"})
        on_path: frozenset[str] = frozenset({"dpkg-query", "apt-get"})
        installs = True
        fails = ""

        def __init__(self) -> None:
            self.ran: list[str] = []

        def run(self, argv, **_):
            if argv[0] == "dpkg-query":
                return subprocess.CompletedProcess(argv, 1, "".join(f"{p} installed\n" for p in sorted(self.installed)))
            self.ran.append(" ".join(argv))
            if self.fails:
                return subprocess.CompletedProcess(argv, 100, self.fails)
            if "install" in argv and self.installs:
                self.installed = self.installed | {a for a in argv if not a.startswith("-")}
            return subprocess.CompletedProcess(argv, 0, "")

    found = Dpkg()
    monkeypatch.setattr(packages.subprocess, "run", found.run)
    monkeypatch.setattr(packages.shutil, "which", lambda name: name if name in found.on_path else None)
    monkeypatch.setattr(packages.os, "geteuid", lambda: 0)
    return found


def test_nothing_is_run_when_all_is_there(dpkg):
    packages.ensure("openssl")
    assert dpkg.ran == []


def test_root_installs_what_is_missing_and_only_that(dpkg):
    packages.ensure("openssl", "runc")
    assert dpkg.ran == ["apt-get -y update -qq", "apt-get -y install -qq --no-install-recommends runc"]


def test_without_root_the_command_is_named(dpkg, monkeypatch):
    monkeypatch.setattr(packages.os, "geteuid", lambda: 1000)
    with pytest.raises(packages.PackagesMissing, match="sudo apt-get install runc nftables"):
        packages.ensure("runc", "openssl", "nftables")
    assert dpkg.ran == []


def test_off_debian_the_packages_are_named(dpkg):
    dpkg.on_path = frozenset()
    with pytest.raises(packages.PackagesMissing, match="no apt-get; expected the programs of the Debian packages runc"):
        packages.ensure("runc")


def test_what_apt_said_is_told_when_it_fails(dpkg):
    dpkg.fails = "E: no network"
    with pytest.raises(packages.PackagesMissing, match="exit code 100:\nE: no network"):
        packages.ensure("runc")


def test_an_installation_that_installs_nothing_is_noticed(dpkg):
    dpkg.installs = False
    with pytest.raises(packages.PackagesMissing, match="dpkg doesn't list runc as installed"):
        packages.ensure("runc")
