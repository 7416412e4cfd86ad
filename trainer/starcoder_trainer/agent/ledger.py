"""HEAD.json: who may commit, and which checkpoints exist.

S3 is consistent per key and has no atomic update of several, so one object decides everything. Every write of it is
conditional on the version read before and carries a nonce; a checkpoint exists from the moment that HEAD lists it.
"""

from __future__ import annotations

import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Literal

from starcoder_trainer.agent import verify
from starcoder_trainer.agent.verify import Corrupt, Incomplete
from starcoder_trainer.contract.assignment import CheckpointRef
from starcoder_trainer.contract.codec import ContractError
from starcoder_trainer.contract.config import RunIdentity
from starcoder_trainer.contract.ledger import HEAD_KEY, MANIFEST, Entry, Head, Manifest, checkpoint_prefix, digest_of
from starcoder_trainer.storage.store import Found, NotFound, ObjectStore, PreconditionFailed, StorageError, Unreachable

log = logging.getLogger(__name__)

BACK_OFF_SECONDS = (0.05, 0.2, 0.5, 1.0, 2.0)
_FOLDER = re.compile(r"^a(\d+)/step-(\d{8,})/")


class Superseded(Exception):
    """A step older than one that HEAD lists of the same attempt; history goes forward only."""


class CheckpointLost(Exception):
    """HEAD or all that it lists can't be read back; training must not start at 0 without a word."""


@dataclass(frozen=True)
class Claimed:
    """HEAD is ours for this attempt."""

    head: Head
    previous_attempt: int
    """Attempt that HEAD was claimed for before; 0 where there was none. Its finished uploads can be adopted."""


@dataclass(frozen=True)
class Fenced:
    """HEAD belongs to attempt `by`: as a rule a higher one, or the same by another holder; a lower one where somebody
    has put HEAD back. Only one beyond `by` can claim."""

    by: int


@dataclass(frozen=True)
class Foreign:
    """HEAD belongs to another run and `resume` is Own."""

    run_uid: str
    message: str


@dataclass(frozen=True)
class Committed:
    """HEAD lists `entry`, now or since an earlier try."""

    entry: Entry
    dropped: tuple[Entry, ...] = field(default=(), compare=False)
    """Not listed any more since; to be discarded."""


@dataclass(frozen=True)
class Chosen:
    entry: Entry | None
    """None: HEAD lists nothing, training starts at iteration 0."""
    rejected: tuple[str, ...] = ()
    """Newer entries that were not what HEAD says, with the reason."""


def reference(entry: Entry) -> CheckpointRef:
    return CheckpointRef(entry.attempt, entry.step, entry.digest)


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


