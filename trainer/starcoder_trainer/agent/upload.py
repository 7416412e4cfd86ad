"""From local files to the store: a step that all local ranks saved becomes one shard of its checkpoint."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from starcoder_trainer.agent.backlog import MOST_WAITING, Backlog, Waiting
from starcoder_trainer.agent.messages import (
    CheckpointRefused,
    Event,
    ShardUploaded,
    StorageTrouble,
    Upload,
    UploadAbandoned,
)
from starcoder_trainer.agent.problems import storage_problem
from starcoder_trainer.contract.assignment import CheckpointRef
from starcoder_trainer.contract.codec import ContractError
from starcoder_trainer.contract.ledger import (
    FileRecord,
    RankManifest,
    ShardManifest,
    checkpoint_prefix,
    shard_manifest_key,
)
from starcoder_trainer.contract.worker import Saved
from starcoder_trainer.storage.store import ObjectStore, StorageError

log = logging.getLogger(__name__)

FILES_AT_ONCE = 4
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 15.0


class LocalFilesLost(Exception):
    """What a worker said to have saved is not on the local disk."""


@dataclass(frozen=True)
class Uploads:
    """What one shard took: for the metrics."""

    seconds: float
    size_bytes: int


def read_rank_manifest(saved: Saved) -> tuple[Path, RankManifest]:
    """The rank's manifest lies beside its files; its name is the worker's affair.

    Raises:
        LocalFilesLost: no manifest of that rank and step is there.
    """
    for path in sorted(Path(saved.directory).glob("*.json")):
        try:
            manifest = RankManifest.from_json(path.read_bytes())
        except (ContractError, OSError):
            continue
        if (manifest.attempt, manifest.step, manifest.rank) == (saved.attempt, saved.step, saved.rank):
            return path, manifest
    raise LocalFilesLost(
        f"{saved.directory}: found no manifest of rank {saved.rank} step {saved.step}, expected one beside its files"
    )


def upload_shard(
    store: ObjectStore, member: int, job: Upload, sent: dict[str, FileRecord] | None = None
) -> ShardManifest:
    """Files first, the shard's manifest last: it is what the committer looks for.

    Args:
        sent: what an earlier try has uploaded, by name; is added to.

    Raises:
        LocalFilesLost: the local disk has not what the workers said to have saved.
        StorageError: try again, the upload may be repeated.
    """
    manifests = [read_rank_manifest(saved)[1] for saved in job.saved]
    local = {name: Path(s.directory) / name for s, m in zip(job.saved, manifests, strict=True) for name in m.files}
    common = manifests[0].common
    if any(m.common != common for m in manifests):
        raise LocalFilesLost(f"step {job.step}: local ranks disagree about the facts of the run: {common} and others")

    sent = {} if sent is None else sent

    def send(item: tuple[str, Path]) -> FileRecord:
        name, path = item
        if name in sent:
            return sent[name]
        if not path.is_file():
            raise LocalFilesLost(f"{path}: missing, expected it beside its rank's manifest")
        done = store.upload_file(f"{checkpoint_prefix(job.attempt, job.step)}/{name}", path)
        sent[name] = FileRecord(name, done.size, done.sha256, done.checksum)
        return sent[name]

    with ThreadPoolExecutor(FILES_AT_ONCE, "shard") as pool:
        files = tuple(pool.map(send, sorted(local.items())))
    shard = ShardManifest(
        attempt=job.attempt,
        step=job.step,
        member=member,
        ranks=tuple(m.rank for m in manifests),
        world_size=job.world_size,
        files=files,
        pieces=tuple(piece for m in manifests for piece in m.pieces),
        common=common,
    )
    store.put(shard_manifest_key(job.attempt, job.step, member), shard.to_json().encode())
    return shard


def delete_local(job: Upload) -> None:
    """Makes room for the next step; whatever can't be deleted is the next cleaning's."""
    for saved in job.saved:
        folder = Path(saved.directory)
        try:
            path, manifest = read_rank_manifest(saved)
            for name in manifest.files:
                (folder / name).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            folder.rmdir()
        except (LocalFilesLost, OSError):
            continue


def delete_leftovers(scratch: Path, ranks: Iterable[int], keep: Callable[[int, int], bool]) -> None:
    """What workers of these ranks left behind, half written or of no use any more, as far as it can be deleted. Other
    Pods may share the folder (hostPath).

    Args:
        keep: asked with attempt and step.
    """
    for folder in (scratch / "checkpoints").glob("a*/step-*"):
        attempt, step = folder.parent.name.removeprefix("a"), folder.name.removeprefix("step-")
        if not (attempt.isdecimal() and step.isdecimal()) or keep(int(attempt), int(step)):
            continue
        for rank in ranks:
            for path in folder.glob(f"*rank-{rank:05d}.*"):
                with contextlib.suppress(OSError):
                    path.unlink()
        with contextlib.suppress(OSError):  # others' files are in it
            folder.rmdir()


class Uploader:
    """One step at a time. The files of the step that was uploaded last stay, for workers that start from it. While the
    store is slow or away steps give way to others (`Backlog`), so that the local disk holds no more than that step, the
    one being uploaded and `MOST_WAITING` others."""

    def __init__(
        self,
        member: int,
        store: Callable[[], ObjectStore],
        post: Callable[[Event], None],
        done: Callable[[Uploads], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._member = member
        self._store = store
        self._post = post
        self._done = done
        self._clock = clock
        self._backlog = Backlog()
        self._current: Upload | None = None
        self._kept: Upload | None = None
        self._attempt = 0
        """That has begun."""
        self._wake = asyncio.Event()

    def add(self, job: Upload) -> None:
        for other in self._backlog.add(Waiting(job, self._store())):
            self._give_up(other.job, f"uploads are slower than saves, and no more than {MOST_WAITING} steps wait")
        self._wake.set()

    async def begins(self, attempt: int, checkpoint: CheckpointRef | None) -> None:
        """Attempt `attempt` starts from that checkpoint: nobody will adopt what those before it still upload, and no
        other step's files are of use."""
        for old in self._backlog.drop(lambda job: job.attempt < attempt):
            self._give_up(old.job, f"attempt {attempt} has begun")
        self._attempt, kept = attempt, self._kept
        source = None if checkpoint is None else (checkpoint.attempt, checkpoint.step)
        if kept is not None and (kept.attempt, kept.step) != source:
            await self._keep(None)

    def busy_with(self, attempt: int) -> bool:
        return self._backlog.has(attempt) or (self._current is not None and self._current.attempt == attempt)

    def _give_up(self, job: Upload, why: str) -> None:
        log.warning("step %d of attempt %d is not uploaded: %s", job.step, job.attempt, why)
        delete_local(job)
        self._post(UploadAbandoned(self._clock(), job.attempt, job.step))

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._wake.wait()
            if not self._backlog:
                self._wake.clear()
                continue
            waiting, older = self._backlog.take()
            self._current = waiting.job
            for other in older:
                self._give_up(other.job, f"uploads are slower than saves, and step {waiting.job.step} is newer")
            await self._upload(waiting)
            self._current = None

    async def _keep(self, job: Upload | None) -> None:
        """In place of the one before."""
        before, self._kept = self._kept, job
        if before is not None:
            await asyncio.to_thread(delete_local, before)

    def _in_vain(self, waiting: Waiting) -> str:
        """Why a failed upload is not tried again; empty where it is."""
        if waiting.store is not self._store():
            return "checkpoints go elsewhere since the spec was changed"
        if waiting.job.attempt < self._attempt:
            return f"attempt {self._attempt} has begun, from another checkpoint"
        return ""

    async def _upload(self, waiting: Waiting) -> None:
        job, pause, troubled, begun = waiting.job, FIRST_PAUSE_SECONDS, False, self._clock()
        sent: dict[str, FileRecord] = {}
        while True:
            try:
                shard = await asyncio.to_thread(upload_shard, waiting.store, self._member, job, sent)
            except StorageError as e:
                log.warning("upload of step %d: %s", job.step, e)
                if vain := self._in_vain(waiting):
                    self._give_up(job, vain)
                    if troubled:
                        self._post(StorageTrouble(self._clock(), None))
                    return
                self._post(StorageTrouble(self._clock(), storage_problem(e)))
                troubled = True
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                continue
            except (LocalFilesLost, OSError) as e:
                log.error("step %d is lost: %s", job.step, e)
                self._post(CheckpointRefused(self._clock(), job.attempt, job.step, str(e)))
                shard = None
            if troubled:
                self._post(StorageTrouble(self._clock(), None))
            if shard is None:
                return
            break
        if job.attempt < self._attempt:  # a later one has chosen where it starts, and it was not this
            await asyncio.to_thread(delete_local, job)
        else:
            await self._keep(job)
        size = sum(file.size for file in shard.files)
        self._done(Uploads(self._clock() - begun, size))
        log.info("uploaded step %d of attempt %d: %d bytes", job.step, job.attempt, size)
        self._post(ShardUploaded(self._clock(), job.attempt, job.step))
