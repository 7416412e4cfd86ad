"""The work queue in virtual time: the loop's clock jumps to the next timer whenever nothing is left to do."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any

import pytest

from starcoder_operator.workqueue import Backoff, WorkQueue


class Deadlock(AssertionError):
    """Everything waits and no timer is set."""


class _NoWaiting(selectors.DefaultSelector):
    """Instead of waiting for a timer, moves the clock."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise Deadlock
            self.now += timeout
        return ready


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.virtual = _NoWaiting()
        super().__init__(self.virtual)

    def time(self) -> float:
        return self.virtual.now


def in_virtual_time(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=_VirtualLoop) as runner:
        runner.run(main)


def now() -> float:
    return asyncio.get_running_loop().time()


class Passes:
    """A handler that takes `duration` seconds a pass and answers what it is told to."""

    def __init__(self, duration: float = 0.0, answers: dict[str, list[float | Exception | None]] | None = None) -> None:
        self.duration = duration
        self.answers = answers or {}
        self.began: list[tuple[str, float]] = []
        self.running: dict[str, int] = {}
        self.most_at_once = 0
        self.most_of_one_key = 0

    async def __call__(self, key: str) -> float | None:
        self.began.append((key, now()))
        self.running[key] = self.running.get(key, 0) + 1
        self.most_of_one_key = max(self.most_of_one_key, self.running[key])
        self.most_at_once = max(self.most_at_once, sum(self.running.values()))
        try:
            await asyncio.sleep(self.duration)
        finally:
            self.running[key] -= 1
        answer = self.answers[key].pop(0) if self.answers.get(key) else None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def times(self, key: str) -> list[float]:
        return [at for k, at in self.began if k == key]


def queue_of(passes: Passes, workers: int = 4, **options: Any) -> WorkQueue[str]:
    queue = WorkQueue(passes, workers=workers, chance=lambda: 0.0, **options)
    queue.start()
    return queue


def test_a_key_added_often_before_its_pass_is_handled_once() -> None:
    async def main() -> None:
        passes = Passes()
        queue = queue_of(passes)
        for _ in range(5):
            queue.add("a")
        assert queue.depth == 1
        await asyncio.sleep(1)
        assert passes.times("a") == [0.0]
        await queue.stop(1)

    in_virtual_time(main())


def test_a_key_added_during_its_pass_is_handled_once_more_after_it() -> None:
    async def main() -> None:
        passes = Passes(duration=10)
        queue = queue_of(passes)
        queue.add("a")
        await asyncio.sleep(1)
        for _ in range(3):
            queue.add("a")
        await asyncio.sleep(60)
        assert passes.times("a") == [0.0, 10.0]
        assert passes.most_of_one_key == 1
        await queue.stop(1)

    in_virtual_time(main())


def test_never_more_passes_at_once_than_workers() -> None:
    async def main() -> None:
        passes = Passes(duration=10)
        queue = queue_of(passes, workers=2)
        for key in "abcde":
            queue.add(key)
        await asyncio.sleep(0)
        await asyncio.sleep(100)
        assert passes.most_at_once == 2
        assert [at for _, at in passes.began] == [0, 0, 10, 10, 20]
        await queue.stop(1)

    in_virtual_time(main())


def test_a_slow_key_holds_up_no_other() -> None:
    async def main() -> None:
        passes = Passes(duration=1000)
        queue = queue_of(passes, workers=2)
        queue.add("slow")
        await asyncio.sleep(1)
        passes.duration = 0
        queue.add("fast")
        await asyncio.sleep(1)
        assert passes.times("fast") == [1.0]
        await queue.stop(0)

    in_virtual_time(main())


def test_a_pass_says_when_to_look_again() -> None:
    async def main() -> None:
        passes = Passes(answers={"a": [5.0, 7.0, None]})
        queue = queue_of(passes)
        queue.add("a")
        await asyncio.sleep(1000)
        assert passes.times("a") == [0.0, 5.0, 12.0]
        await queue.stop(1)

    in_virtual_time(main())


