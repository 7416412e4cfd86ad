"""A run without Kubernetes: what is read from file and command line, and how attempts follow each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from starcoder_trainer import local
from starcoder_trainer.contract.assignment import Assignment, CheckpointRef, Layout, Offer
from starcoder_trainer.contract.report import Failure, Problem, Progress, Report, Verified
from starcoder_trainer.local_progress import Lines, Summary

EXAMPLE = Path(__file__).parents[2] / "examples" / "local.yaml"
OFFER = Offer("127.0.0.1", 4000, CheckpointRef(1, 10, "sha256:0"))
CRASH = Failure("Crash", "killed by SIGKILL", -9, 1)


class Said:
    """A view that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.seen: list[Progress] = []

    def progress(self, now: Progress) -> None:
        self.seen.append(now)

    def say(self, text: str) -> None:
        self.lines.append(text)

    def close(self) -> None:
        return


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
def attempts(said: Said) -> local.Attempts:
    return local.Attempts("uid", "boot", Layout(1, 1, 2), 5, 2, said, Summary())


def report(attempts: local.Attempts, **changes: object) -> Report:
    return replace(Report("boot", "local", 0, "localhost", attempts.attempt, "idle"), **changes)  # type: ignore[arg-type]


def running(attempts: local.Attempts) -> None:
    attempts.assignment("hold")
    assert attempts.reported(report(attempts, offer=OFFER)) is not None


def told(assignment: Assignment | None) -> tuple[str, int] | None:
    return assignment and (assignment.phase, assignment.attempt)


def test_an_offer_is_answered_with_run_and_handed_back(attempts: local.Attempts, said: Said) -> None:
    attempts.assignment("hold")
    assert attempts.reported(report(attempts)) is None
    answer = attempts.reported(report(attempts, offer=OFFER))
    assert told(answer) == ("run", 5)
    assert answer is not None
    assert (answer.offer, answer.gpus_per_member) == (OFFER, 2)
    assert said.lines == ["attempt 5: starting at iteration 10"]


def test_a_failure_is_followed_by_the_next_attempt_until_they_are_too_many(
    attempts: local.Attempts, said: Said
) -> None:
    for attempt in (6, 7):
        running(attempts)
        assert told(attempts.reported(report(attempts, state="failed", failure=CRASH))) == ("hold", attempt)
    running(attempts)
    assert told(attempts.reported(report(attempts, state="failed", failure=CRASH))) == ("stop", 7)
    assert attempts.ending == "failed"
    assert attempts.explanation == "failed: 3 failures since the last new checkpoint"
    assert "attempt 5 failed (rank 1): Crash: killed by SIGKILL" in said.lines
    assert attempts.summary.restarts == 2


def test_a_newer_checkpoint_makes_failures_before_it_forgotten(attempts: local.Attempts) -> None:
    for step in (10, 20, 30, 40):
        running(attempts)
        verified = Verified(CheckpointRef(attempts.attempt, step, "sha256:1"), "file:///c", "now")
        attempts.reported(report(attempts, state="training", verified=verified))
        answer = attempts.reported(report(attempts, state="failed", failure=CRASH, verified=verified))
        assert answer is not None
        assert answer.phase == "hold"


def test_what_another_try_would_meet_again_ends_the_run(attempts: local.Attempts) -> None:
    running(attempts)
    failure = Failure("UserError", "ConfigurationError: no", 78, 0)
    assert told(attempts.reported(report(attempts, state="failed", failure=failure))) == ("stop", 5)
    assert attempts.ending == "failed"


def test_a_problem_that_a_person_must_mend_ends_the_run_and_is_said_once(attempts: local.Attempts, said: Said) -> None:
    attempts.assignment("hold")
    answer = attempts.reported(report(attempts, problem=Problem("DataNotFound", "nothing there")))
    assert told(answer) == ("stop", 5)
    assert attempts.reported(report(attempts, problem=Problem("DataNotFound", "nothing there"))) is None
    assert said.lines == ["DataNotFound: nothing there"]


