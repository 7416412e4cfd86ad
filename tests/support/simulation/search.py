"""Hypothesis over schedules: how many are tried from which seed, in this process or in several.

python -m tests.support.simulation.search --schedules 5000 --seed 1
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from .faults import SCHEDULES, Schedule
from .world import Simulation, Violation

ROOT = Path(__file__).parents[3]


def find_violation(
    schedules: int,
    first: int,
    *,
    among: st.SearchStrategy[Schedule] = SCHEDULES,
    check: Callable[[Simulation], object] = lambda sim: None,
    simplest: bool = True,
) -> str | None:
    """The story of a schedule that violates something, or None after so many that do not.

    Args:
        first: seed; the same schedules are tried for the same one.
        check: what else must hold at the end.
        simplest: make it as simple as it can be, which takes as long as some hundreds more.
    """

    @seed(first)
    @settings(
        max_examples=schedules,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink] if simplest else [Phase.generate],
    )
    @given(among)
    def search(schedule: Schedule) -> None:
        check(Simulation(schedule).run())

    try:
        search()
    except Violation as e:
        return str(e)
    return None


def find_in_processes(schedules: int, first: int, processes: int) -> tuple[str | None, float]:
    """As `find_violation`, shared by so many processes; and schedules a second."""
    began = time.monotonic()
    # The order of sets of strings is no part of a schedule, but a bug may depend on it.
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", __spec__.name, f"--schedules={schedules // processes}", f"--seed={first + i}"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    said = [process.communicate()[0] for process in running]
    stories = [text for process, text in zip(running, said, strict=True) if process.returncode]
    return (stories[0] if stories else None), schedules / (time.monotonic() - began)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--schedules", type=int, default=1000)
    arguments.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    arguments.add_argument("--processes", type=int, default=1)
    said = arguments.parse_args()
    if said.processes > 1:
        story, rate = find_in_processes(said.schedules, said.seed, said.processes)
    else:
        began = time.monotonic()
        story = find_violation(said.schedules, said.seed)
        rate = said.schedules / (time.monotonic() - began)
    if story is not None:
        print(f"seed {said.seed}\n{story}")
        return 1
    print(f"{said.schedules} schedules from seed {said.seed}, {rate:.0f} a second: nothing was violated")
    return 0


if __name__ == "__main__":
    sys.exit(main())
