"""The fork server's care for processes: what it starts, tells of, and leaves behind. Its workers follow scripts."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from starcoder_trainer.contract import exits
from starcoder_trainer.contract.assignment import Layout
from starcoder_trainer.contract.report import Failure
from starcoder_trainer.contract.worker import (
    Exited,
    Leave,
    Look,
    Quit,
    Ready,
    Seen,
    Start,
    Started,
    Stop,
    Stopped,
    Terminating,
)
from tests.support.forkserver import Agent, connect, fork_server
from tests.support.scripted_workers import OOM_FILE
from tests.support.trainer import listen, make_config

SECONDS = 60


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    path: Path
    _log: Path
    _read: int = 0

    def log(self) -> bytes:
        """Written since the test began."""
        return self._log.read_bytes()[self._read :]

    def forget_log(self) -> None:
        self._read = self._log.stat().st_size

    def agent(self) -> Agent:
        agent = connect(self.path, self.process)
        assert isinstance(agent.receive(), Ready)
        return agent

    def workers(self) -> list[psutil.Process]:
        return sorted(psutil.Process(self.process.pid).children(), key=lambda p: p.pid)


@contextlib.contextmanager
def serve(folder: Path, *arguments: str) -> Iterator[Server]:
    path, log = folder / "worker.sock", folder / "log"
    with fork_server(path, log, "tests.support.scripted_workers", *arguments) as process:
        yield Server(process, path, log)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """The one that tests share, but for those that end it."""
    if request.function in ENDS_SERVER:
        with serve(tmp_path) as server:
            yield server
    else:
        shared: Server = request.getfixturevalue("shared")
        shared.forget_log()
        yield shared


@pytest.fixture
def agent(server: Server) -> Iterator[Agent]:
    agent = server.agent()
    yield agent
    agent.close()


def start(*ranks: int, attempt: int = 1, **script: Any) -> Start:
    return Start(attempt, ranks, Layout(1, 1, len(ranks)), "127.0.0.1", 1, None, script, "/nowhere", "127.0.0.1")


def all_started(agent: Agent, ranks: int) -> None:
    for _ in range(ranks):
        agent.until(Started)


def gone(processes: list[psutil.Process]) -> bool:
    """No longer running, as soon as that is so."""
    _, alive = psutil.wait_procs(processes, timeout=SECONDS)
    return not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def test_a_worker_that_is_killed_is_reported_with_the_signal_and_where_it_was(server: Server, agent: Agent) -> None:
    agent.send(start(4, 5, do="hang"))
    all_started(agent, 2)
    server.workers()[1].kill()
    assert agent.receive() == Exited(1, 5, -9, Failure("Crash", "killed by SIGKILL", -9, 5, 7))


def test_a_worker_that_aborts_is_reported_with_what_it_wrote_of_its_end(server: Server, agent: Agent) -> None:
    agent.send(start(0, do="abort", said="what():  NCCL error: ncclRemoteError, remote process exited"))
    failure = agent.until(Exited).failure
    assert failure is not None
    assert (failure.cause, failure.exit_code) == ("Peer", -6)
    assert failure.message == "killed by SIGABRT: what(): NCCL error: ncclRemoteError, remote process exited"
    agent.send(start(0, attempt=2, do="abort", said="Assertion `rows > 0' failed."))
    failure = agent.until(Exited).failure
    assert failure is not None
    assert (failure.cause, failure.message) == ("Crash", "killed by SIGABRT")


def test_a_kill_while_the_kernel_counts_one_for_memory_is_told_as_such(server: Server, agent: Agent) -> None:
    agent.send(start(0, 1, do="hang"))
    all_started(agent, 2)
    first, second = server.workers()
    server.path.with_name(OOM_FILE).write_text("1")
    first.kill()
    failure = agent.receive().failure  # type: ignore[union-attr]
    assert failure.cause == "OutOfMemory"
    assert "raise workers.resources.limits.memory" in failure.message
    second.kill()  # the counter did not move again
    assert agent.receive().failure.cause == "Crash"  # type: ignore[union-attr]


def test_where_memory_is_short_the_kernel_takes_a_worker_before_the_server(server: Server, agent: Agent) -> None:
    agent.send(start(0, 1, do="hang"))
    all_started(agent, 2)

    def adjusted(process: psutil.Process) -> int:
        return int(Path(f"/proc/{process.pid}/oom_score_adj").read_text())

    before = adjusted(psutil.Process(server.process.pid))
    assert [adjusted(worker) - before for worker in server.workers()] == [100, 100]


def asked_for_stacks(server: Server, agent: Agent, *ranks: int) -> list[psutil.Process]:
    """Workers that have written them, and whose look is not answered yet."""
    agent.send(start(*ranks, do="answer"))
    all_started(agent, len(ranks))
    agent.send(Look(1, stacks=True))
    while any(b"[rank %d]   File" % rank not in server.log() for rank in ranks):
        assert server.process.poll() is None
    return server.workers()


def test_workers_that_are_stopped_before_they_are_heard_leave_their_stacks(server: Server, agent: Agent) -> None:
    """Another Pod's agent was faster, and the operator's hold comes before this one's answer."""
    asked_for_stacks(server, agent, 4, 5)
    agent.send(Stop(1))
    seen, stopped = agent.receive(), agent.receive()
    assert isinstance(seen, Seen)
    assert [(w.rank, w.state, "scripted_workers.py" in w.stacks) for w in seen.workers] == [
        (4, "S", True), (5, "S", True),
    ]  # fmt: skip
    assert stopped == Stopped(1)


