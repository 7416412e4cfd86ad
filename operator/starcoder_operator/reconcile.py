"""One pass over one run: observe, plan, act. What the queue calls."""

from __future__ import annotations

import logging
import time
from typing import get_args

from .act import Actor
from .adapters.errors import Conflict, KubeError, NotFound, Unavailable
from .adapters.memory import Memory
from .adapters.metrics import Metrics
from .adapters.nodes import RunKey
from .api.v1alpha1 import State
from .domain.hearing import Limits
from .domain.planner import plan
from .observe import Observer, Unreadable

log = logging.getLogger(__name__)

STATES: tuple[str, ...] = get_args(State)


class Reconciler:
    """Level-triggered: a pass may be cut anywhere and the next one comes out right, since it reads what is there."""

    def __init__(self, *, observe: Observer, act: Actor, memory: Memory, metrics: Metrics, limits: Limits) -> None:
        self._observe = observe
        self._act = act
        self._memory = memory
        self._metrics = metrics
        self._limits = limits

    async def __call__(self, key: RunKey) -> float | None:
        """Seconds until the next pass; None: only on a change.

        Raises:
            KubeError: something could not be read or done; the queue tries again.
        """
        with self._metrics.reconcile_seconds.time():
            try:
                snapshot = await self._observe(*key)
            except NotFound:
                # deleted: what was its goes by ownerReferences
                self._memory.forget(key)
                self._metrics.of_runs.forget(key)
                return None
            except Unreadable as e:
                await self._act.refuse(e.run, str(e))
                return None
            if snapshot.deleting:
                return None
            decided = plan(snapshot, limits=self._limits)
            self._memory.of(key, snapshot.uid).state = decided.status.state
            self._metrics.of_runs.accounted(key, snapshot.uid, decided.status)
            began = time.monotonic()
            later = await self._act(snapshot, decided)
            log.debug(
                "pass done",
                extra={
                    "namespace": key[0],
                    "run": key[1],
                    "state": decided.status.state,
                    "actions": len(decided.actions),
                    "acted_s": round(time.monotonic() - began, 3),
                },
            )
            return later

    def failed(self, key: RunKey, error: Exception, delay: float) -> None:
        """Tells of a pass that ended by an error."""
        self._metrics.reconcile_errors.labels(type(error).__name__).inc()
        where = {"namespace": key[0], "run": key[1], "again_in_s": round(delay, 1)}
        match error:
            case Conflict():
                log.info("somebody else wrote first, looking again: %s", error.message, extra=where)
            case Unavailable():
                log.warning("waiting for the API server: %s", error.message, extra=where)
            case KubeError():
                log.warning("refused: %s", error.message, extra=where)
            case _:
                log.error("a pass failed; this is a bug of the operator", exc_info=error, extra=where)
