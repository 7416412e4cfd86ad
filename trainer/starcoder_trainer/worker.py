"""One worker process: joins the gang, builds or loads its part of the model, trains, saves, says how it ended."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from starcoder_trainer.contract import exits, names
from starcoder_trainer.contract.config import TrainingConfig
from starcoder_trainer.contract.stamp import Stamp, StampFile
from starcoder_trainer.contract.worker import (
    Collective,
    Exited,
    Leave,
    Message,
    Saved,
    Start,
    Started,
    Step,
    decode_line,
    encode_line,
)

from . import witness
from .failures import failure_of
from .pace import Pace
from .storage.open import open_store
from .storage.store import ObjectStore

if TYPE_CHECKING:  # heavy: imported in the worker, after the environment is set
    from .loop import Samples, StepDone, Training
    from .process_group import Meeting

log = logging.getLogger(__name__)

ENV_ALLOW_FILE = "STARCODER_ALLOW_FILE"
"""`1`: URIs may be file:// (local runs only)."""
ENV_CREDENTIALS_DIR = "STARCODER_CREDENTIALS_DIR"
ENV_FORMATION_SECONDS = "STARCODER_FORMATION_SECONDS"
"""How long a worker waits for the whole gang."""
FORMATION_SECONDS = 120.0
_CHUNK = 1 << 16

OpenStore = Callable[[str], ObjectStore]
OpenSamples = Callable[[TrainingConfig, OpenStore, Path], "Samples"]
"""(configuration, from a URI to its store, folder for the cache)"""


def open_samples(config: TrainingConfig, open_uri: OpenStore, cache: Path) -> Samples:
    """The run's data."""
    from .data.dataset import open_dataset

    return open_dataset(config, open_uri, cache)