def test_a_worker_that_ends_before_it_is_heard_leaves_its_stacks(server: Server, agent: Agent) -> None:
    """As those do whose connections break because another Pod's workers were ended."""
    asked_for_stacks(server, agent, 4, 5)[0].kill()
    assert isinstance(agent.receive(), Exited)
    seen = agent.receive()
    assert isinstance(seen, Seen)
    assert [(w.rank, w.state, "scripted_workers.py" in w.stacks) for w in seen.workers] == [
        (4, "", True),
        (5, "S", True),
    ]


def test_a_worker_that_writes_without_end_can_be_stopped_while_it_is_asked(server: Server, agent: Agent) -> None:
    agent.send(start(0, do="write"))
    all_started(agent, 1)
    agent.send(Look(1, stacks=True))
    agent.send(Stop(1))
    agent.until(Stopped)


@pytest.mark.parametrize("code", [0, 3])
def test_leaving_without_a_report_is_a_crash_whatever_the_exit_code(server: Server, agent: Agent, code: int) -> None:
    agent.send(start(2, do="exit", code=code))
    said = agent.receive()
    assert said == Exited(1, 2, code, Failure("Crash", f"exit code {code} without a report", code, 2))
    assert b"[rank 2] last words\n" in server.log()


def test_what_a_worker_says_of_its_end_is_passed_on_once_it_is_reaped(server: Server, agent: Agent) -> None:
    agent.send(start(2, do="raise"))
    said = agent.receive()
    assert isinstance(said, Exited)
    assert said.failure is not None
    assert said.failure.fingerprint, "by which the same exception is known again"
    failure = replace(said.failure, fingerprint="")
    assert replace(said, failure=failure) == Exited(1, 2, 70, Failure("Crash", "RuntimeError: as planned", 70, 2, 7))
    assert server.workers() == []


def children_in(log: bytes) -> list[psutil.Process]:
    return [psutil.Process(int(pid)) for pid in re.findall(rb"child (\d+)", log)]


def test_stop_ends_workers_and_all_that_they_started(server: Server, agent: Agent) -> None:
    agent.send(start(0, 1, do="family"))
    all_started(agent, 2)
    workers, children = server.workers(), children_in(server.log())
    assert len(children) == 4
    agent.send(Stop(1))
    assert agent.receive() == Stopped(1)
    assert not any(w.is_running() for w in workers), "idle means reaped"
    assert gone(children)


