"""What the failover bench reads out of logs, and the line it prints."""

from __future__ import annotations

import json

from bench.failover.iterations import Resumption, newest, read, resumption
from bench.line import Baseline, Sample, line


def log(*entries: tuple[int, str]) -> str:
    return "\n".join(f"2026-11-24T10:00:{second:02d}.500000000Z {said}" for second, said in entries)


def done(iteration: int) -> str:
    return f"INFO iteration {iteration}/1000 | loss 5.1 | 12 tokens/s"


def begins(iteration: int) -> str:
    return f"INFO iteration {iteration} of 1000; formed in 0.1 s"


FAULT = 1795514410.0  # 10:00:10


def test_a_resumption_is_the_first_iteration_after_the_workers_began_again() -> None:
    survivor = read(
        log((1, begins(0)), (8, done(57)), (11, done(58)), (15, begins(50)), (16, done(51)), (17, done(52)))
    )
    replacement = read(log((15, begins(50)), (17, done(51))))
    assert resumption([survivor, replacement], FAULT) == Resumption(FAULT + 7.5, 8)


def test_what_was_done_before_the_fault_is_unknown_where_only_later_logs_are_left() -> None:
    started_anew = read(log((15, begins(50)), (16, done(51))))
    assert resumption([started_anew], FAULT) == Resumption(FAULT + 6.5, None)


def test_how_far_it_is_the_pod_that_was_read_last_tells() -> None:
    logs = [read(log((1, begins(50)), (8, done(57)))), read(log((1, begins(50)), (9, done(58)))), []]
    assert newest(logs) == 58
    assert newest([read(log((1, begins(50))))]) == 0


def test_iterations_that_were_on_their_way_are_no_resumption() -> None:
    assert resumption([read(log((1, begins(0)), (8, done(57)), (11, done(58))))], FAULT) is None


def test_other_lines_are_passed_over() -> None:
    assert read(log((1, "no such line"), (2, "")) + "\nbroken") == []


def test_a_line_says_what_was_censored_and_stands_beside_its_baseline() -> None:
    ours, theirs = Sample((3.0, 5.0, 4.0)), Sample((600.0, 600.0, 420.0), censored=2)
    found = json.loads(line("failover/node-kill", "s", ours, goal=6.0, baseline=Baseline("plain", theirs)))
    assert (found["n"], found["median"], found["max"], found["goal"]) == (3, 4.0, 5.0, 6.0)
    assert (found["baseline"]["median"], found["baseline"]["censored"]) == (600.0, 2)
    assert "censored" not in found
