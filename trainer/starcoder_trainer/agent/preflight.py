"""What a leader does while the gang holds: all that can fail for a reason outside, before an attempt is spent."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass

from starcoder_trainer.agent.committer import verified
from starcoder_trainer.agent.ledger import CheckpointLost, Claimed, Fenced, Foreign, Ledger, reference
from starcoder_trainer.agent.problems import problem, storage_problem
from starcoder_trainer.contract.assignment import Offer
from starcoder_trainer.contract.config import TrainingConfig
from starcoder_trainer.contract.report import Problem, Verified
from starcoder_trainer.data.errors import DataError
from starcoder_trainer.storage.store import ObjectStore, StorageError

log = logging.getLogger(__name__)

OpenStore = Callable[[str], ObjectStore]
CheckData = Callable[[TrainingConfig, OpenStore], None]
"""Raises DataError where tokenizer or data are missing, broken or disagree."""


class Hindered(Exception):
    """Something outside must be mended first."""

    def __init__(self, found: Problem) -> None:
        super().__init__(found.message)
        self.problem = found


class FencedByHead(Exception):
    def __init__(self, by: int) -> None:
        super().__init__(f"HEAD belongs to attempt {by}")
        self.by = by


@dataclass(frozen=True)
class Place:
    """Where the gang meets and where it starts. `listener` is bound and listens already."""

    offer: Offer
    verified: Verified | None
    listener: socket.socket


def check(config: TrainingConfig, open_store: OpenStore, check_data: CheckData) -> None:
    """Credentials, bucket, tokenizer and data, in this order.

    Raises:
        Hindered: with the first that is wrong.
    """
    try:
        # One listing meets every way in which credentials, endpoint and bucket can be wrong.
        next(iter(open_store(config.checkpoint.uri).list("HEAD")), None)
        check_data(config, open_store)
    except StorageError as e:
        raise Hindered(storage_problem(e)) from e
    except DataError as e:
        raise Hindered(problem(e.reason, str(e))) from e


def claim(
    attempt: int,
    config: TrainingConfig,
    ledger: Ledger,
    uri: str,
    address: str,
    *,
    answered: Callable[[], None] = lambda: None,
) -> Place:
    """Claims HEAD, adopts what the attempt before left whole, chooses the checkpoint, binds the port.

    Args:
        answered: told when HEAD is ours, so that the store is there; what comes then can take long.

    Raises:
        Hindered: storage, another run's HEAD, or no intact checkpoint.
        FencedByHead: the attempt is over before it began.
    """
    try:
        match ledger.claim(attempt, config.checkpoint.resume):
            case Fenced(by):
                raise FencedByHead(by)
            case Foreign(message=message):
                raise Hindered(problem("CheckpointForeign", message))
            case Claimed() as claimed:
                answered()
                adopted = ledger.adopt(claimed)
                if isinstance(adopted, Fenced) and adopted.by < attempt:  # somebody has put HEAD back
                    return claim(attempt, config, ledger, uri, address, answered=answered)
                if isinstance(adopted, Fenced):
                    raise FencedByHead(adopted.by)
                chosen = ledger.choose(adopted)
    except StorageError as e:
        raise Hindered(storage_problem(e)) from e
    except CheckpointLost as e:
        raise Hindered(problem("CheckpointLost", str(e))) from e
    listener = listen(address)
    entry = chosen.entry
    return Place(
        offer=Offer(address, listener.getsockname()[1], reference(entry) if entry else None),
        verified=verified(entry, uri) if entry else None,
        listener=listener,
    )


def listen(address: str) -> socket.socket:
    """A port of the system's choice on every interface: bound before anybody is told of it, so nobody can take it."""
    family, host = (socket.AF_INET6, "::") if ":" in address else (socket.AF_INET, "0.0.0.0")  # noqa: S104
    return socket.create_server((host, 0), family=family, backlog=1024)