def test_what_a_worker_started_does_not_outlive_it(server: Server, agent: Agent) -> None:
    agent.send(start(0, do="family", leave=True))
    all_started(agent, 1)
    assert agent.receive() == Exited(1, 0, 0)
    found = re.findall(rb"child (\d+)", server.log())
    assert len(found) == 2
    assert gone([psutil.Process(int(pid)) for pid in found if psutil.pid_exists(int(pid))])


def test_when_the_agent_goes_the_workers_go_and_another_agent_is_served(server: Server) -> None:
    first = server.agent()
    first.send(start(0, 1, do="hang"))
    all_started(first, 2)
    workers = server.workers()
    first.close()
    second = server.agent()  # told Ready only once the workers of the first are gone
    assert not any(w.is_running() for w in workers)
    second.send(start(0, attempt=2, do="hang"))
    assert second.receive() == Started(2, 0, 7)
    second.close()


def test_a_second_agent_waits_until_the_first_is_gone(server: Server, agent: Agent) -> None:
    agent.send(start(0, do="hang"))
    all_started(agent, 1)
    waiting = connect(server.path, server.process)
    agent.send(Stop(1))
    assert agent.receive() == Stopped(1)  # a round of the server's loop has passed since
    waiting.connection.setblocking(False)
    with pytest.raises(BlockingIOError):
        waiting.connection.recv(1)
    waiting.close()


def test_a_start_replaces_the_workers_of_an_older_attempt(server: Server, agent: Agent) -> None:
    agent.send(start(0, 1, do="hang"))
    all_started(agent, 2)
    old = server.workers()
    agent.send(start(0, 1, attempt=2, do="hang"))
    assert {agent.receive() for _ in range(2)} == {Started(2, 0, 7), Started(2, 1, 7)}
    assert not any(w.is_running() for w in old)


def test_asked_to_quit_it_stops_the_workers_says_so_and_exits_with_0(server: Server, agent: Agent) -> None:
    agent.send(start(0, do="hang"))
    all_started(agent, 1)
    workers = server.workers()
    agent.send(Quit())
    assert agent.receive() == Stopped(1)
    assert server.process.wait(SECONDS) == 0
    assert gone(workers)


def test_workers_are_asked_to_leave_and_their_last_words_say_where_they_left(server: Server, agent: Agent) -> None:
    agent.send(start(0, 1, attempt=4, do="leave"))
    all_started(agent, 2)
    agent.send(Leave(3))  # of an older attempt: nobody is meant
    agent.send(Leave(4))
    assert {agent.receive() for _ in range(2)} == {Exited(4, 0, 0, None, 8), Exited(4, 1, 0, None, 8)}


def test_sigterm_is_told_to_the_agent_and_the_server_ends_when_the_workers_have_left(
    server: Server, agent: Agent
) -> None:
    agent.send(start(0, do="leave"))
    all_started(agent, 1)
    (worker,) = server.workers()
    server.process.send_signal(signal.SIGTERM)
    assert agent.receive() == Terminating()
    assert worker.is_running(), "the agent decides when"
    agent.send(Leave(1))
    assert agent.receive() == Exited(1, 0, 0, None, 8)
    assert server.process.wait(SECONDS) == 0


def test_after_sigterm_the_agent_may_stop_workers_that_do_not_leave(server: Server, agent: Agent) -> None:
    agent.send(start(0, do="hang"))
    all_started(agent, 1)
    workers = server.workers()
    server.process.send_signal(signal.SIGTERM)
    assert agent.receive() == Terminating()
    agent.send(Stop(1))
    assert agent.receive() == Stopped(1)
    assert server.process.wait(SECONDS) == 0
    assert gone(workers)


def test_sigterm_ends_a_server_without_workers_at_once(server: Server, agent: Agent) -> None:
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(SECONDS) == 0


def test_after_sigterm_the_server_ends_with_its_agent(server: Server, agent: Agent) -> None:
    agent.send(start(0, do="hang"))
    all_started(agent, 1)
    workers = server.workers()
    server.process.send_signal(signal.SIGTERM)
    assert agent.receive() == Terminating()
    agent.close()
    assert server.process.wait(SECONDS) == 0
    assert gone(workers)


