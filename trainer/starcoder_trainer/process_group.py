"""Forming the gang: the store, the process group, megatron's groups."""

from __future__ import annotations

import datetime
import os
import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from starcoder_trainer.contract.assignment import Layout

from .failures import ConfigurationError, FormationError

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
    local_index: int
    """Position among the workers of this Pod: its CUDA device."""
    listen_fd: int | None = None
    """Rank 0: the socket that listens on (address, port) already; it is taken over."""


def form(meeting: Meeting, timeout_seconds: float) -> None:
    """Join the process group and make megatron's groups.

    Rank order is megatron's `tp-cp-ep-dp-pp`: tensor ranks are neighbours, then data ranks, then pipeline stages; with
    a Pod's ranks consecutive, tensor parallelism stays inside it.

    Raises:
        FormationError: not all ranks came in time, or no interface has the address.
        ConfigurationError: there are fewer CUDA devices than workers in this Pod.
    """
    interface = interface_of(meeting.interface_address)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without `=`, eth1 would also mean eth10
    cuda = torch.cuda.is_available()
    if cuda:
        found = torch.cuda.device_count()
        if meeting.local_index >= found:
            raise ConfigurationError(
                f"workers.gpusPerWorker: found {found} CUDA devices in this Pod, expected at least "
                f"{meeting.local_index + 1}"
            )
        torch.cuda.set_device(meeting.local_index)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    try:
        store = TCPStore(
            meeting.address,
            meeting.port,
            meeting.layout.world_size,
            is_master=meeting.rank == 0,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=meeting.listen_fd,
        )
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=PrefixStore(meeting.key_prefix, store),
            rank=meeting.rank,
            world_size=meeting.layout.world_size,
            timeout=timeout,
        )
        dist.barrier()
        # It formed; from here on a neighbour may be long over a save.
        dist.distributed_c10d.set_timeout(COLLECTIVE_TIMEOUT)
        form_model_parallel(meeting.layout)
    except (RuntimeError, ValueError, OSError) as e:
        raise FormationError(
            f"rank {meeting.rank} of {meeting.layout.world_size} did not join at {meeting.address}:{meeting.port} "
            f"within {timeout_seconds:.0f} s over {interface}: {' '.join(str(e).split())[:400]}"
        ) from e


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
