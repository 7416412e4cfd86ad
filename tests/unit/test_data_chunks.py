"""The cache on disk: each chunk fetched once a Pod where all fit, bounded where they don't, never trusted blindly."""

import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from starcoder_trainer.data import chunks
from starcoder_trainer.data.chunks import ChunkedObject
from starcoder_trainer.data.errors import DataNotFound
from starcoder_trainer.failures import classify
from starcoder_trainer.storage.file import FileStore
from starcoder_trainer.storage.store import NotFound, Unreachable

CHUNK = 100


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "LARGE_CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(chunks, "SMALL_CHUNK_BYTES", CHUNK // 10)


class Remote:
    """A store of one object that remembers what was asked of it."""

    uri = "s3://corpus/code"

    def __init__(self, data):
        self.data = data
        self.asked = []
        self.error = None

    def get_range(self, key, start, length):
        if self.error:
            raise self.error
        self.asked.append((start, length))
        return self.data[start : start + length]


DATA = bytes(i * 7 % 251 for i in range(950))


def opened(store, cache, cache_bytes=1000, version="v1"):
    return ChunkedObject(store, "tokens.bin", size=len(DATA), version=version, cache=cache, cache_bytes=cache_bytes)


def files(folder: Path):
    return [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("lock-")]


def test_any_range_comes_back_and_each_chunk_is_fetched_once(tmp_path):
    store = Remote(DATA)
    stream = opened(store, tmp_path)
    for start in range(0, 950, 13):
        for length in (1, 50, 240):
            stop = min(start + length, 950)
            assert stream.read(start, stop - start) == DATA[start:stop]
    assert sorted(store.asked) == [(n * CHUNK, min(CHUNK, 950 - n * CHUNK)) for n in range(10)]


def test_a_second_process_of_the_pod_finds_what_the_first_fetched(tmp_path):
    opened(Remote(DATA), tmp_path).read(0, 950)
    store = Remote(DATA)
    assert opened(store, tmp_path).read(0, 950) == DATA
    assert store.asked == []


def test_another_version_of_the_object_is_fetched_anew(tmp_path):
    opened(Remote(bytes(950)), tmp_path).read(0, 950)
    assert opened(Remote(DATA), tmp_path, version="v2").read(0, 950) == DATA


def test_disk_use_is_bounded_where_the_object_does_not_fit(tmp_path):
    store = Remote(DATA)
    stream = opened(store, tmp_path, cache_bytes=200)
    for _ in range(3):
        for start in range(0, 900, 50):
            assert stream.read(start, 50) == DATA[start : start + 50]
    assert len(files(tmp_path)) == 20
    assert all(length == CHUNK // 10 for _, length in store.asked)


def test_no_cache_reads_exactly_what_is_asked(tmp_path):
    store = Remote(DATA)
    assert opened(store, tmp_path, cache_bytes=0).read(123, 45) == DATA[123:168]
    assert store.asked == [(123, 45)]
    assert files(tmp_path) == []


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: b"", lambda d: d[:60] + b"\xff" + d[61:]])
def test_a_cached_file_that_a_crash_spoiled_is_fetched_again(tmp_path, damage):
    opened(Remote(DATA), tmp_path).read(0, 950)
    for path in files(tmp_path):
        path.write_bytes(damage(path.read_bytes()))
    store = Remote(DATA)
    assert opened(store, tmp_path).read(0, 950) == DATA
    assert len(store.asked) == 10


