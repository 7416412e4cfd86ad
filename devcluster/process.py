"""Programs that outlive the command that started them: a session of their own, a log, and a pid file that can't lie.

Pids wrap within minutes of a busy build, so a pid file holds the process's start time too. It is written by the process
itself before it becomes the program: at no moment does something run that no file names.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

BECOME = 'read -r stat < /proc/$$/stat; echo "$stat" > "$0.new"; mv "$0.new" "$0"; exec "$@"'
"""The first line of /proc/PID/stat names pid and start time; both survive exec."""


class ProcessFailed(RuntimeError):
    """A program did not start, or did not end."""


@dataclass(frozen=True)
class Identity:
    """A process, told apart from a later one of the same pid."""

    pid: int
    started: int
    """Clock ticks after boot (proc(5), field 22 of stat)."""


@dataclass(frozen=True)
class Daemon:
    """A named program of a cluster; `folder` is the cluster's state."""

    name: str
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "log" / f"{self.name}.log"

    @property
    def pid_file(self) -> Path:
        return self.folder / "pid" / self.name

    def start(
        self,
        argv: Sequence[str | Path],
        *,
        netns: str = "",
        env: Mapping[str, str] | None = None,
        tied: bool = False,
    ) -> Identity:
        """Starts `argv`, in a network namespace where one is named.

        `tied`: the kernel kills it when the calling thread ends, however that happens. Raises ProcessFailed where it
        runs already or ends at once.
        """
        if running := self.identity():
            raise ProcessFailed(f"{self.name} already runs as pid {running.pid}")
        for file in (self.log, self.pid_file):
            file.parent.mkdir(parents=True, exist_ok=True)
        self.pid_file.unlink(missing_ok=True)
        inside = ["nsenter", f"--net=/run/netns/{netns}"] if netns else []
        begin = ["setpriv", "--pdeathsig", "KILL"] if tied else ["setsid", "--fork"]
        command = [str(part) for part in (*begin, "sh", "-c", BECOME, self.pid_file, *inside, *argv)]
        with self.log.open("ab") as log, Path(os.devnull).open("rb") as nothing:
            files = ((nothing, 0), (log, 1), (log, 2))
            pid = os.posix_spawnp(
                command[0],
                command,
                environment() | dict(env or {}),
                file_actions=[(os.POSIX_SPAWN_DUP2, file.fileno(), number) for file, number in files],
                setsid=tied,
            )
        if not tied:
            os.waitpid(pid, 0)
        for _ in range(1000):  # the fork has happened, its first two syscalls may not have
            if self.pid_file.exists():
                break
            time.sleep(0.01)
        if found := self.identity():
            return found
        raise ProcessFailed(f"{self.name} ended at once; {self.last_words()}")

    def identity(self) -> Identity | None:
        """The process, while it lives."""
        try:
            recorded = parse_stat(self.pid_file.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return recorded if alive(recorded) else None

    def kill(self, seconds: float = 30) -> bool:
        """SIGKILL, and returns once it is gone; False where it did not run. Raises ProcessFailed past the limit.

        No SIGTERM: an API server that lost its etcd takes minutes over its shutdown, and a dying etcd removes files of
        its successor.
        """
        identity = self.identity()
        if identity is not None:
            os.kill(identity.pid, signal.SIGKILL)
            end = time.monotonic() + seconds
            while alive(identity):
                if time.monotonic() > end:
                    raise ProcessFailed(f"{self.name} (pid {identity.pid}) still lives {seconds:.0f} s after SIGKILL")
                time.sleep(0.01)
            with suppress(ChildProcessError):  # ours where it was tied to this process
                os.waitpid(identity.pid, 0)
        self.pid_file.unlink(missing_ok=True)
        return identity is not None

    def last_words(self, lines: int = 15) -> str:
        """The end of its log, for messages."""
        try:
            words = self.log.read_text(errors="replace").splitlines()[-lines:]
        except FileNotFoundError:
            words = []
        return f"the end of {self.log}:\n" + "\n".join(words or ["(empty)"])


def environment() -> dict[str, str]:
    """What a program of the cluster gets of ours: no proxy, no credentials, no KUBECONFIG."""
    kept = ("HOME", "LANG", "TERM", "TMPDIR")
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        **{name: os.environ[name] for name in kept if name in os.environ},
    }


def parse_stat(text: str) -> Identity:
    """Pid and start time of a line of /proc/PID/stat. Raises ValueError."""
    pid, parenthesis, rest = text.partition(" (")
    fields = rest.rpartition(")")[2].split()  # the name in parentheses may hold blanks and parentheses
    if not parenthesis or len(fields) < 20:
        raise ValueError(f"no line of /proc/PID/stat: {text!r}")
    return Identity(int(pid), int(fields[19]))


def alive(identity: Identity) -> bool:
    """Whether exactly this process runs; one that only waits to be reaped doesn't."""
    try:
        text = Path(f"/proc/{identity.pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return parse_stat(text) == identity and text.rpartition(")")[2].split()[0] not in ("Z", "X")
