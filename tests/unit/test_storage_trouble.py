"""A trouble with the storage that an agent reports is taken back once nothing is tried in vain any more: no attempt
forms over a problem."""

import asyncio
import shutil

import pytest

from starcoder_trainer.agent.committer import Committer
from starcoder_trainer.agent.messages import CheckpointRefused, Commit, StorageTrouble, Upload
from starcoder_trainer.agent.upload import Uploader
from starcoder_trainer.contract.ledger import RankManifest
from starcoder_trainer.contract.worker import Saved
from starcoder_trainer.storage.store import Unreachable
from tests.support.checkpoints import MemoryStore, ledger


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

    uploader = Uploader(0, AwayOnce, events.post, lambda _: None)
    uploader.add(Upload(1, 4, 1, (saved,)))
    at_work(uploader.run())
    assert (await events.next(StorageTrouble)).problem.reason == "StorageUnreachable"
    assert str(folder) in (await events.next(CheckpointRefused)).message
    assert (await events.next(StorageTrouble)).problem is None
