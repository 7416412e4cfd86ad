"""Virtual time: an event loop whose clock jumps to the next timer, and threads that run in step with it.

Everything of a simulation is a coroutine of one loop, or blocking code (`asyncio.to_thread`) of which one thread at a
time runs: the shipped ledger, committer and uploader block on their store. So a schedule comes out the same each time.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine
from typing import Any

MOST_TURNS = 20_000
"""Turns of the loop in which time may stand still."""

PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("PROCESS", default=None)


class Killed(BaseException):
    """Unwinds the thread of a process that has been killed."""


class Stalled(Exception):
    """Time does not go on."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Sleeps take no time; `time()` is seconds since the simulation began."""

    def __init__(self, at_once: Callable[[], bool] = lambda: False) -> None:
        """
        Args:
            at_once: says that blocking code will not have to wait now, so that it needs no thread.
        """
        super().__init__()
        self._at_once = at_once
        self._now = 0.0
        self._turns = 0
        self._selector = self
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        """What the base class waits with."""
        if timeout is None:
            raise Stalled("nothing is left that could ever happen")
        self._turns += 1
        if self._turns > MOST_TURNS:
            raise Stalled(f"the same moment, t={self._now}, goes on and on")
        if timeout > 0:
            self._turns = 0
            self._now = max(self._now, self._scheduled[0]._when)
        return []

    def _process_events(self, events: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        context = options.get("context")
        process = PROCESS.get() if context is None else context.get(PROCESS)
        task: asyncio.Task[Any] = super().create_task(coro, **options)
        if process is not None:
            process.tasks.add(task)
            task.add_done_callback(process.tasks.discard)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future = self.create_future()
        process = PROCESS.get()
        if self._at_once() and not (process and process.threads):
            try:
                future.set_result(func(*args))
            except Exception as e:
                future.set_exception(e)
            return future
        thread = _IDLE.pop() if _IDLE else _Thread()
        if process is not None:
            process.threads.add(thread)
        thread.begin(self, lambda: func(*args), future, process)
        return future

    def pause(self, seconds: float) -> None:
        """Called by blocking code: returns after so many seconds; at once where it runs in no thread."""
        if not self.in_thread:
            return
        self.wait(lambda resume: self.call_later(seconds, resume))

    def wait(self, arrange: Callable[[Callable[[], None]], Any]) -> None:
        """Called by blocking code: returns after `resume`, which is handed to `arrange`, has been called once."""
        thread: _Thread = _CURRENT.thread
        asked = thread.calls = thread.calls + 1

        def resume() -> None:
            if thread.calls == asked and thread.paused:
                thread.switch_to()

        arrange(resume)
        thread.switch_back()

    @property
    def in_thread(self) -> bool:
        return getattr(_CURRENT, "thread", None) is not None


_CURRENT = threading.local()
_IDLE: list[_Thread] = []


class _Thread:
    """One of a pool; runs only while the loop's thread waits for it."""

    def __init__(self) -> None:
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self.paused = self.killed = False
        self.calls = 0
        self._work: Callable[[], Any] = lambda: None
        self._outcome: tuple[Any, BaseException | None] | None = None
        threading.Thread(target=self._serve, daemon=True).start()

    def begin(
        self, loop: VirtualLoop, work: Callable[[], Any], future: asyncio.Future[Any], process: Process | None
    ) -> None:
        self._work, self._future, self._process, self._loop = work, future, process, loop
        self.killed, self._outcome = False, None
        self.switch_to()

    def switch_to(self) -> None:
        """The loop's thread: let this one run until it waits or ends."""
        self.paused = False
        self._go.release()
        self._back.acquire()
        if self._outcome is not None:
            self._finish(*self._outcome)

    def switch_back(self) -> None:
        """This thread: let the loop's run until it calls."""
        self.paused = True
        self._back.release()
        self._go.acquire()
        if self.killed:
            raise Killed

    def kill(self) -> None:
        if self.paused:
            self.killed = True
            self.switch_to()

    def _finish(self, result: Any, error: BaseException | None) -> None:
        self._outcome = None
        if self._process is not None:
            self._process.threads.discard(self)
        self.calls += 1
        _IDLE.append(self)
        if self._future.done() or isinstance(error, Killed):
            return
        if error is not None:
            self._future.set_exception(error)
        else:
            self._future.set_result(result)

    def _serve(self) -> None:
        _CURRENT.thread = self
        while True:
            self._go.acquire()
            try:
                self._outcome = (self._work(), None)
            except BaseException as e:
                self._outcome = (None, e)
            self._back.release()


class StepLock:
    """In place of `threading.Lock` in blocking code: who waits for it lets the loop go on."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._held = False
        self._waiting: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        while self._held:
            self._loop.wait(self._waiting.append)
        self._held = True

    def __exit__(self, *_: object) -> None:
        self._held = False
        waiting, self._waiting = self._waiting, []
        for resume in waiting:
            self._loop.call_soon(resume)


class Process:
    """What dies at once: the tasks and threads of one simulated program."""

    def __init__(self, name: str, on_crash: Callable[[str, BaseException], None]) -> None:
        self.name = name
        self.alive = True
        self.threads: set[_Thread] = set()
        self.tasks: set[asyncio.Task[Any]] = set()
        """All that run in its context."""
        self._context = contextvars.copy_context()
        self._context.run(PROCESS.set, self)
        self._on_crash = on_crash

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coroutine, context=self._context)
        task.add_done_callback(self._done)
        return task

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls it as code of this process, whose tasks it may create."""
        return self._context.run(function, *args)

    def kill(self) -> None:
        """SIGKILL: nothing of it runs any more. What it had sent is on its way."""
        self.alive = False
        for task in list(self.tasks):
            task.cancel()
        for thread in list(self.threads):
            thread.kill()

    def _done(self, task: asyncio.Task[Any]) -> None:
        if self.alive and not task.cancelled() and (error := task.exception()) is not None:
            self._on_crash(self.name, error)
