"""Which files are taken, in which order, and why others are not."""

import os

import pytest

from starcoder_trainer.data.source_files import Selection, Skipped, SourceFile, find_files, read_text


@pytest.fixture
def root(tmp_path):
    for name in ("a.py", "lib/b.py", "lib/c.txt", "lib/deep/d.py", ".git/e.py", "lib/__pycache__/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    return tmp_path


def paths(root, *args, seed=1, **kwargs):
    return [f.path for f in find_files(root, Selection(*args), seed, **kwargs)[0]]


def test_everything_but_what_tools_keep_is_taken(root):
    assert sorted(paths(root)) == ["a.py", "lib/b.py", "lib/c.txt", "lib/deep/d.py"]


def test_patterns_match_names_and_paths_and_exclusion_is_stronger(root):
    assert sorted(paths(root, ("*.py",))) == ["a.py", "lib/b.py", "lib/deep/d.py"]
    assert sorted(paths(root, ("lib/*",))) == ["lib/b.py", "lib/c.txt", "lib/deep/d.py"]
    assert sorted(paths(root, ("*.py", "*.txt"), ("lib/deep/*", "a.*"))) == ["lib/b.py", "lib/c.txt"]


def test_the_output_below_the_input_is_left_out(root):
    assert sorted(paths(root, ("*.py",), left_out=root / "lib")) == ["a.py"]


def test_the_order_depends_on_paths_and_seed_alone(root):
    names = [f"{i}.py" for i in range(20)]
    for name in names:
        (root / name).write_text("x")
    first = paths(root, ("[0-9]*",))
    assert sorted(first) == sorted(names) != first
    for name in reversed(names):
        (root / name).unlink()
        (root / name).write_text("y")
    assert paths(root, ("[0-9]*",)) == first
    assert paths(root, ("[0-9]*",), seed=2) != first


def test_what_is_skipped_is_counted_by_reason(root):
    (root / "empty.py").touch()
    (root / "large.py").write_text("x" * 1001)
    (root / "link.py").symlink_to(root / "a.py")
    (root / "broken.py").symlink_to(root / "nowhere")
    os.mkfifo(root / "pipe.py")
    (root / os.fsdecode(b"\xff.py")).touch()
    found, skipped = find_files(root, Selection(("*.py",), (), 1000), 1)
    assert sorted(f.path for f in found) == ["a.py", "lib/b.py", "lib/deep/d.py"]
    assert skipped == {Skipped.EMPTY: 1, Skipped.LARGE: 1, Skipped.LINK: 3, Skipped.NAME: 1}


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"x = 1\r\n", "x = 1\r\n"),
        ("größer 🙂".encode(), "größer 🙂"),
        (b"caf\xe9", Skipped.NOT_UTF8),
        (b"\x7fELF\0\0", Skipped.BINARY),
        (b"", Skipped.EMPTY),
    ],
)
def test_text_is_read_as_it_stands_and_what_is_none_is_named(tmp_path, data, found):
    (tmp_path / "f").write_bytes(data)
    assert read_text(tmp_path, SourceFile("f", 1)) == found


def test_a_file_that_went_away_is_unreadable(tmp_path):
    assert read_text(tmp_path, SourceFile("gone", 1)) == Skipped.UNREADABLE
