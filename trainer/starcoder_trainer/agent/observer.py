"""Looks at the workers each second; has those that hang say what they can, and keeps it in the store."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from starcoder_trainer.agent import stall
from starcoder_trainer.agent.channel import NotConnected
from starcoder_trainer.agent.messages import Event, Identity, Interrogate, Observed, Testified
from starcoder_trainer.contract.ledger import stacks_key
from starcoder_trainer.contract.stamp import read_stamp
from starcoder_trainer.contract.worker import Look, Message, Seen
from starcoder_trainer.storage.store import ObjectStore, StorageError

log = logging.getLogger(__name__)

TESTIMONY_SECONDS = 10.0
"""For the fork server to answer a look with stacks, which takes it two."""


class Observer:
    def __init__(  # noqa: PLR0917
        self,
        me: Identity,
        member: int,
        watched: Callable[[], tuple[int, frozenset[int]] | None],
        send: Callable[[Message], Awaitable[None]],
        store: Callable[[], ObjectStore],
        post: Callable[[Event], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`watched`: (attempt, ranks) of the workers that are to be looked at now."""
        self._me = me
        self._member = member
        self._watched = watched
        self._send = send
        self._store = store
        self._post = post
        self._clock = clock
        self._unanswered = False
        """A look is under way; another would only fill the socket of a server that does not read it."""
        self._answered = True
        self._testimony: asyncio.Future[Seen] | None = None
        self._keeping: set[asyncio.Future[None]] = set()

    async def run(self) -> None:
        """Until cancelled."""
        if not self._me.stamps:
            return
        while True:
            await asyncio.sleep(stall.LOOK_SECONDS)
            watched = self._watched()
            if watched is None:
                self._unanswered, self._answered = False, True
                continue
            attempt, ranks = watched
            stamps = {r: s for r in ranks if (s := read_stamp(Path(self._me.stamps), r)) is not None}
            self._post(Observed(self._clock(), stamps, self._answered))
            self._answered = False
            if not self._unanswered:
                await self._ask(Look(attempt))

    def seen(self, message: Seen) -> None:
        """The fork server has answered."""
        self._unanswered, self._answered = False, True
        if message.stacks and self._testimony is not None and not self._testimony.done():
            self._testimony.set_result(message)

    async def interrogate(self, action: Interrogate) -> None:
        """Ends with `Testified`, whatever the workers do; what they say goes to the store meanwhile."""
        overdue, seen = action.overdue, None
        self._testimony = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(TESTIMONY_SECONDS):
                await self._ask(Look(overdue.attempt, stacks=True))
                seen = (await self._testimony).workers
        except TimeoutError:
            log.warning("no progress, and the fork server does not answer")
        where = f"stacks are in the log of Pod {self._me.pod}"
        if seen is not None:
            who = f"attempt {overdue.attempt}, member {self._member}, Pod {self._me.pod}, node {self._me.node}"
            text = f"{who}: {stall.account(overdue, action.stamps, seen)}"
            key = stacks_key(overdue.attempt, self._member)
            where += f" and, if S3 took them, in {self._store().uri}/{key}"
            self._keep(key, text)
        self._post(Testified(self._clock(), overdue.attempt, seen, where))

    async def _ask(self, look: Look) -> None:
        self._unanswered = True
        try:
            await self._send(look)
        except NotConnected as e:
            log.warning("%s", e)  # that the server went is told as an event of its own

    def _keep(self, key: str, text: str) -> None:
        """Beside all else: the store may be what everybody waits for."""

        def put() -> None:
            try:
                self._store().put(key, text.encode())
            except StorageError as e:
                log.warning("stacks are not kept: %s", e)

        keeping = asyncio.get_running_loop().run_in_executor(None, put)
        self._keeping.add(keeping)
        keeping.add_done_callback(self._keeping.discard)
