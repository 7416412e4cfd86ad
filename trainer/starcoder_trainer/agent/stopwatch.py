"""Where the seconds of an agent's present attempt went, from the moments at which its workers were heard."""

from __future__ import annotations

from starcoder_trainer.contract.report import Spent

DIGITS = 3
"""Of a second: a report is read by people too, and written every few seconds."""


class Stopwatch:
    """One attempt at a time; `now` is in seconds of any clock that only goes forward."""

    def __init__(self, now: float) -> None:
        self.start(now)

    def start(self, now: float) -> None:
        """Workers of another attempt are asked for."""
        self._asked = self._trains_since = self._last = now
        self._loading = self._data = self._checkpoint = 0.0
        self._first: float | None = None

    def started(self, now: float, loading: float) -> Spent:
        """A rank is ready to train; the last one counts.

        Args:
            loading: seconds since the process group formed.
        """
        self._trains_since = self._last = now
        self._loading = min(max(loading, self._loading), now - self._asked)
        return self.spent

    def stepped(self, now: float, data: float, checkpoint: float) -> Spent:
        """An iteration was logged.

        Args:
            data: seconds of all iterations so far that were spent waiting for samples.
            checkpoint: the same, standing still for checkpoints.
        """
        self._last, self._data, self._checkpoint = now, data, checkpoint
        if self._first is None:
            self._first = now - self._trains_since
        return self.spent

    def done(self, now: float) -> Spent:
        """The last checkpoint is verified: what came after the last iteration was spent on it."""
        self._checkpoint += now - self._last
        self._last = now
        return self.spent

    @property
    def spent(self) -> Spent:
        trained = self._last - self._trains_since
        data = min(self._data, trained)
        checkpoint = min(self._checkpoint, trained - data)
        return Spent(
            forming=round(self._trains_since - self._asked - self._loading, DIGITS),
            loading=round(self._loading, DIGITS),
            data=round(data, DIGITS),
            checkpoint=round(checkpoint, DIGITS),
            compute=round(trained - data - checkpoint, DIGITS),
            first_iteration=None if self._first is None else round(self._first, DIGITS),
        )
