"""Processes of `prepare`: Ctrl-C is for their parent alone, and none outlives it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

from starcoder_trainer.processes import die_with_parent


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes started within don't get SIGINT; what comes meanwhile this one gets afterwards."""
    resource_tracker.ensure_running()  # the first child would start it, and up to Python 3.13 that unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def enter_child(parent: int, tokenizer_threads: int) -> None:
    """First thing in a process that `parent` started."""
    die_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if tokenizer_threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(tokenizer_threads)