class Ledger:
    """One agent's view of the ledger at `store` (root: `checkpoint.uri`). Thread-safe; every method blocks on I/O."""

    def __init__(
        self,
        store: ObjectStore,
        run: RunIdentity,
        holder: str,
        keep_last: int,
        *,
        pause: Callable[[float], None] = time.sleep,
        now: Callable[[], str] = utc_now,
    ) -> None:
        self._store = store
        self._run = run
        self._holder = holder
        self._keep_last = keep_last
        self._pause = pause
        self._now = now
        self._lock = threading.Lock()
        self._bases: dict[int, int] = {}
        """Attempt -> step that it resumed from, -1 for none. By attempt, since a claim that was given up may still run
        in its thread beside the next."""
        self._previous: dict[int, int] = {}
        """Attempt claimed -> attempt that HEAD was of before; outlives a claim whose answer was lost."""

    def claim(self, attempt: int, resume: Literal["Own", "Adopt"]) -> Claimed | Fenced | Foreign:
        """Makes this agent the only one that may commit, for `attempt`. Claiming again what one has is success.

        Raises:
            CheckpointLost: HEAD is unreadable, or gone while checkpoints are there.
            StorageError: no answer within the tries; the outcome is unknown, so claim again.
        """

        def edit(head: Head | None) -> Head | Claimed | Fenced | Foreign:
            if head is None:
                self._refuse_orphans()
                return Head(self._run.uid, self._run.name, attempt, "", self._holder)
            if head.run_uid != self._run.uid and resume != "Adopt":
                return self._foreign(head)
            if self._owns(head, attempt):
                return Claimed(head, self._previous.get(attempt, 0))
            if head.attempt >= attempt:
                return Fenced(head.attempt)
            self._previous[attempt] = head.attempt
            return replace(head, run_uid=self._run.uid, run_name=self._run.name, attempt=attempt, holder=self._holder)

        with self._lock:
            outcome: Head | Claimed | Fenced | Foreign = self._update(edit)
        return Claimed(outcome, self._previous.get(attempt, 0)) if isinstance(outcome, Head) else outcome

    def choose(self, head: Head) -> Chosen:
        """Newest entry that is still what HEAD says; it becomes the attempt's base.

        Raises:
            CheckpointLost: HEAD lists checkpoints and none can be read back.
        """
        rejected: list[str] = []
        for entry in reversed(head.entries):
            try:
                verify.verify_entry(self._store, entry)
            except (Corrupt, ContractError) as e:
                rejected.append(f"step {entry.step} of attempt {entry.attempt}: {e}")
                log.warning("checkpoint rejected: %s", rejected[-1])
                continue
            self._bases[head.attempt] = entry.step
            return Chosen(entry, tuple(rejected))
        if rejected:
            raise CheckpointLost(
                f"{self._store.uri}/{HEAD_KEY} lists {len(rejected)} checkpoints and none is intact: "
                f"{'; '.join(rejected)[:600]}. Restore the objects, or start anew under another checkpoint.uri"
            )
        self._bases[head.attempt] = -1
        return Chosen(None)

    def adopt(self, claimed: Claimed) -> Head | Fenced:
        """Commits the newest complete set that the attempt before uploaded and did not live to commit.

        Only the attempt that HEAD was taken from is looked at: its successors are the only ones that may delete its
        files, and they come after us.

        Returns:
            HEAD as it is then; Fenced where another attempt has claimed it meanwhile.
        """
        head, attempt = claimed.head, claimed.previous_attempt
        newest = head.newest.step if head.newest else -1
        steps = (
            {step for a, step in self._folders(f"a{attempt}/") if a == attempt and step > newest} if attempt else set()
        )
        for step in sorted(steps, reverse=True):
            try:
                entry = self._seal(attempt, step)
            except (Incomplete, Corrupt) as e:
                log.info("not adopted: %s", e)
                continue
            with self._lock:
                listed = partial(self._listed, attempt=head.attempt, entry=entry, base=entry.step)
                outcome: Head | Committed | Fenced = self._update(listed)
                if isinstance(outcome, Committed):
                    # Listed by a write whose answer was lost, and another attempt may have followed.
                    now = self._must_read()
                    return now if self._owns(now, head.attempt) else Fenced(now.attempt)
            return outcome
        return head

    def shards(self, attempt: int, step: int) -> int:
        """Shard manifests of a step that are there."""
        return sum(1 for _ in self._store.list(f"{checkpoint_prefix(attempt, step)}/shard-"))

    def commit(self, attempt: int, step: int) -> Committed | Fenced:
        """`enlist`, and what is dropped is discarded."""
        outcome = self.enlist(attempt, step)
        if isinstance(outcome, Committed):
            self.discard(outcome.dropped)
        return outcome

    def enlist(self, attempt: int, step: int) -> Committed | Fenced:
        """Lists a step whose shards are all there, after verifying every object, and drops what is beyond keep_last.

        Raises:
            Incomplete: shards are missing; ask again later.
            Corrupt: an object is not what its shard manifest says; this step will never be committed.
            Superseded: this attempt has committed a newer step.
            CheckpointLost: HEAD is gone or unreadable.
            StorageError: no answer within the tries; commit again.
        """
        with self._lock:
            head = self._must_read()
            if not self._owns(head, attempt):
                return Fenced(head.attempt)
            if listed := next((e for e in head.entries if (e.attempt, e.step) == (attempt, step)), None):
                return Committed(listed)
        entry = self._seal(attempt, step)
        with self._lock:
            dropped: tuple[Entry, ...] = ()

            def edit(found: Head | None) -> Head | Committed | Fenced:
                nonlocal dropped
                # An attempt that has chosen nothing has rejected nothing.
                outcome = self._listed(found, attempt, entry, self._bases.get(attempt, entry.step))
                if isinstance(outcome, Head) and found is not None:
                    dropped = tuple(e for e in found.entries if e not in outcome.entries)
                return outcome

            outcome: Head | Committed | Fenced = self._update(edit)
        if isinstance(outcome, Fenced):
            return outcome
        return Committed(entry, dropped)

    def discard(self, dropped: Iterable[Entry]) -> None:
        """Deletes the objects of entries that HEAD has ceased to list: of a large gang many thousands.

        Nothing in use can be among them: all ranks have loaded the attempt's base before a complete newer step exists,
        and whoever claims later reads a HEAD that no longer lists them. What can't be deleted the next sweep takes.
        """
        for old in dropped:
            self._delete_folder(old.attempt, old.step)

    def sweep(self, attempt: int) -> int:
        """Deletes what attempts before `attempt` left and HEAD does not list; number of folders.

        Nobody can commit it any more: they are fenced, and a later claimer adopts only from this attempt on. Where HEAD
        belongs to another by now, nothing is deleted.

        Raises:
            CheckpointLost: HEAD is gone or unreadable.
            StorageError: something could not be read.
        """
        with self._lock:
            head = self._must_read()
        if not self._owns(head, attempt):
            return 0
        listed = {(e.attempt, e.step) for e in head.entries}
        left = {f for f in self._folders("a") if f[0] < head.attempt and f not in listed}
        for folder in sorted(left):
            self._delete_folder(*folder)
        return len(left)

    def _owns(self, head: Head, attempt: int) -> bool:
        return (head.run_uid, head.attempt, head.holder) == (self._run.uid, attempt, self._holder)

    def _foreign(self, head: Head) -> Foreign:
        return Foreign(
            head.run_uid,
            f"{self._store.uri}/{HEAD_KEY} belongs to run {head.run_name} with uid {head.run_uid}, expected uid "
            f"{self._run.uid}; set spec.checkpoint.resume: Adopt to go on from its checkpoints, or choose another "
            "spec.checkpoint.uri",
        )

    def _listed(self, head: Head | None, attempt: int, entry: Entry, base: int) -> Head | Committed | Fenced:
        """HEAD with `entry` as its newest; what a later attempt or an earlier try made of it otherwise."""
        if head is None:
            raise CheckpointLost(f"{self._store.uri}/{HEAD_KEY} is gone; restore it from a version or a backup")
        if any((e.attempt, e.step, e.digest) == (entry.attempt, entry.step, entry.digest) for e in head.entries):
            return Committed(entry)
        if not self._owns(head, attempt):
            return Fenced(head.attempt)
        if any(e.attempt == attempt and e.step > entry.step for e in head.entries):
            raise Superseded(f"attempt {attempt} step {entry.step}: {self._store.uri}/{HEAD_KEY} lists a newer step")
        # Entries above the base were rejected when it was chosen: this attempt's history replaces theirs.
        history = [e for e in head.entries if e.step < entry.step and (e.attempt == attempt or e.step <= base)]
        return replace(head, entries=(*history, entry)[-self._keep_last :])

    def _seal(self, attempt: int, step: int) -> Entry:
        """Verifies all of a step and writes its manifest.json, which nothing refers to yet."""
        manifest: Manifest = verify.assemble(attempt, step, verify.read_shards(self._store, attempt, step))
        verify.verify_contents(self._store, manifest)
        data = manifest.to_json().encode()
        self._store.put(f"{checkpoint_prefix(attempt, step)}/{MANIFEST}", data)
        size = sum(file.size for file in manifest.files) + len(data)
        return Entry(step, attempt, digest_of(data), self._now(), size)

    def _update[R](self, edit: Callable[[Head | None], Head | R]) -> Head | R:
        """Reads HEAD, edits it and writes it back where nobody else has; the edit decides what a defeat means.

        After an answer that was lost or a precondition that failed, HEAD is read again: one's own nonce there means
        that the write had succeeded.
        """
        written: dict[str, Head] = {}
        failure: StorageError | None = None
        for seconds in (*BACK_OFF_SECONDS, None):
            try:
                found = self._read()
                head, version = (None, None) if found is None else (self._parse(found), found.version)
                if head is not None and head.nonce in written:
                    return head
                outcome = edit(head)
                if not isinstance(outcome, Head):
                    return outcome
                new = replace(outcome, nonce=uuid.uuid4().hex)
                written[new.nonce] = new
                data = new.to_json().encode()
                if version is None:
                    self._store.put_if_absent(HEAD_KEY, data)
                else:
                    self._store.put_if_match(HEAD_KEY, data, version)
            except (PreconditionFailed, Unreachable) as e:
                failure = e
                if seconds is not None:
                    self._pause(seconds)
                continue
            return new
        raise Unreachable(f"{self._store.uri}/{HEAD_KEY}: outcome of the write unknown after several tries: {failure}")

    def _read(self) -> Found | None:
        try:
            return self._store.get(HEAD_KEY)
        except NotFound:
            return None

    def _must_read(self) -> Head:
        found = self._read()
        if found is None:
            raise CheckpointLost(f"{self._store.uri}/{HEAD_KEY} is gone; restore it from a version or a backup")
        return self._parse(found)

    def _parse(self, found: Found) -> Head:
        try:
            return Head.from_json(found.data)
        except ContractError as e:
            raise CheckpointLost(f"{self._store.uri}/{HEAD_KEY}: {e}; restore it from a version or a backup") from e

    def _refuse_orphans(self) -> None:
        """HEAD is the first object ever written, so checkpoints without it mean that it was lost."""
        for attempt, step in self._folders("a"):
            raise CheckpointLost(
                f"{self._store.uri}: found {checkpoint_prefix(attempt, step)} and no {HEAD_KEY}; restore it from a "
                "version or a backup, or start anew under another checkpoint.uri"
            )

    def _folders(self, prefix: str) -> Iterator[tuple[int, int]]:
        """(attempt, step) of each checkpoint folder, once."""
        seen = None
        for stat in self._store.list(prefix):
            match = _FOLDER.match(stat.key)
            if match and (folder := (int(match[1]), int(match[2]))) != seen:
                seen = folder
                yield folder

    def _delete_folder(self, attempt: int, step: int) -> None:
        try:
            keys = [stat.key for stat in self._store.list(f"{checkpoint_prefix(attempt, step)}/")]
            verify.at_once(self._store.delete, keys)
        except StorageError as e:
            # Unlisted, so harmless; the next attempt's sweep takes it.
            log.warning("left behind: %s", e)
