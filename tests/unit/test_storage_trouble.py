"""A trouble with the storage that an agent reports is taken back once nothing is tried in vain any more: an attempt
waits for it before it forms."""

import asyncio
import shutil
import threading

import pytest

from starcoder_trainer.agent.committer import Committer
from starcoder_trainer.agent.ledger import Fenced, Ledger
from starcoder_trainer.agent.messages import (
    CheckpointRefused,
    CheckpointVerified,
    Commit,
    ShardUploaded,
    StorageTrouble,
    Upload,
    UploadAbandoned,
)
from starcoder_trainer.agent.upload import Uploader
from starcoder_trainer.contract.assignment import CheckpointRef
from starcoder_trainer.contract.ledger import RankManifest
from starcoder_trainer.contract.worker import Saved
from starcoder_trainer.storage.file import FileStore
from starcoder_trainer.storage.store import Unreachable
from tests.support.checkpoints import RUN, MemoryStore, ledger, save_shard


class _Events:
    def __init__(self):
        self._queue = asyncio.Queue()

    async def next(self, kind):
        async with asyncio.timeout(60):
            while not isinstance(event := await self._queue.get(), kind):
                pass
        return event

    def post(self, event):
        self._queue.put_nowait(event)


class _Away(MemoryStore):
    def list(self, *args, **more):
        raise Unreachable("list: no answer")


@pytest.fixture
async def at_work():
    tasks = []
    yield lambda loop: tasks.append(asyncio.ensure_future(loop))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_commit_that_a_newer_attempt_makes_needless_leaves_no_trouble(at_work):
    events = _Events()
    mine = ledger(_Away(), "a")
    committer = Committer(lambda: mine, lambda: "s3://checkpoints/a", events.post)
    committer.add(Commit(1, 4, 2))
    at_work(committer.run())
    assert (await events.next(StorageTrouble)).problem.reason == "StorageUnreachable"
    committer.forget_before(2)
    assert (await events.next(StorageTrouble)).problem is None


async def test_a_commit_that_fails_while_a_newer_attempt_begins_leaves_no_trouble(at_work):
    """The answer that it waits for comes after nothing is left to commit."""
    events, loop = _Events(), asyncio.get_running_loop()
    asked, answer = asyncio.Event(), asyncio.Event()

    class Slow(_Away):
        def list(self, *args, **more):
            loop.call_soon_threadsafe(asked.set)
            asyncio.run_coroutine_threadsafe(answer.wait(), loop).result(60)
            return super().list(*args, **more)

    mine = ledger(Slow(), "a")
    committer = Committer(lambda: mine, lambda: "s3://checkpoints/a", events.post)
    committer.add(Commit(1, 4, 2))
    at_work(committer.run())
    async with asyncio.timeout(60):
        await asked.wait()
    committer.forget_before(2)
    answer.set()
    assert (await events.next(StorageTrouble)).problem is not None
    assert (await events.next(StorageTrouble)).problem is None


async def test_an_upload_whose_files_are_gone_when_the_store_is_back_leaves_no_trouble(at_work, tmp_path):
    events = _Events()
    folder = tmp_path / "step-4"
    folder.mkdir()
    (folder / "rank-00000.bin").write_bytes(b"weights")
    manifest = RankManifest(1, 4, 0, ("rank-00000.bin",), (), {"step": "4"})
    (folder / "rank-00000.json").write_text(manifest.to_json())
    saved = Saved(1, 0, 4, str(folder), 0.1, 7)

    class AwayOnce(MemoryStore):
        def upload_file(self, key, path):
            shutil.rmtree(folder)
            raise Unreachable("put: no answer")

    store = AwayOnce()
    uploader = Uploader(0, lambda: store, events.post, lambda _: None)
    uploader.add(Upload(1, 4, 1, (saved,)))
    at_work(uploader.run())
    assert (await events.next(StorageTrouble)).problem.reason == "StorageUnreachable"
    assert str(folder) in (await events.next(CheckpointRefused)).message
    assert (await events.next(StorageTrouble)).problem is None


async def test_what_was_uploaded_is_not_sent_again_when_another_file_could_not_be(at_work, tmp_path):
    tried = []

    class OnceAway(FileStore):
        def upload_file(self, key, path):
            tried.append(path.name)
            if path.name == "rank-00001.bin" and tried.count(path.name) == 1:
                raise Unreachable("put: no answer")
            return super().upload_file(key, path)

    events, store = _Events(), OnceAway(f"file://{tmp_path}/store")
    store.root.mkdir()
    folder = tmp_path / "step-4"
    folder.mkdir()
    for rank in (0, 1):
        (folder / f"rank-0000{rank}.bin").write_bytes(b"weights")
        manifest = RankManifest(1, 4, rank, (f"rank-0000{rank}.bin",), (), {"step": "4"})
        (folder / f"rank-0000{rank}.json").write_text(manifest.to_json())
    uploader = Uploader(0, lambda: store, events.post, lambda _: None)
    uploader.add(Upload(1, 4, 2, tuple(Saved(1, rank, 4, str(folder), 0.1, 7) for rank in (0, 1))))
    at_work(uploader.run())
    assert (await events.next(ShardUploaded)).step == 4
    assert sorted(tried) == ["rank-00000.bin", "rank-00001.bin", "rank-00001.bin"]