class Worker:
    """State that the failure report needs, and the channel to the agent."""

    def __init__(
        self, start: Start, rank: int, channel: socket.socket, listen_fd: int | None, samples: OpenSamples
    ) -> None:
        self.start = start
        self.rank = rank
        self.iteration: int | None = None
        self._channel = channel
        self._listen_fd = listen_fd
        self._open_samples = samples
        self._checkpoint_seconds = 0.0
        self._incoming = b""
        self._leave = False
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        with self._sending:
            self._channel.sendall(encode_line(message))

    def tell_collective(self, under_way: bool, what: str) -> None:
        """From the witness's thread."""
        self.send(Collective(self.start.attempt, self.rank, under_way, what))

    def run(self) -> int:
        """Exit code. Never raises: what went wrong is sent as `Exited` and printed with its stack."""
        attempt, code, failure, left_at = self.start.attempt, exits.OK, None, None
        try:
            config = TrainingConfig.from_dict(self.start.config)
            reached = self._train(config)
            left_at = reached if reached < config.training.iterations else None
        except BaseException as e:
            traceback.print_exc()
            failure = failure_of(e, self.rank, self.iteration)
            assert failure.exit_code is not None
            code = failure.exit_code
        self.send(Exited(attempt, self.rank, code, failure, left_at))
        return code

    def _train(self, config: TrainingConfig) -> int:
        """Iterations done when it ended well."""
        # Heavy: in a fork they are there already, in a spawned worker this is the import.
        import torch
        import torch.distributed as dist

        from . import preload
        from .assemble import assemble, attention_backend
        from .checkpoint.index import read_index
        from .checkpoint.load import load
        from .devices import take_device
        from .loop import Training, train
        from .model import cpu
        from .process_group import form

        assert preload
        pace = Pace(self.start.attempt, config.hang, self._stamps())
        pace.enter("form")
        backend = take_device(self.start.ranks.index(self.rank))
        cpu.prepare()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        timings = _Timings()
        checkpoint = self.start.checkpoint
        # What is asked of the store comes while the gang forms and the model is built.
        stores, reading = self._stores(config), ThreadPoolExecutor(2, "reading")
        opened = reading.submit(self._open_samples, config, stores, Path(self.start.scratch) / "data")
        store = stores(config.checkpoint.uri)
        index = reading.submit(read_index, store, checkpoint) if checkpoint is not None else None
        form(self._meeting(config), float(os.environ.get(ENV_FORMATION_SECONDS, FORMATION_SECONDS)), backend)
        timings.lap("formed")
        formed = time.monotonic()
        pace.formed(checkpoint.step if checkpoint else 0)
        pace.enter("build")
        model, optimizer = assemble(config, fresh=checkpoint is None)
        timings.lap("built")
        position = None
        if checkpoint is not None and index is not None:
            pace.enter("load")
            scratch = Path(self.start.scratch)
            position = load(config, model, optimizer, store, checkpoint, index=index.result(), scratch=scratch)
            timings.lap("loaded")
        pace.enter("open")
        samples = opened.result()
        reading.shutdown(wait=False)
        timings.lap("data opened")
        training = Training(config, model, optimizer, samples, position.iteration if position else 0)
        self.iteration = training.iteration
        begins = (training.iteration, config.training.iterations, self.start.attempt, self.start.layout)
        log.info("iteration %d of %d; attempt %d, %s; %s", *begins, timings)
        attention, _ = attention_backend(config)
        loading = time.monotonic() - formed
        self.send(Started(self.start.attempt, self.rank, training.iteration, attention, loading))

        def save(last: bool) -> None:
            pace.enter("checkpoint")
            self._save(training, last)

        train(training, self._on_step(config), save, self._asked_to_leave, pace)
        pace.enter("leave")
        # Nobody leaves while a neighbour still waits for its part of the last collective.
        dist.barrier()
        return training.iteration

    def _asked_to_leave(self) -> bool:
        """Whether `Leave` has come over the channel; once it has, it has for good."""
        with contextlib.suppress(BlockingIOError):
            while data := self._channel.recv(_CHUNK, socket.MSG_DONTWAIT):
                *lines, self._incoming = (self._incoming + data).split(b"\n")
                self._leave |= any(isinstance(decode_line(line), Leave) for line in lines)
        return self._leave

    def _stamps(self) -> Callable[[Stamp], None]:
        if not self.start.stamps:
            return lambda _: None
        return StampFile(Path(self.start.stamps), self.rank).write

    def _meeting(self, config: TrainingConfig) -> Meeting:
        from .process_group import Meeting

        return Meeting(
            rank=self.rank,
            layout=self.start.layout,
            address=self.start.master_address,
            port=self.start.master_port,
            key_prefix=f"{config.run.uid}/{self.start.attempt}",
            interface_address=self.start.interface_address,
            listen_fd=self._listen_fd,
        )

    @staticmethod
    def _stores(config: TrainingConfig) -> OpenStore:
        """Each store is opened once, so that its connections serve all who ask it."""
        credentials = Path(os.environ.get(ENV_CREDENTIALS_DIR, names.CREDENTIALS_DIR))
        allow_file = os.environ.get(ENV_ALLOW_FILE) == "1"
        return functools.cache(lambda uri: open_store(uri, config.storage, credentials, allow_file))

    def _save(self, training: Training, last: bool) -> None:
        from .checkpoint.write import write

        began, step, attempt = time.monotonic(), training.iteration, self.start.attempt
        scratch = Path(self.start.scratch)
        directory, size = write(training, self.start.layout, attempt=attempt, rank=self.rank, scratch=scratch)
        seconds = time.monotonic() - began
        self._checkpoint_seconds += seconds
        self.send(Saved(attempt, self.rank, step, str(directory), seconds, size, last))

    def _on_step(self, config: TrainingConfig) -> Callable[[StepDone], None]:
        """Called after each iteration; the lowest rank of the Pod tells the agent."""
        import torch

        from .metrics import flops_per_token, peak_flops, utilisation

        schedule, sequence = config.training, config.data.sequence_length
        flops = flops_per_token(config.model, sequence)
        peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        speaks = self.rank == min(self.start.ranks)
        since_logged: list[float] = []
        resumed, data_seconds = self.iteration or 0, 0.0

        def on_step(done: StepDone) -> None:
            nonlocal data_seconds
            self.iteration = done.iteration
            data_seconds += done.seconds["data"]
            since_logged.append(done.seconds["total"])
            # The first one tells how long it took to train again, however seldom the others are logged.
            always = done.iteration in (resumed + 1, schedule.iterations)
            if not speaks or (done.iteration % schedule.log_every_iterations and not always):
                return
            rate = len(since_logged) * schedule.global_batch_size * sequence / sum(since_logged)
            since_logged.clear()
            log.info(
                "iteration %d/%d | loss %r | learning rate %.3e | gradient norm %.4f | %.0f tokens/s | %.3f s",
                done.iteration,
                schedule.iterations,
                done.loss,  # all digits: two runs can be compared by their logs
                done.learning_rate,
                done.grad_norm,
                rate,
                done.seconds["total"],
            )
            consumed = done.iteration * schedule.global_batch_size
            self.send(
                Step(
                    attempt=self.start.attempt,
                    rank=self.rank,
                    iteration=done.iteration,
                    consumed_samples=consumed,
                    consumed_tokens=consumed * sequence,
                    loss=done.loss,
                    learning_rate=done.learning_rate,
                    grad_norm=done.grad_norm,
                    tokens_per_second=rate,
                    seconds=done.seconds,
                    model_flops_utilisation=utilisation(flops, rate, self.start.layout.world_size, peak),
                    data_seconds=data_seconds,
                    checkpoint_seconds=self._checkpoint_seconds,
                )
            )

        return on_step


class _Timings:
    """Seconds of each stage of a start, for one log line."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._laps: list[str] = []

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._laps.append(f"{name} in {now - self._since:.2f} s")
        self._since = now

    def __str__(self) -> str:
        return ", ".join(self._laps)


def enter(
    start: Start, rank: int, channel: socket.socket, listen_fd: int | None, samples: OpenSamples = open_samples
) -> int:
    """The process is a worker from here on, forked or spawned. Returns its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", force=True)
    worker = Worker(start, rank, channel, listen_fd, samples)
    witness.stand_by(worker.tell_collective)
    return worker.run()


def main() -> int:
    """Spawned: `python -m starcoder_trainer.worker RANK CHANNEL_FD [LISTEN_FD]`; `Start` is the first line."""
    from .processes import die_before_parent, die_with_parent

    die_with_parent(os.getppid())
    die_before_parent()
    rank, channel_fd, *rest = map(int, sys.argv[1:])
    channel = socket.socket(fileno=channel_fd)
    with channel.makefile("rb") as lines:
        start = decode_line(lines.readline())
    assert isinstance(start, Start)
    return enter(start, rank, channel, rest[0] if rest else None)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no destructor of a process group may keep a finished worker