def test_a_problem_that_may_mend_itself_is_waited_out(attempts: local.Attempts, said: Said) -> None:
    attempts.assignment("hold")
    assert attempts.reported(report(attempts, problem=Problem("StorageUnreachable", "timed out"))) is None
    assert said.lines == ["StorageUnreachable: timed out"]
    assert told(attempts.reported(report(attempts, offer=OFFER))) == ("run", 5)


def test_when_fenced_it_goes_beyond_the_attempt_that_fenced_it(attempts: local.Attempts) -> None:
    attempts.assignment("hold")
    assert told(attempts.reported(report(attempts, fenced_by=9))) == ("hold", 10)


def test_reports_of_an_older_attempt_change_nothing(attempts: local.Attempts) -> None:
    running(attempts)
    attempts.reported(report(attempts, state="failed", failure=CRASH))
    assert attempts.reported(report(attempts, attempt=5, state="failed", failure=CRASH)) is None
    assert attempts.failures == 1


def test_done_is_the_end_and_the_summary_says_what_came_of_it(attempts: local.Attempts) -> None:
    running(attempts)
    for iteration, loss in ((11, 3.0), (20, 2.0)):
        progress = Progress(iteration, iteration * 8, iteration * 512, loss, 100.0)
        attempts.reported(report(attempts, state="training", progress=progress))
    checkpoint = Verified(CheckpointRef(5, 20, "sha256:1"), "file:///c/a5/step-00000020", "now", 1234)
    assert told(attempts.reported(report(attempts, state="done", verified=checkpoint))) == ("stop", 5)
    lines = attempts.summary.lines(attempts.explanation)
    assert lines[:4] == [
        "complete",
        "  iterations  11 to 20",
        "  loss        3.0000 to 2.0000",
        "  tokens      10,240 in all",
    ]
    assert lines[-1] == "  checkpoint  iteration 20, 1,234 bytes, file:///c/a5/step-00000020"


def test_the_example_is_read_with_overrides_and_as_many_workers_as_said() -> None:
    run = local.read(EXAMPLE, ["spec.training.iterations=7", "spec.model.layers=2"], 2)
    assert (run.spec.training.iterations, run.spec.model.layers) == (7, 2)
    assert (run.spec.workers.replicas, run.spec.workers.gpus_per_worker) == (1, 2)


@pytest.mark.parametrize(
    ("overrides", "workers", "message"),
    [
        ([], 3, "3 is not divisible by parallelism tensor 2 x pipeline 1"),
        (["spec.nonsense=1"], 2, "spec.nonsense: unknown field"),
        (["spec.training.iterations"], 2, "expected path=value"),
        (["spec.model.preset.x=1"], 2, "preset is no object"),
        (["spec.training.globalBatchSize=7"], 2, "globalBatchSize"),
        (["spec.training.iterations=[1"], 2, "--set spec.training.iterations=[1: "),
    ],
)
def test_what_can_not_be_trained_is_refused_in_a_sentence(overrides: list[str], workers: int, message: str) -> None:
    with pytest.raises(local.BadInput) as refused:
        local.read(EXAMPLE, overrides, workers)
    assert message in str(refused.value)


@pytest.mark.parametrize(("text", "message"), [("- 1", "found no object"), ("a: [", "run.yaml: "), (None, "No such")])
def test_a_file_that_is_no_run_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(local.BadInput, match=message):
        local.read(path, [], 1)


def test_the_command_says_what_is_wrong_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert local.main([str(EXAMPLE), "--workers", "3"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("starcoder-trainer local: ")
    assert error.count("\n") == 1


def test_plain_lines_tell_progress_and_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 3.0, 10.0, 11.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    lines = Lines(40)
    for iteration in (0, 3, 10, 40):  # the second comes too soon for a line of its own, the last is told at once
        lines.progress(Progress(iteration, loss=2.5, tokens_per_second=1234.0))
    assert capsys.readouterr().err.splitlines() == [
        "iteration 0/40, loss 2.5000, 1,234 tokens/s",
        "iteration 10/40, loss 2.5000, 1,234 tokens/s, ETA 30 s",
        "iteration 40/40, loss 2.5000, 1,234 tokens/s, ETA 0 s",
    ]
