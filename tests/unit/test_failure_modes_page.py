"""docs/failure-modes.md has a row for everything that can be told of a run, and none for what can't."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from starcoder_operator.domain.failure import CAUSES, Cause, Charge, Response
from starcoder_operator.domain.reasons import WARNINGS
from starcoder_trainer.contract.report import ProblemReason

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "failure-modes.md").read_text()


def rows(title: str) -> dict[str, list[str]]:
    """First cell of each row of the table below that heading, to its other cells."""
    section = PAGE.partition(f"\n## {title}")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `(\w+)` \|(.*)\|$", section, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in found}


def test_each_cause_has_its_row_in_the_order_of_precedence() -> None:
    assert list(rows("Causes")) == [str(cause) for cause in CAUSES]


@pytest.mark.parametrize("cause", list(Cause))
def test_a_cause_s_row_says_what_is_done_and_whether_the_node_is_blamed(cause: Cause) -> None:
    rule = CAUSES[cause]
    _, _, blamed, done, _ = rows("Causes")[cause]
    assert blamed == ("yes" if rule.blames_node else "no")
    assert done.startswith(rule.response)


@pytest.mark.parametrize("cause", list(Cause))
def test_a_cause_s_row_says_whether_it_is_charged(cause: Cause) -> None:
    rule = CAUSES[cause]
    charged = rows("Causes")[cause][1]
    if rule.response is Response.FAIL:
        assert charged == "at once"
    else:
        assert charged == ("yes" if rule.charge is Charge.RUN else "no")


def test_each_problem_that_an_agent_tells_has_its_row() -> None:
    assert set(rows("Problems")) == set(get_args(ProblemReason))


def test_each_other_trouble_has_its_row() -> None:
    assert set(rows("Troubles")) == WARNINGS - set(get_args(ProblemReason))
