"""What the demo tells of a run, from the statuses that it saw."""

from __future__ import annotations

from typing import Any

from examples.demo.follow import Story, summary


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def status(state: str, attempt: int, iteration: int, checkpoint: int = 0, **more: Any) -> dict[str, Any]:
    found = {"state": state, "attempt": attempt, "iteration": iteration, "iterations": 240, "loss": f"{iteration}.0"}
    verified = {"iteration": checkpoint, "committedAt": "2026-01-01T00:00:00Z", "uri": "s3://b/x"}
    return found | ({"checkpoint": verified} if checkpoint else {}) | more


def test_time_lost_runs_from_the_death_of_the_node_to_the_first_status_of_a_later_attempt_that_trains() -> None:
    clock = Clock()
    story = Story(clock)
    story.saw(status("Running", 1, 130, 120))
    story.fault()
    for state, attempt, after in [("Running", 1, 2.0), ("Recovering", 2, 5.0), ("Running", 2, 9.5), ("Running", 2, 30)]:
        clock.now = 100.0 + after
        story.saw(status(state, attempt, 130, 120))
    assert story.resumed_after == 9.5
    assert story.resumed_from == 120


def test_the_summary_counts_iterations_done_twice_and_names_the_causes() -> None:
    story = Story(Clock())
    story.saw(status("Running", 1, 5))
    story.saw(status("Running", 1, 130, 120))
    story.fault()
    story.saw(status("Running", 2, 125, 120))
    restarts = {"total": 1, "byCause": {"AgentUnresponsive": 1}}
    story.saw(status("Succeeded", 2, 240, 240, restarts=restarts, consumedTokens=491520))
    lines = "\n".join(summary(story, "n2", 61.0))
    assert "5.0 (iteration 5) -> 240.0 (iteration 240)" in lines
    assert "491,520" in lines
    assert "1 (AgentUnresponsive 1)" in lines
    assert "node n2 to training again, 10 iterations done twice" in lines
    assert "iteration 240, verified 2026-01-01T00:00:00Z, s3://b/x" in lines


def test_a_run_that_met_no_fault_tells_of_no_time_lost() -> None:
    story = Story(Clock())
    story.saw(status("Succeeded", 1, 240, 240))
    assert not [line for line in summary(story, "", 10.0) if line.startswith("lost")]


def test_a_run_is_over_when_it_succeeded_or_failed() -> None:
    story = Story(Clock())
    for state, over in [("Running", False), ("Recovering", False), ("Failed", True), ("Succeeded", True)]:
        story.saw(status(state, 1, 1))
        assert story.over is over