def test_of_two_delays_the_earlier_wins_whichever_came_first() -> None:
    async def main() -> None:
        passes = Passes()
        queue = queue_of(passes)
        queue.add_after("a", 30)
        queue.add_after("a", 10)
        queue.add_after("b", 10)
        queue.add_after("b", 30)
        await asyncio.sleep(1000)
        assert passes.times("a") == [10.0]
        assert passes.times("b") == [10.0]
        await queue.stop(1)

    in_virtual_time(main())


def test_an_event_makes_a_delayed_pass_happen_now_and_not_again_later() -> None:
    async def main() -> None:
        passes = Passes()
        queue = queue_of(passes)
        queue.add_after("a", 30)
        await asyncio.sleep(5)
        queue.add("a")
        await asyncio.sleep(1000)
        assert passes.times("a") == [5.0]
        await queue.stop(1)

    in_virtual_time(main())


def test_failures_are_repeated_with_growing_delays_up_to_a_limit_and_success_starts_over() -> None:
    async def main() -> None:
        broken = [ValueError(str(i)) for i in range(4)]
        passes = Passes(answers={"a": [*broken, 100.0, ValueError("again")]})
        told: list[float] = []
        queue = queue_of(
            passes, backoff=Backoff(first=1, longest=5), on_failure=lambda key, error, delay: told.append(delay)
        )
        queue.add("a")
        await asyncio.sleep(1000)
        assert told == [1, 2, 4, 5, 1]
        assert passes.times("a") == [0, 1, 3, 7, 12, 112, 113]
        await queue.stop(1)

    in_virtual_time(main())


def test_a_failing_key_does_not_stop_the_worker() -> None:
    async def main() -> None:
        passes = Passes(answers={"bad": [RuntimeError()]})
        queue = queue_of(passes, workers=1)
        queue.add("bad")
        queue.add("good")
        await asyncio.sleep(10)
        assert passes.times("good") == [0.0]
        await queue.stop(1)

    in_virtual_time(main())


def test_the_server_may_ask_for_a_longer_delay() -> None:
    async def main() -> None:
        busy = RuntimeError("429")
        busy.retry_after = 20.0  # type: ignore[attr-defined]
        passes = Passes(answers={"a": [busy]})
        queue = queue_of(passes)
        queue.add("a")
        await asyncio.sleep(100)
        assert passes.times("a") == [0.0, 20.0]
        await queue.stop(1)

    in_virtual_time(main())


@pytest.mark.parametrize("failures", [1, 2, 10, 10_000])
def test_jitter_takes_off_at_most_half_of_a_delay(failures: int) -> None:
    backoff = Backoff(first=0.5, longest=30)
    whole = backoff.delay(failures, 0.0)
    assert backoff.delay(failures, 0.999) == pytest.approx(whole / 2, rel=0.01)
    assert whole <= 30


def test_depth_and_age_tell_of_keys_that_wait_or_hang() -> None:
    async def main() -> None:
        passes = Passes(duration=50)
        queue = queue_of(passes, workers=1)
        assert queue.oldest == 0
        queue.add("a")
        await asyncio.sleep(5)
        queue.add("b")
        await asyncio.sleep(5)
        assert (queue.depth, queue.oldest) == (1, 10)
        await asyncio.sleep(45)
        assert (queue.depth, queue.oldest) == (0, 5)
        await asyncio.sleep(100)
        assert (queue.depth, queue.oldest) == (0, 0)
        await queue.stop(1)

    in_virtual_time(main())


def test_stop_lets_passes_end_takes_no_keys_and_cuts_what_takes_too_long() -> None:
    async def main() -> None:
        passes = Passes(duration=10)
        queue = queue_of(passes, workers=1)
        queue.add("a")
        queue.add("b")
        queue.add_after("c", 1)
        await asyncio.sleep(5)
        await queue.stop(grace=30)
        assert now() == 10.0
        queue.add("d")
        await asyncio.sleep(100)
        assert [key for key, _ in passes.began] == ["a"]

        hanging = Passes(duration=10_000)
        queue = queue_of(hanging, workers=1)
        queue.add("a")
        await asyncio.sleep(1)
        before = now()
        await queue.stop(grace=30)
        assert now() == before + 30
        assert hanging.running["a"] == 0

    in_virtual_time(main())