def test_a_disk_that_takes_nothing_costs_speed_not_the_run(tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert opened(Remote(DATA), tmp_path / "cache").read(5, 500) == DATA[5:505]
    assert "every sample is read from the store" in caplog.text


def test_a_disk_that_fills_up_costs_speed_not_the_run(tmp_path, caplog, monkeypatch):
    stream = opened(Remote(DATA), tmp_path)

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert stream.read(5, 500) == DATA[5:505]
    assert caplog.text.count("No space left") == 1


def test_a_store_that_fails_is_a_storage_failure_and_is_asked_again(tmp_path):
    store = Remote(DATA)
    stream = opened(store, tmp_path)
    store.error = Unreachable("read s3://corpus/code: no answer")
    with pytest.raises(Unreachable) as e:
        stream.read(0, 10)
    assert classify(e.value) == "Storage"
    store.error = None
    assert stream.read(0, 10) == DATA[:10]


def test_data_deleted_under_a_run_is_named(tmp_path):
    store = Remote(DATA)
    store.error = NotFound("read s3://corpus/code/tokens.bin: no such object")
    with pytest.raises(DataNotFound, match="it was there when training began") as e:
        opened(store, tmp_path).read(0, 10)
    assert classify(e.value) == "Storage"


def test_threads_that_want_one_chunk_at_once_fetch_it_once(tmp_path):
    store, barrier = Remote(DATA), threading.Barrier(8)
    stream, found = opened(store, tmp_path), []

    def read():
        barrier.wait()
        found.append(stream.read(0, 950))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [DATA] * 8
    assert len(store.asked) == 10


class Logging(FileStore):
    def get_range(self, key, start, length):
        with (self.root / "asked").open("ab", buffering=0) as log:
            log.write(f"{start}\n".encode())
        return super().get_range(key, start, length)


def _read_all(root, cache, barrier):
    chunks.LARGE_CHUNK_BYTES = CHUNK
    stream = opened(Logging(f"file://{root}"), cache)
    barrier.wait()
    for start in range(0, 950, 25):
        assert stream.read(start, 25) == DATA[start : start + 25]
    os._exit(0)


def test_processes_that_want_one_chunk_at_once_fetch_it_once(tmp_path):
    (tmp_path / "tokens.bin").write_bytes(DATA)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    processes = [context.Process(target=_read_all, args=(tmp_path, tmp_path / "cache", barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0, 0, 0]
    asked = (tmp_path / "asked").read_text().split()
    assert sorted(map(int, asked)) == [n * CHUNK for n in range(10)]


class Held(Remote):
    """Says when its first fetch is under way, and answers when it is let go."""

    def __init__(self, data, fetching, let_go):
        super().__init__(data)
        self.fetching, self.let_go = fetching, let_go

    def get_range(self, key, start, length):
        self.fetching.set()
        self.let_go.wait(60)
        return super().get_range(key, start, length)


def read_two_chunks_by_two_threads(cache, order, all_fetch, let_go, result):
    """The first chunk of `order` is being fetched in all processes when a second thread asks for the other one."""
    fetching = threading.Event()
    stream = opened(Held(DATA, fetching, let_go), Path(cache))
    first = threading.Thread(target=stream.read, args=(order[0] * CHUNK, 10))
    first.start()
    fetching.wait(60)
    all_fetch.wait(60)
    try:
        result.put(stream.read(order[1] * CHUNK, 10) == DATA[order[1] * CHUNK : order[1] * CHUNK + 10])
    except OSError as e:
        result.put(str(e))
    first.join()


def waiting_for_locks(folder):
    """Lines of /proc/locks of those who wait for a lock on a file below `folder`."""
    inodes = {f":{p.stat().st_ino} " for p in folder.rglob("*") if p.is_file()}
    lines = Path("/proc/locks").read_text().splitlines()
    return [line for line in lines if "->" in line and any(inode in line for inode in inodes)]


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="sees who waits in /proc/locks, which Linux has")
def test_processes_whose_threads_wait_for_each_other_s_chunks_are_in_no_deadlock(tmp_path):
    fork = multiprocessing.get_context("fork")
    all_fetch, let_go, result = fork.Barrier(2), fork.Event(), fork.Queue()
    processes = [
        fork.Process(target=read_two_chunks_by_two_threads, args=(str(tmp_path), order, all_fetch, let_go, result))
        for order in ((0, 1), (1, 0))
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + 60
    while len(waiting_for_locks(tmp_path)) < 2 and result.empty() and time.monotonic() < end:
        time.sleep(0.01)
    let_go.set()
    assert [result.get(timeout=60) for _ in processes] == [True, True]
    for process in processes:
        process.join(60)
