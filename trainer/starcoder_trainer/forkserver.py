"""The worker container's process: keeps torch and megatron imported, forks workers at the agent's word, ends them.

One agent at a time is connected to the Unix socket; when it goes, all workers go, so that none runs unsupervised. As
PID 1 it reaps whatever is left to it. Everything happens in one thread: a fork of a second one would not be safe.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from starcoder_trainer.contract import exits, names
from starcoder_trainer.contract.codec import ContractError
from starcoder_trainer.contract.report import Failure
from starcoder_trainer.contract.worker import (
    Collective,
    Exited,
    Leave,
    Look,
    Message,
    Quit,
    Ready,
    Saved,
    Start,
    Started,
    Step,
    Stop,
    Stopped,
    Terminating,
    decode_line,
    encode_line,
)

from .environment import set_environment
from .failures import cause_of_abort, failure_of
from .lookout import Lookout
from .processes import Enter, Process, fork_obstacle, kill_sessions, kill_workers, oom_kills, start_worker
from .worker import enter

log = logging.getLogger(__name__)

ENV_SOCKET = "STARCODER_WORKER_SOCKET"
_CHUNK = 1 << 16
_LAST_READS = 16
_LAST_LINES = 400
"""An abort writes the stacks of all threads after its reason."""


@dataclass
class _Worker:
    rank: int
    attempt: int
    process: Process
    messages: bytes = b""
    output: bytes = b""
    iteration: int | None = None
    last_lines: deque[bytes] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))
    """Of its output: what a process that aborts says of it."""
    farewell: Exited | None = None
    """What it said of its own end."""


@dataclass
class _Agent:
    connection: socket.socket
    incoming: bytes = b""
    outgoing: bytes = b""
    listeners: list[int] = field(default_factory=list)
    """Descriptors that came with the messages."""


class ForkServer:
    def __init__(
        self,
        path: Path,
        enter: Enter,
        preload_seconds: Callable[[], float],
        oom_kills: Callable[[], int] = oom_kills,
    ) -> None:
        """Listens at once; `preload_seconds` is asked when an agent is told `Ready`."""
        self._enter = enter
        self._preload_seconds = preload_seconds
        self._selector = selectors.DefaultSelector()
        self._workers: dict[int, _Worker] = {}
        self._agent: _Agent | None = None
        self._lookout = Lookout()
        self._serving = False
        self._quit = self._terminating = self._told_terminating = False
        self._count_oom_kills = oom_kills
        self._oom_kills = oom_kills()
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        path.chmod(0o660)  # the agent's user may share only the group (fsGroup)
        self._listener.listen(4)
        self._listener.setblocking(False)
        self._wake, wake_end = socket.socketpair()
        self._wake.setblocking(False)
        wake_end.setblocking(False)
        self._wake_end = wake_end
        signal.set_wakeup_fd(wake_end.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_terminate)

    def preload_failed(self, error: Exception) -> None:
        """Workers will say so, since what they say reaches the operator: it ends the run where that is right."""

        def tell(start: Start, rank: int, channel: socket.socket, _: int | None) -> int:
            failure = failure_of(error, rank, None)
            assert failure.exit_code is not None
            channel.sendall(encode_line(Exited(start.attempt, rank, failure.exit_code, failure)))
            return failure.exit_code

        self._enter = tell

    def serve(self) -> None:
        """Until `Quit`, or SIGTERM while no worker runs; no worker is left then."""
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake, selectors.EVENT_READ, self._on_signal)
        self._serving = True
        try:
            while not self._quit:
                for key, _ in self._selector.select(self._lookout.patience()):
                    if self._is_current(key):
                        key.data()
                self._reap()
                if self._terminating and (self._agent is None or not self._workers):
                    self._quit = True
                if seen := self._lookout.answer(self._processes()):
                    self._send(seen)
        finally:
            attempt = self._stop_workers()
            if attempt is not None:
                self._send(Stopped(attempt))
            if self._agent is not None:
                self._drop_agent("the server ends")

    def _is_current(self, key: selectors.SelectorKey) -> bool:
        """An earlier event of the same round may have closed it, and its descriptor may be another's by now."""
        try:
            return bool(self._selector.get_key(key.fileobj).data == key.data)
        except (KeyError, ValueError):
            return False

    # the agent

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        # Another agent waits in the backlog until this one is gone.
        self._selector.unregister(self._listener)
        self._agent = _Agent(connection)
        self._selector.register(connection, selectors.EVENT_READ, self._on_agent)
        self._send(Ready(os.getpid(), self._preload_seconds()))

    def _on_agent(self) -> None:
        agent = self._agent
        assert agent is not None
        try:
            self._flush(agent)
            data, descriptors, _, _ = socket.recv_fds(agent.connection, _CHUNK, 4)
        except BlockingIOError:
            return
        except OSError as e:
            self._drop_agent(str(e))
            return
        agent.listeners.extend(descriptors)
        if not data:
            self._drop_agent("it closed the connection")
            return
        *lines, agent.incoming = (agent.incoming + data).split(b"\n")
        for line in lines:
            try:
                self._obey(decode_line(line))
            except ContractError as e:
                log.error("ignored: %s", e)

    def _obey(self, message: Message) -> None:
        match message:
            case Start():
                self._start(message)
            case Stop(attempt):
                self._stop_workers()
                self._send(Stopped(attempt))
            case Leave(attempt):
                for worker in self._workers.values():
                    if worker.attempt == attempt:
                        with contextlib.suppress(OSError):  # it has ended
                            worker.process.channel.sendall(encode_line(message))
            case Look():
                self._lookout.ask(message, self._processes())
            case Quit():
                self._quit = True
            case _:
                log.error("ignored: the agent sent %s", type(message).__name__)

    def _drop_agent(self, why: str) -> None:
        agent, self._agent = self._agent, None
        assert agent is not None
        self._selector.unregister(agent.connection)
        with contextlib.suppress(OSError):
            self._flush(agent)
        agent.connection.close()
        for descriptor in agent.listeners:
            os.close(descriptor)
        if self._stop_workers() is not None:
            log.warning("the agent is gone (%s): workers stopped", why)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _send(self, message: Message) -> None:
        if self._agent is None:
            return
        self._agent.outgoing += encode_line(message)
        try:
            self._flush(self._agent)
        except OSError as e:
            log.warning("can't tell the agent %s: %s", type(message).__name__, e)  # reading will meet the end

    def _flush(self, agent: _Agent) -> None:
        """What does not fit now goes when the socket is writable: a slow agent must not stop training."""
        with contextlib.suppress(BlockingIOError):
            while agent.outgoing:
                agent.outgoing = agent.outgoing[agent.connection.send(agent.outgoing) :]
        if agent is self._agent:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if agent.outgoing else 0)
            self._selector.modify(agent.connection, events, self._on_agent)

    # workers

    def _processes(self) -> dict[int, int]:
        """Rank to process."""
        return {worker.rank: pid for pid, worker in self._workers.items()}

    def _start(self, start: Start) -> None:
        if self._stop_workers() is not None:
            log.warning("attempt %d starts: workers of an older one were still there and are stopped", start.attempt)
        assert self._agent is not None
        listeners = self._agent.listeners
        for rank in start.ranks:
            listen_fd = listeners[0] if rank == 0 and listeners else None
            try:
                process = start_worker(start, rank, listen_fd, self._enter, self._release)
            except OSError as e:
                message = f"can't start a worker: {e}; is there room in the container's limits of memory and processes?"
                failure = Failure("Crash", message, exits.CRASH, rank)
                self._send(Exited(start.attempt, rank, exits.CRASH, failure))
                break
            worker = _Worker(rank, start.attempt, process)
            self._workers[process.pid] = worker
            process.channel.setblocking(False)
            os.set_blocking(process.output, False)
            self._selector.register(process.channel, selectors.EVENT_READ, self._reader(worker, self._read_messages))
            self._selector.register(process.output, selectors.EVENT_READ, self._reader(worker, self._read_output))
        while listeners:
            os.close(listeners.pop())

    @staticmethod
    def _reader(worker: _Worker, read: Callable[[_Worker], bool]) -> Callable[[], None]:
        def call() -> None:
            read(worker)

        return call

    def _release(self, listen_fd: int | None) -> None:
        """In a fork: close what belongs to the server and to other workers."""
        for worker in self._workers.values():
            worker.process.channel.close()
            os.close(worker.process.output)
        for thing in (self._selector, self._listener, self._wake, self._wake_end):
            thing.close()
        if self._agent is not None:
            self._agent.connection.close()
            for descriptor in self._agent.listeners:
                if descriptor != listen_fd:
                    os.close(descriptor)

    def _read_messages(self, worker: _Worker) -> bool:
        """Forward what is there; False once nothing more is."""
        try:
            data = worker.process.channel.recv(_CHUNK)
        except OSError:
            return False
        if not data:
            self._forget(worker.process.channel)
            return False
        *lines, worker.messages = (worker.messages + data).split(b"\n")
        for line in lines:
            try:
                self._forward(worker, decode_line(line))
            except ContractError as e:
                log.error("ignored from rank %d: %s", worker.rank, e)
        return True

    def _forward(self, worker: _Worker, message: Message) -> None:
        match message:
            case Exited():
                worker.farewell = message  # told once it is reaped
            case Collective():
                self._lookout.collective(message)
            case Started(iteration=iteration) | Step(iteration=iteration) | Saved(step=iteration):
                worker.iteration = iteration
                self._send(message)
            case _:
                log.error("ignored: rank %d sent %s", worker.rank, type(message).__name__)

    def _read_output(self, worker: _Worker) -> bool:
        """Pass whole lines on to the container's log, with the rank; False once nothing more is there."""
        try:
            data = os.read(worker.process.output, _CHUNK)
        except OSError:
            return False
        if not data:
            self._forget(worker.process.output)
            return False
        *lines, worker.output = (worker.output + data).split(b"\n")
        for line in lines:
            self._print(worker, line)
        return True

    def _print(self, worker: _Worker, line: bytes) -> None:
        self._lookout.printed(worker.rank, line)
        worker.last_lines.append(line)
        sys.stderr.buffer.write(b"[rank %d] %s\n" % (worker.rank, line))
        sys.stderr.buffer.flush()

    def _forget(self, readable: Any) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(readable)

    def _stop_workers(self) -> int | None:
        """SIGKILL all sessions and reap them. The attempt they were of; None where there were none."""
        attempt = next((w.attempt for w in self._workers.values()), None)
        if self._lookout.patience() is not None:
            self._hear_out()
        kill_workers(self._workers)
        for pid in list(self._workers):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            self._bury(self._workers.pop(pid))
        return attempt

    def _hear_out(self) -> None:
        """They were being asked why they hang; what they have said by now is all that there will be."""
        for worker in self._workers.values():
            for read in (self._read_messages, self._read_output):
                for _ in range(_LAST_READS):  # one that writes without end must not keep itself alive
                    if not read(worker):
                        break
        if seen := self._lookout.answer(self._processes(), at_once=True):
            self._send(seen)
        self._lookout.forget()

    def _reap(self) -> None:
        """Workers that ended by themselves, and orphans that came to PID 1."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            worker = self._workers.pop(pid, None)
            if worker is not None:
                kill_sessions([pid])  # what it started must not live on
                self._bury(worker)
                self._tell_end(worker, os.waitstatus_to_exitcode(status))

    def _bury(self, worker: _Worker) -> None:
        """Take its last words, and close."""
        while self._read_messages(worker):
            pass
        while self._read_output(worker):
            pass
        if worker.output:
            self._print(worker, worker.output)
        self._forget(worker.process.channel)
        self._forget(worker.process.output)
        worker.process.channel.close()
        os.close(worker.process.output)

    def _tell_end(self, worker: _Worker, code: int) -> None:
        said = worker.farewell
        if said is None or said.exit_code != code:
            said = Exited(worker.attempt, worker.rank, code, self._unannounced(worker, code))
        self._send(said)

    def _unannounced(self, worker: _Worker, code: int) -> Failure:
        """It died without a word."""
        kills, before = self._count_oom_kills(), self._oom_kills
        self._oom_kills = kills
        what = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code} without a report"
        if code == -signal.SIGKILL and kills > before:
            message = f"{what}: the container's memory limit was reached; raise workers.resources.limits.memory"
            return Failure("OutOfMemory", message, code, worker.rank, worker.iteration)
        if code == -signal.SIGABRT:
            cause, line = cause_of_abort(said.decode(errors="replace") for said in worker.last_lines)
            return Failure(cause, f"{what}: {line}" if line else what, code, worker.rank, worker.iteration)
        return Failure("Crash", what, code, worker.rank, worker.iteration)

    # signals

    def _on_signal(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake.recv(_CHUNK):
                pass
        if self._terminating and not self._told_terminating:
            self._told_terminating = True
            log.info("asked to end")
            self._send(Terminating())

    def _on_terminate(self, *_: object) -> None:
        """Only notes it: what follows is for the loop, which this may have interrupted anywhere. Workers go on, since
        the agent, whose container ends after this one, is to have them leave with a checkpoint."""
        if not self._serving:
            log.info("asked to end")
            raise SystemExit(0)  # there are no workers yet, and the rest of the imports is not worth the wait
        self._terminating = True


def main(enter: Enter = enter) -> NoReturn:
    """Entry point of the worker container. Ends the process with exit code 0 when `ForkServer.serve` returns."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    set_environment()
    path = Path(os.environ.get(ENV_SOCKET, names.WORKER_SOCKET))
    seconds = 0.0

    server = ForkServer(path, enter, lambda: seconds)
    began = time.monotonic()
    try:
        from . import preload

        assert preload
    except Exception as e:
        log.exception("can't preload what workers need: the first will fail")
        server.preload_failed(e)
    seconds = time.monotonic() - began
    log.info("preloaded in %.1f s, listening on %s", seconds, path)
    if (obstacle := fork_obstacle()) is not None:
        log.warning("workers will be spawned, which takes seconds longer, not forked: %s", obstacle)
    server.serve()
    log.info("ended")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # destructors of imported libraries have nothing to do but to complain


if __name__ == "__main__":
    main()
