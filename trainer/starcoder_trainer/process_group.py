"""Forming the gang: the store, the process group, megatron's groups."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import socket
import time
from dataclasses import dataclass

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from starcoder_trainer.contract.assignment import Layout

from .failures import FormationError

log = logging.getLogger(__name__)

TRIES = 3
"""Of forming the group, within the time that there is in all."""
PORT_SECONDS = 1.0
"""Between two tries to bind a port that is taken."""
FORMED = "formed"
MOST_SPANS = 10
"""Of ranks, in a message."""
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=15)
"""Last resort only: broken connections are noticed at once, hung peers by the operator."""


@dataclass(frozen=True)
class Meeting:
    """Where and as whom a worker joins."""

    rank: int
    layout: Layout
    address: str
    port: int
    key_prefix: str
    """Of the store's keys: run and attempt, so that a straggler of another attempt can't be taken for a member."""
    interface_address: str
    listen_fd: int | None = None
    """Rank 0: the socket that listens on (address, port) already; it is taken over."""


def form(meeting: Meeting, timeout_seconds: float, backend: str) -> None:
    """Join the process group and make megatron's groups.

    Rank order is megatron's `tp-cp-ep-dp-pp`: tensor ranks are neighbours, then data ranks, then pipeline stages; with
    a Pod's ranks consecutive, tensor parallelism stays inside it.

    Args:
        backend: as `devices.take_device` says.

    Raises:
        FormationError: not all ranks came in time, or no interface has the address.
    """
    interface = interface_of(meeting.interface_address)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without `=`, eth1 would also mean eth10
    deadline = time.monotonic() + timeout_seconds
    try:
        _form_in_tries(meeting, deadline, backend)
    except (RuntimeError, ValueError, OSError) as e:
        raise FormationError(
            f"rank {meeting.rank} of {meeting.layout.world_size} did not join at {meeting.address}:{meeting.port} "
            f"within {timeout_seconds:.0f} s over {interface}: {_short(e)}"
        ) from e


def _form_in_tries(meeting: Meeting, deadline: float, backend: str) -> None:
    store = _store(meeting, deadline)
    for number in range(TRIES):
        try:
            _try(meeting, store, number, deadline, backend)
        except (RuntimeError, ValueError, OSError) as e:
            _undo()
            if number == TRIES - 1 or time.monotonic() >= deadline:
                raise
            log.warning("try %d of %d to form the process group failed: %s", number + 1, TRIES, _short(e))
        else:
            # It formed; from here on a neighbour may be long over a save.
            dist.distributed_c10d.set_timeout(COLLECTIVE_TIMEOUT)
            return


def _store(meeting: Meeting, deadline: float) -> TCPStore:
    """Where the gang meets. As a rule rank 0's agent has bound the port already; where rank 0 has to do it itself, it
    waits for one that is taken."""
    while True:
        try:
            return TCPStore(
                meeting.address,
                meeting.port,
                meeting.layout.world_size,
                is_master=meeting.rank == 0,
                timeout=_left(deadline),
                wait_for_workers=False,
                master_listen_fd=meeting.listen_fd,
            )
        except RuntimeError as e:
            if "EADDRINUSE" not in str(e) or time.monotonic() >= deadline:
                raise
            log.warning("port %d is taken; tried again: %s", meeting.port, _short(e))
            time.sleep(PORT_SECONDS)


def _try(meeting: Meeting, store: TCPStore, number: int, deadline: float, backend: str) -> None:
    """One try of all ranks together, under keys of its own. It begins when all have come, so that a slow one costs no
    try, and has succeeded only where it did for all: a rank that failed says so, and everybody begins the next one."""
    world_size = meeting.layout.world_size
    words = PrefixStore(f"{meeting.key_prefix}/{number}", store)
    words.set(_came(meeting.rank), "")
    if words.add("came", 1) == world_size:
        words.set("all came", "")
    try:
        words.wait(["all came"], _left(deadline))
    except RuntimeError as e:
        raise RuntimeError(_who_came(meeting, words)) from e
    until = time.monotonic() + (deadline - time.monotonic()) / (TRIES - number)
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("group", words),
            rank=meeting.rank,
            world_size=world_size,
            timeout=_left(until),
        )
        dist.barrier()
        form_model_parallel(meeting.layout)
    except (RuntimeError, ValueError, OSError) as e:
        words.set("verdict", f"rank {meeting.rank} failed: {_short(e)}")
        raise
    if words.add("formed", 1) == world_size:
        words.set("verdict", FORMED)
    words.wait(["verdict"], _left(until))
    if (verdict := words.get("verdict").decode()) != FORMED:
        raise RuntimeError(verdict)
    if words.add("knows", 1) == world_size:
        words.set("all know", "")
    if meeting.rank == 0:
        with contextlib.suppress(RuntimeError):  # the store is rank 0's: it must not go before all know
            words.wait(["all know"], _left(until))


def _came(rank: int) -> str:
    return f"came/{rank}"


def _who_came(meeting: Meeting, words: PrefixStore) -> str:
    """How many ranks, and from rank 0, whose process the store is in, who did not: others would ask it over the network
    for each rank."""
    world_size = meeting.layout.world_size
    told = f"{words.add('came', 0)} of {world_size} ranks came"
    if meeting.rank != 0:
        return told
    absent = spans([rank for rank in range(world_size) if not words.check([_came(rank)])])
    return f"{told}, not {absent}; look at their Pods' worker logs and at the network between them" if absent else told


def spans(numbers: list[int]) -> str:
    """Of ascending numbers: `3, 8-15`. The first ten."""
    found: list[list[int]] = []
    for n in numbers:
        if found and found[-1][1] == n - 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    told = [str(first) if first == last else f"{first}-{last}" for first, last in found[:MOST_SPANS]]
    return ", ".join(told) + (", …" if len(found) > MOST_SPANS else "")


def _undo() -> None:
    """What is left of a try that failed; nothing of it is used again, whether or not it can be taken down well."""
    from megatron.core import parallel_state

    with contextlib.suppress(Exception):
        parallel_state.destroy_model_parallel()
    with contextlib.suppress(Exception):
        dist.destroy_process_group()
    # Names of groups are numbers, which ranks have to count alike: of a try that failed some may have counted more.
    dist.distributed_c10d._world.group_count = 0


def _left(until: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=max(1.0, until - time.monotonic()))


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def form_model_parallel(layout: Layout) -> None:
    """megatron's groups and random number tracker; the process group must be there."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        distributed_timeout_minutes=int(COLLECTIVE_TIMEOUT.total_seconds() // 60),
        create_gloo_process_groups=False,
    )
    # Modules look for the tracker's stream when made; each micro-batch seeds it anew.
    tensor_parallel.get_cuda_rng_tracker().reset()
    tensor_parallel.get_cuda_rng_tracker().add("model-parallel-rng", 0)


def interface_of(address: str) -> str:
    """Name of the network interface that has this IP address.

    Raises:
        FormationError: none has it.
    """
    import psutil

    found = []
    for name, addresses in psutil.net_if_addrs().items():
        for a in addresses:
            if a.family in (socket.AF_INET, socket.AF_INET6):
                ip = a.address.partition("%")[0]
                found.append(ip)
                if ip == address:
                    return str(name)
    raise FormationError(f"no network interface has {address}, found {', '.join(found)}; expected the Pod's own IP")
