"""The table of mechanisms is about the code and the tests as they are."""

import ast
from pathlib import Path

import pytest

from tests.mutation.mechanisms import MECHANISMS, Mechanism

ROOT = Path(__file__).parents[2]
ABOUT_FAILURES = ("tests/e2e/test_failover.py", "tests/e2e/test_failures.py", "tests/e2e/test_leaving.py")


def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {f"{file}::{f.name}" for f in tree.body if isinstance(f, ast.FunctionDef) and f.name.startswith("test_")}


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.name)
def test_what_is_switched_off_is_there_once_and_leaves_code_that_can_be_read(mechanism: Mechanism) -> None:
    changed = mechanism.switched_off((ROOT / mechanism.file).read_text())
    if mechanism.file.endswith(".py"):
        compile(changed, mechanism.file, "exec")


def test_every_end_to_end_test_of_failures_is_in_the_table() -> None:
    known = set[str]().union(*(names_in(file) for file in ABOUT_FAILURES))
    assert {test for m in MECHANISMS for test in m.tests} == known