def test_workers_die_with_a_server_that_is_killed(server: Server, agent: Agent) -> None:
    agent.send(start(0, 1, do="hang"))
    all_started(agent, 2)
    workers = server.workers()
    server.process.kill()
    server.process.wait()
    assert gone(workers)


def test_the_leaders_socket_reaches_rank_0_and_nobody_else(server: Server, agent: Agent) -> None:
    with listen() as listener:
        address = listener.getsockname()
        agent.send(start(0, do="accept"), listener)
    # Ours is closed: who answers is the worker, on the very socket that was bound before.
    with socket.create_connection(address, SECONDS) as connection:
        assert connection.recv(100) == b"rank 0"
    assert agent.receive() == Exited(1, 0, 0)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, SECONDS)


def test_a_worker_holds_nothing_of_the_server_and_of_its_neighbours(server: Server, agent: Agent) -> None:
    agent.send(start(0, 1, 2, do="descriptors"))
    for _ in range(3):
        assert agent.until(Exited).exit_code == 0
    found = re.findall(rb"\[rank (\d)\] open (.*)", server.log())
    channels = {rank: re.findall(rb"'(\S+?:\[\d+\])'", names) for rank, names in found}
    assert sorted(channels) == [b"0", b"1", b"2"]
    assert all(len(names) == 1 for names in channels.values()), channels  # its own channel
    assert len({names[0] for names in channels.values()}) == 3


def test_a_line_that_is_no_message_is_ignored(server: Server, agent: Agent) -> None:
    agent.connection.sendall(b'{"type": "Start"}\nnonsense\n')
    agent.send(start(0, do="hang"))
    assert agent.receive() == Started(1, 0, 7)
    assert b"ignored" in server.log()


def test_with_a_second_thread_workers_are_spawned_not_forked(tmp_path: Path) -> None:
    with serve(tmp_path, "1") as server:
        agent = server.agent()
        # No configuration of a run: a spawned worker, which is a real one, says so.
        agent.send(start(0, do="exit", code=3))
        ended = agent.until(Exited)
        agent.close()
    assert (ended.rank, ended.exit_code, ended.failure.cause) == (0, 78, "UserError")
    assert b"rank 0: spawned, not forked: this process has 2 threads, expected 1" in server.log()


def test_what_an_image_lacks_is_told_by_the_first_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's own imports fail, and the run is to fail with the sentence that Python has for it."""
    broken = tmp_path / "megatron"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('libmegatron.so: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    path, log = tmp_path / "worker.sock", tmp_path / "log"
    with fork_server(path, log, "starcoder_trainer.forkserver") as process:
        agent = connect(path, process)
        assert isinstance(agent.receive(), Ready)
        config = make_config(Layout(1, 1, 1)).to_dict()
        agent.send(replace(start(0), config=config))
        failure = agent.until(Exited).failure
        agent.close()
    assert (failure.cause, failure.exit_code) == ("UserError", exits.USER_ERROR)
    assert failure.message == "ImportError: libmegatron.so: cannot open shared object file"
    assert b"can't preload what workers need" in log.read_bytes()


def test_the_server_forks_from_one_thread(server: Server, agent: Agent) -> None:
    agent.send(start(0, do="hang"))
    all_started(agent, 1)
    assert psutil.Process(server.process.pid).num_threads() == 1
    (worker,) = server.workers()
    assert os.getsid(worker.pid) == worker.pid, "each worker has a session of its own"
    assert b"spawned" not in server.log()


ENDS_SERVER = (
    test_asked_to_quit_it_stops_the_workers_says_so_and_exits_with_0,
    test_sigterm_is_told_to_the_agent_and_the_server_ends_when_the_workers_have_left,
    test_after_sigterm_the_agent_may_stop_workers_that_do_not_leave,
    test_sigterm_ends_a_server_without_workers_at_once,
    test_after_sigterm_the_server_ends_with_its_agent,
    test_workers_die_with_a_server_that_is_killed,
)
