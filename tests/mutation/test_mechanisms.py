"""Each end-to-end test of failures fails where the mechanism that it is about is switched off.

A row takes minutes: a copy of the tree is changed, its images are built, and the row's tests run on a dev cluster.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutation.mechanisms import MECHANISMS, Mechanism

ROOT = Path(__file__).parents[2]
IMPATIENCE = "0.3"
"""Of the usual time until a condition is given up: here it is not met in the end, and the machine does nothing else."""


def copied(target: Path) -> Path:
    """The files that git knows, as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        source = ROOT / name
        if source.exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(source.read_bytes())
            (target / name).chmod(source.stat().st_mode)
    return target


def why(said: str) -> str:
    """The first line of the first assertion that failed."""
    found = re.search(r"^E +(.*)$", said, re.MULTILINE)
    return found[1] if found else said[-500:]


@pytest.mark.e2e
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.name)
def test_without_it_its_tests_fail(mechanism: Mechanism, tmp_path: Path) -> None:
    tree = copied(tmp_path / "tree")
    path = tree / mechanism.file
    path.write_text(mechanism.switched_off(path.read_text()))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(tree / part) for part in ("operator", "trainer")),
        "PATIENCE_SHARE": IMPATIENCE,
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *mechanism.tests]
    done = subprocess.run(command, cwd=tree, env=environment, check=False, capture_output=True, text=True)
    print(f"{mechanism.name}: {why(done.stdout)}")
    # What fails before or after a test itself is told as ERROR.
    passed = [test for test in mechanism.tests if f"FAILED {test}" not in done.stdout]
    assert not passed, f"{mechanism.name} is switched off, and still: {passed}\n{done.stdout[-4000:]}{done.stderr}"
