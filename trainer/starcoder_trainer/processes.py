"""Starting worker processes, each in a session of its own, and ending whole sessions."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from starcoder_trainer.contract.worker import Start, encode_line

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)
_OOM_SCORE = Path("/proc/self/oom_score_adj")
_OOM_FIRST = 100
"""Thousandths of the container's memory limit by which a worker counts for larger than it is when the kernel looks for
what to kill: of a small model's worker nearly all is shared with the server, which may be the largest."""
_OOM_FILES = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")


@dataclass(frozen=True)
class Process:
    """A worker that was started."""

    pid: int
    channel: socket.socket
    """Its messages."""
    output: int
    """Descriptor to read its stdout and stderr from."""


Enter = Callable[[Start, int, socket.socket, int | None], int]


def start_worker(
    start: Start, rank: int, listen_fd: int | None, enter: Enter, release: Callable[[int | None], None]
) -> Process:
    """Fork where that is safe, else spawn a fresh interpreter (seconds slower, and said on stderr).

    Args:
        enter: What a fork runs; its result is the exit code.
        release: Called in the fork first: closes what the server has open but for `listen_fd`.
    """
    ours, theirs = socket.socketpair()
    output, write_end = os.pipe()

    def release_all() -> None:
        release(listen_fd)
        ours.close()
        os.close(output)

    try:
        if (obstacle := fork_obstacle()) is None:
            pid = _fork(start, rank, theirs, listen_fd, write_end, enter, release_all)
        else:
            print(f"rank {rank}: spawned, not forked: {obstacle}", file=sys.stderr, flush=True)
            ours.sendall(encode_line(start))
            pid = _spawn(rank, theirs, listen_fd, write_end)
    except BaseException:
        ours.close()
        os.close(output)
        raise
    finally:
        theirs.close()
        os.close(write_end)
    return Process(pid, ours, output)


def fork_obstacle() -> str | None:
    """Why this process must not fork workers; None where it may."""
    if sys.platform != "linux":
        return f"forks of a process that has imported torch are not safe on {sys.platform}"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "CUDA is initialised in this process"
    threads = psutil.Process().num_threads()
    return None if threads == 1 else f"this process has {threads} threads, expected 1"


def _fork(  # noqa: PLR0917
    start: Start,
    rank: int,
    channel: socket.socket,
    listen_fd: int | None,
    output: int,
    enter: Enter,
    release: Callable[[], None],
) -> int:
    gc.freeze()  # the collector must not touch, and so copy, the pages shared with the server
    sys.stdout.flush()
    sys.stderr.flush()
    server = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        die_with_parent(server)
        die_before_parent()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        release()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        code = enter(start, rank, channel, listen_fd)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _spawn(rank: int, channel: socket.socket, listen_fd: int | None, output: int) -> int:
    descriptors = [channel.fileno(), *([listen_fd] if listen_fd is not None else [])]
    command = [sys.executable, "-u", "-m", "starcoder_trainer.worker", str(rank), *map(str, descriptors)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=descriptors, start_new_session=True
    )
    process.returncode = 0  # we reap it ourselves; Popen must not warn that it still runs
    return process.pid


def die_with_parent(parent: int) -> None:
    """The kernel kills this process when the server dies, however that comes (Linux only)."""
    if sys.platform != "linux":
        return
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(70)


def die_before_parent() -> None:
    """Where memory is short, the kernel is to kill this process and not the server, which tells why and starts the next
    (Linux only)."""
    with contextlib.suppress(OSError, ValueError):  # where /proc is not to be written, it chooses by size
        _OOM_SCORE.write_text(str(min(1000, int(_OOM_SCORE.read_text()) + _OOM_FIRST)))


def kill_workers(leaders: Iterable[int]) -> None:
    """SIGKILL to workers that are not reaped yet, with all that they started."""
    leaders = set(leaders)
    for pid in leaders:
        _kill(pid)  # a fork of this moment has no session of its own yet
    kill_sessions(leaders)


def kill_sessions(leaders: Iterable[int]) -> None:
    """SIGKILL to every process of the sessions, whatever process groups they made inside.

    The leaders may be reaped already: a session keeps its number as long as it has members. Looks again until it
    finds nobody new, since a process may fork while the others are being found; one that was sent SIGKILL forks no
    more. Does not wait for the ends.
    """
    sessions, killed = set(leaders), set[int]()
    while found := {pid for pid in psutil.pids() if _session(pid) in sessions} - killed:
        for pid in found:
            _kill(pid)
        killed |= found


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def oom_kills() -> int:
    """Processes of this container that the kernel killed for want of memory so far; 0 where it does not say."""
    for name in _OOM_FILES:
        with contextlib.suppress(OSError, ValueError):
            for line in Path(name).read_text().splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value)
    return 0
