"""What an image is made from, and when it counts as changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from images.context import REPOSITORY, STAMP, stage


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    (root / "package" / "__pycache__").mkdir(parents=True)
    (root / "package" / "module.py").write_text("x = 1\n")
    (root / "package" / "__pycache__" / "module.cpython-313.pyc").write_bytes(b"code")
    (root / "README.md").write_text("readme\n")
    (root / "secret.key").write_text("not for an image\n")
    (root / "ignore").write_text("# comment\n*\n!README.md\n!package\n**/__pycache__\n")
    return root


def staged(repository: Path, into: Path) -> str:
    into.mkdir()
    return stage(repository / "ignore", into, repository=repository)


def test_only_what_the_ignore_file_admits_is_copied_and_no_byte_code(repository: Path, tmp_path: Path) -> None:
    staged(repository, tmp_path / "a")
    files = {str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert files == {"README.md", "package/module.py"}


def test_neither_time_nor_byte_code_nor_umask_make_a_change(repository: Path, tmp_path: Path) -> None:
    before = staged(repository, tmp_path / "a")
    module = repository / "package" / "module.py"
    os.utime(module, (1, 1))
    module.chmod(0o600)
    (repository / "package" / "__pycache__" / "other.pyc").write_bytes(b"more")
    (repository / "secret.key").write_text("changed\n")
    assert staged(repository, tmp_path / "b") == before
    copy = tmp_path / "b" / "package" / "module.py"
    assert copy.stat().st_mtime == STAMP
    assert copy.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("how", ["content", "name", "executable"])
def test_content_name_and_executable_bit_make_a_change(repository: Path, tmp_path: Path, how: str) -> None:
    before = staged(repository, tmp_path / "a")
    module = repository / "package" / "module.py"
    match how:
        case "content":
            module.write_text("x = 2\n")
        case "name":
            module.rename(module.with_name("renamed.py"))
        case "executable":
            module.chmod(0o755)
    assert staged(repository, tmp_path / "b") != before


def test_an_admitted_path_that_is_missing_is_named(repository: Path, tmp_path: Path) -> None:
    (repository / "README.md").unlink()
    with pytest.raises(FileNotFoundError, match=r"README\.md"):
        staged(repository, tmp_path / "a")


@pytest.mark.parametrize("name", ["operator", "trainer"])
def test_the_ignore_file_admits_what_the_containerfile_copies_and_no_more(name: str) -> None:
    folder = REPOSITORY / "images" / name
    lines = (folder / "Containerfile").read_text().splitlines()
    copied = [
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    ]
    ignored = (folder / "Containerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied)
