"""What the demo tells of a run, from the statuses that it saw."""

from __future__ import annotations

from typing import Any

from examples.demo.follow import Story, summary


def status(state: str, attempt: int, iteration: int, checkpoint: int = 0, **more: Any) -> dict[str, Any]:
    found = {"state": state, "attempt": attempt, "iteration": iteration, "iterations": 240, "loss": f"{iteration}.0"}
    verified = {"iteration": checkpoint, "committedAt": "2026-01-01T00:00:00Z", "uri": "s3://b/x"}
    return found | ({"checkpoint": verified} if checkpoint else {}) | more


def record(attempt: int, **more: Any) -> dict[str, Any]:
    return {"cause": "AgentUnresponsive", "toAttempt": attempt, "resumedAt": 120, "iterationsLost": 10} | more


def test_time_lost_is_what_the_operator_recorded_of_the_first_recovery_after_the_death_of_the_node() -> None:
    story = Story()
    story.saw(status("Running", 2, 130, 120, recoveries=[record(2, total=1.5)]))
    story.fault("n2")
    for records in ([record(2, total=1.5)], [record(2, total=1.5), record(3)]):
        story.saw(status("Recovering", 3, 130, 120, recoveries=records))
        assert not [line for line in summary(story, 10.0) if line.startswith("lost")]
    records = [record(2, total=1.5), record(3, total=9.5), record(4, total=3.0)]
    story.saw(status("Running", 4, 130, 120, recoveries=records))
    assert "9.5 s from the death of node n2" in "\n".join(summary(story, 10.0))


def test_the_summary_counts_iterations_done_again_and_names_the_causes() -> None:
    story = Story()
    story.saw(status("Running", 1, 5))
    story.saw(status("Running", 1, 130, 120))
    story.fault("n2")
    story.saw(status("Running", 2, 125, 120))
    restarts = {"total": 1, "byCause": {"AgentUnresponsive": 1}}
    recoveries = [record(2, total=7.5)]
    story.saw(status("Succeeded", 2, 240, 240, restarts=restarts, recoveries=recoveries, consumedTokens=491520))
    lines = "\n".join(summary(story, 61.0))
    assert "5.0 (iteration 5) -> 240.0 (iteration 240)" in lines
    assert "491,520" in lines
    assert "1 (AgentUnresponsive 1)" in lines
    assert "7.5 s from the death of node n2 to training again; iterations done again: 10" in lines
    assert "iteration 240, verified 2026-01-01T00:00:00Z, s3://b/x" in lines


def test_a_run_that_met_no_fault_tells_of_no_time_lost() -> None:
    story = Story()
    story.saw(status("Succeeded", 1, 240, 240))
    assert not [line for line in summary(story, 10.0) if line.startswith("lost")]


def test_a_run_is_over_when_it_succeeded_or_failed() -> None:
    story = Story()
    for state, over in [("Running", False), ("Recovering", False), ("Failed", True), ("Succeeded", True)]:
        story.saw(status(state, 1, 1))
        assert story.over is over
