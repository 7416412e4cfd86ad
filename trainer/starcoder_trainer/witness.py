"""What a worker can still tell when it hangs: the stacks of all threads, and the collective that it waits in.

Both are asked for by a signal and answered without the main thread, which may be stuck inside a library.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

STACKS = signal.SIGUSR1
"""Stacks to stderr, by faulthandler: needs no lock of the interpreter."""
COLLECTIVE = signal.SIGUSR2
"""The last collective, by a thread that waits for this signal: needs the interpreter's lock."""

Tell = Callable[[bool, str], None]
"""(whether a collective is under way, a sentence about the last one)"""


def stand_by(tell: Tell) -> None:
    """Call it in the main thread before other threads start: they inherit that COLLECTIVE is blocked."""
    faulthandler.enable()
    faulthandler.register(STACKS, all_threads=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {COLLECTIVE})
    threading.Thread(target=_answer, args=(tell,), name="witness", daemon=True).start()


def _answer(tell: Tell) -> None:
    while True:
        signal.sigwait({COLLECTIVE})
        try:
            found = last_collective(_flight_record(), time.time_ns())
            if found is not None:
                tell(*found)
        except Exception as e:  # a witness must not end the process that it watches
            log.warning("the last collective is not known: %s", e)


def _flight_record() -> dict[str, Any]:
    """What torch's flight recorder has kept; empty before torch is there."""
    if "torch.distributed" not in sys.modules:
        return {}
    import torch
    from torch._C import _distributed_c10d as c10d

    dump: Callable[..., bytes] = getattr(
        c10d, "_dump_nccl_trace_json" if torch.cuda.is_available() else "_dump_fr_trace_json"
    )
    record: dict[str, Any] = json.loads(dump(includeCollectives=True, onlyActive=False))
    return record


def last_collective(record: dict[str, Any], now_ns: int) -> tuple[bool, str] | None:
    """(whether it is under way, a sentence) of the oldest collective that has not ended, else of the newest; None where
    none was recorded. `record` is torch's flight record (version 2), `now_ns` by the wall clock."""
    entries = record.get("entries") or []
    if not entries:
        return None
    under_way = [e for e in entries if not e.get("retired") and e.get("state") != "completed"]
    entry = under_way[0] if under_way else entries[-1]
    name = entry.get("profiling_name", "a collective")
    group, description = (*entry.get("process_group", ["?", ""]), "")[:2]
    point_to_point = entry.get("is_p2p")
    number = entry.get("p2p_seq_id" if point_to_point else "collective_seq_id", "?")
    sizes = entry.get("input_sizes", [])
    seconds = max(0.0, (now_ns - entry.get("time_created_ns", now_ns)) / 1e9)
    what = f"{name} number {number} of group {description or group}, sizes {sizes}"
    if under_way:
        return True, f"waits since {seconds:.0f} s in {what}"
    return False, f"is in no collective; its last, {seconds:.0f} s ago, was {what}"
