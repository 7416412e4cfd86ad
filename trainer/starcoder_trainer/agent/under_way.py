"""Checkpoints on their way: from the first save of a local rank until they are verified, given up or refused."""

from __future__ import annotations

from starcoder_trainer.agent.messages import Upload
from starcoder_trainer.contract.worker import Saved


class UnderWay:
    def __init__(self) -> None:
        self._saves: dict[tuple[int, int], dict[int, Saved]] = {}
        self._pending: set[tuple[int, int]] = set()
        """(attempt, step) handed to the uploader and, on the leader, the committer."""
        self._uploading: set[tuple[int, int]] = set()
        """(attempt, step) handed to the uploader alone."""

    def saved(self, message: Saved, ranks: frozenset[int], world_size: int) -> Upload | None:
        """What is to be uploaded, once the last of the local `ranks` has saved."""
        key = (message.attempt, message.step)
        saved = self._saves.setdefault(key, {})
        saved[message.rank] = message
        if saved.keys() < ranks or key in self._pending:
            return None
        # A step that not all local ranks saved by now never will be: ranks save in order.
        self._saves = {k: v for k, v in self._saves.items() if k[0] == key[0] and k[1] > key[1]}
        self._pending.add(key)
        self._uploading.add(key)
        return Upload(*key, world_size, tuple(saved[r] for r in sorted(saved)))

    def uploaded(self, attempt: int, step: int) -> None:
        self._uploading.discard((attempt, step))

    def given_up(self, attempt: int, step: int) -> None:
        self._uploading.discard((attempt, step))
        self._pending.discard((attempt, step))

    def settled(self, attempt: int, step: int) -> None:
        """Steps up to `step` need no upload and no commit any more."""
        self._pending = {(a, s) for a, s in self._pending if a != attempt or s > step}

    def fenced(self, attempt: int) -> None:
        """Nobody commits for attempts up to this one any more."""
        self._pending = {(a, s) for a, s in self._pending if a > attempt}

    def has(self, attempt: int) -> bool:
        """One of that attempt is on its way."""
        return any(a == attempt for a, _ in self._pending)

    @property
    def uploads(self) -> bool:
        """The uploader is at work."""
        return bool(self._uploading)
