"""Runs a build program in mount and pid namespaces of its own: however it ends, no mount and no process outlives it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ISOLATED = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"),
)
QUIET = 30.0
"""Seconds without a line after which the terminal hears that work goes on."""


class BuildFailed(RuntimeError):
    """A build program failed; the message holds its last lines and names its log."""


def run(argv: Sequence[str | Path], *, env: Mapping[str, str], log: Path, what: str, steps: str = "") -> None:
    """Output goes to `log`; lines that hold `steps` also to stderr, with the seconds since the start.

    Raises:
        BuildFailed: exit code other than 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    tail: list[str] = []
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            [*ISOLATED, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(env),
            start_new_session=True,  # Ctrl-C reaches us alone, and we end it
        ) as process,
    ):
        assert process.stdout is not None
        try:
            rest = b""
            while True:
                if not select.select([process.stdout], [], [], QUIET)[0]:
                    say(f"{what}: {time.monotonic() - start:.0f} s, still at it: {tail[-1][:100] if tail else argv[0]}")
                    continue
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                *lines, rest = (rest + chunk).split(b"\n")
                for line in (raw.decode(errors="replace").rstrip() for raw in lines):
                    file.write(line + "\n")
                    tail = [*tail[-19:], line]
                    if steps and steps in line:
                        say(f"{what}: {time.monotonic() - start:.0f} s, {line[:120]}")
                if not chunk:
                    break
            code = process.wait()
        except BaseException:
            process.kill()  # unshare takes its child along, and that as pid 1 everything else
            raise
    if code:
        words = "\n".join(f"  {line[:300]}" for line in tail)
        raise BuildFailed(f"{what}: {argv[0]} ended with exit code {code}; its last lines (all are in {log}):\n{words}")


def capture(argv: Sequence[str | Path], *, env: Mapping[str, str]) -> str:
    """Standard output of a short command. Raises BuildFailed."""
    done = subprocess.run(
        [*ISOLATED, *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True, env=dict(env), check=False
    )
    if done.returncode:
        raise BuildFailed(f"`{' '.join(map(str, argv))}` ended with exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def say(line: str) -> None:
    print(f"images: {line}", file=sys.stderr, flush=True)