async def test_a_commit_is_told_before_what_it_drops_is_deleted(at_work):
    events, deleting, may = _Events(), threading.Event(), threading.Event()

    class SlowToDelete(MemoryStore):
        def delete(self, *args, **more):
            deleting.set()
            may.wait(60)
            return super().delete(*args, **more)

    store = SlowToDelete()
    mine = ledger(store, "a", keep_last=1)
    mine.choose(mine.claim(1, "Own").head)
    for step in (4, 8):
        save_shard(store, 1, step)
    committer = Committer(lambda: mine, lambda: "s3://checkpoints/a", events.post)
    at_work(committer.run())
    committer.add(Commit(1, 4, 1))
    assert (await events.next(CheckpointVerified)).verified.checkpoint.step == 4
    committer.add(Commit(1, 8, 1))
    assert (await events.next(CheckpointVerified)).verified.checkpoint.step == 8
    assert await asyncio.to_thread(deleting.wait, 60)
    may.set()


async def test_a_late_answer_that_an_attempt_is_fenced_leaves_the_next_one_s_steps_alone(at_work):
    """An enlisting of the attempt before may still be under way when this agent leads again."""
    events, asked, go_on = _Events(), threading.Event(), threading.Event()

    class Late(Ledger):
        def enlist(self, attempt, step):
            if attempt == 1:
                asked.set()
                go_on.wait(60)
                return Fenced(2)
            return super().enlist(attempt, step)

    store = MemoryStore()
    mine = Late(store, RUN, "a", 3, pause=lambda seconds: None)
    mine.claim(2, "Own")
    for attempt, step in ((1, 4), (2, 8)):
        save_shard(store, attempt, step)
    committer = Committer(lambda: mine, lambda: "s3://checkpoints/a", events.post)
    at_work(committer.run())
    committer.add(Commit(1, 4, 1))
    assert await asyncio.to_thread(asked.wait, 60)
    committer.add(Commit(2, 8, 1))
    go_on.set()
    assert (await events.next(CheckpointVerified)).verified.checkpoint.step == 8


def saved_on_disk(root, step):
    folder = root / f"step-{step}"
    folder.mkdir()
    (folder / "rank-00000.bin").write_bytes(b"weights")
    (folder / "rank-00000.json").write_text(
        RankManifest(1, step, 0, ("rank-00000.bin",), (), {"step": str(step)}).to_json()
    )
    return Upload(1, step, 1, (Saved(1, 0, step, str(folder), 0.1, 7),))


async def test_an_upload_that_fails_where_the_spec_does_not_point_any_more_is_given_up(at_work, tmp_path):
    class Away(MemoryStore):
        def upload_file(self, key, path):
            raise Unreachable("put: no answer")

    events, stores = _Events(), [Away(), FileStore(f"file://{tmp_path}/store")]
    stores[1].root.mkdir()
    uploader = Uploader(0, lambda: stores[0], events.post, lambda _: None)
    at_work(uploader.run())
    uploader.add(saved_on_disk(tmp_path, 2))
    assert (await events.next(StorageTrouble)).problem.reason == "StorageUnreachable"
    uploader.add(saved_on_disk(tmp_path, 6))
    del stores[0]
    uploader.add(saved_on_disk(tmp_path, 7))
    assert (await events.next(UploadAbandoned)).step == 2
    assert (await events.next(StorageTrouble)).problem is None
    assert (await events.next(UploadAbandoned)).step == 6
    assert (await events.next(ShardUploaded)).step == 7


async def test_an_upload_that_fails_after_another_attempt_has_begun_is_given_up(at_work, tmp_path):
    """Nobody would adopt it, and its trouble would be taken for the next attempt's."""

    class Away(MemoryStore):
        def upload_file(self, key, path):
            raise Unreachable("put: no answer")

    events, store = _Events(), Away()
    uploader = Uploader(0, lambda: store, events.post, lambda _: None)
    at_work(uploader.run())
    uploader.add(saved_on_disk(tmp_path, 2))
    assert (await events.next(StorageTrouble)).problem.reason == "StorageUnreachable"
    await uploader.begins(2, None)
    assert (await events.next(UploadAbandoned)).step == 2
    assert (await events.next(StorageTrouble)).problem is None


async def test_an_upload_that_outlasts_its_attempt_takes_no_files_from_the_next(at_work, tmp_path):
    """The next one has begun with those of the step before."""
    events, begun, hold = _Events(), threading.Event(), threading.Event()
    hold.set()

    class Slow(FileStore):
        def upload_file(self, key, path):
            begun.set()
            hold.wait(60)
            return super().upload_file(key, path)

    local, store = tmp_path / "local", Slow(f"file://{tmp_path}/store")
    local.mkdir()
    store.root.mkdir()
    uploader = Uploader(0, lambda: store, events.post, lambda _: None)
    at_work(uploader.run())
    uploader.add(saved_on_disk(local, 2))
    assert (await events.next(ShardUploaded)).step == 2
    hold.clear()
    begun.clear()
    uploader.add(saved_on_disk(local, 4))
    assert await asyncio.to_thread(begun.wait, 60)
    await uploader.begins(2, CheckpointRef(1, 2, "sha256:0"))
    hold.set()
    assert (await events.next(ShardUploaded)).step == 4
    assert sorted(p.name for p in local.iterdir()) == ["step-2"]
    await uploader.begins(3, None)
    assert list(local.iterdir()) == []
