"""Ranks in processes of their own that form a process group while something is in their way."""

from __future__ import annotations

import logging
import multiprocessing.queues
import signal
import socket
from collections.abc import Sequence
from typing import Any

from starcoder_trainer.contract.assignment import Layout
from starcoder_trainer.environment import set_environment
from tests.support.trainer import _context

SECONDS = 30.0


class Ranks:
    """`failures` tries of rank `faulty` break, `absent` ones never come. What each rank says: ("log", rank, line) and
    ("end", rank, outcome)."""

    def __init__(
        self,
        ranks: int,
        listener: socket.socket,
        *,
        faulty: int = -1,
        failures: int = 0,
        hand_over: bool = True,
        absent: Sequence[int] = (),
        seconds: float = SECONDS,
    ) -> None:
        set_environment()
        _context.set_forkserver_preload(["starcoder_trainer.preload"])
        self.said: multiprocessing.queues.Queue[tuple[str, int, Any]] = _context.Queue()
        port = listener.getsockname()[1]
        self._processes = [
            _context.Process(
                target=_form,
                args=(
                    self.said,
                    rank,
                    ranks,
                    port,
                    listener if rank == 0 and hand_over else None,
                    failures if rank == faulty else 0,
                    seconds,
                ),
                daemon=True,
            )
            for rank in range(ranks)
            if rank not in absent
        ]
        for process in self._processes:
            process.start()

    def until(self, kind: str) -> tuple[int, Any]:
        """(rank, what) of the next that is said of that kind."""
        while True:
            found, rank, what = self.said.get(timeout=240)
            if found == kind:
                return rank, what

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


class _Told(logging.Handler):
    def __init__(self, said: Any, rank: int) -> None:
        super().__init__()
        self._said, self._rank = said, rank

    def emit(self, record: logging.LogRecord) -> None:
        self._said.put(("log", self._rank, record.getMessage()))


def _form(
    said: Any, rank: int, ranks: int, port: int, listener: socket.socket | None, failures: int, seconds: float
) -> None:
    import torch
    import torch.distributed as dist

    from starcoder_trainer import process_group
    from starcoder_trainer.devices import take_device
    from starcoder_trainer.model import cpu

    logging.getLogger("starcoder_trainer").addHandler(_Told(said, rank))
    join, left = dist.init_process_group, failures

    def breaks(*args: Any, **more: Any) -> None:
        nonlocal left
        if left:
            left -= 1
            raise RuntimeError("connection reset by peer")
        join(*args, **more)

    process_group.dist.init_process_group = breaks
    backend = take_device(rank)
    cpu.prepare()
    meeting = process_group.Meeting(
        rank, Layout(1, 1, ranks), "127.0.0.1", port, f"test-{port}", "127.0.0.1",
        listener.detach() if listener is not None else None,
    )  # fmt: skip
    try:
        process_group.form(meeting, seconds, backend)
        one = torch.ones(1)
        dist.all_reduce(one)
        said.put(("end", rank, one.item()))
    except Exception as e:
        said.put(("end", rank, f"{type(e).__name__}: {e}"))
    signal.pause()  # nobody leaves while another is in a collective; the test kills us
