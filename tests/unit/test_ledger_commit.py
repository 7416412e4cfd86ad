"""Committing and choosing: HEAD lists only what is whole, and falls back in the open."""

import json
import threading
from dataclasses import replace

import pytest

from starcoder_trainer.agent.ledger import CheckpointLost, Claimed, Committed, Fenced, Superseded, reference
from starcoder_trainer.agent.verify import Corrupt, Incomplete
from starcoder_trainer.checkpoint.index import read_index
from starcoder_trainer.contract.ledger import HEAD_KEY, Head, checkpoint_prefix, shard_manifest_key
from starcoder_trainer.storage.file import FileStore
from starcoder_trainer.storage.store import Found, Unreachable
from tests.support.checkpoints import MemoryStore, ledger, save_shard


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else FileStore(f"file://{tmp_path}")


def head(store):
    return Head.from_json(store.get(HEAD_KEY).data)


def steps(store):
    return [(e.attempt, e.step) for e in head(store).entries]


def claimed(store, holder="a", attempt=1, **more):
    mine = ledger(store, holder, **more)
    assert isinstance(mine.claim(attempt, "Own"), Claimed)
    mine.choose(head(store))
    return mine


def test_a_step_is_committed_when_every_rank_is_there_once(store):
    mine = claimed(store)
    save_shard(store, 1, 10, member=0, ranks=(0, 1), world_size=4)
    with pytest.raises(Incomplete, match="2, 3"):
        mine.commit(1, 10)
    assert steps(store) == []
    save_shard(store, 1, 10, member=1, ranks=(2, 3), world_size=4)
    committed = mine.commit(1, 10)
    assert isinstance(committed, Committed)
    assert steps(store) == [(1, 10)]
    there = store.list(f"{checkpoint_prefix(1, 10)}/")
    assert committed.entry.size_bytes == sum(s.size for s in there if "/shard-" not in s.key)


def test_a_rank_in_two_shards_is_refused(store):
    mine = claimed(store)
    save_shard(store, 1, 10, member=0, ranks=(0, 1), world_size=2)
    save_shard(store, 1, 10, member=1, ranks=(1,), world_size=2)
    with pytest.raises(Corrupt, match="two shards"):
        mine.commit(1, 10)


def test_shards_that_disagree_about_the_run_are_refused(store):
    mine = claimed(store)
    save_shard(store, 1, 10, member=0, ranks=(0,), world_size=2)
    other = save_shard(store, 1, 10, member=1, ranks=(1,), world_size=2)
    store.put(shard_manifest_key(1, 10, 1), replace(other, common={"step": "11"}).to_json().encode())
    with pytest.raises(Corrupt, match="disagree"):
        mine.commit(1, 10)


@pytest.mark.parametrize("damage", ["cut", "changed", "deleted"])
def test_a_damaged_object_is_found_before_head_lists_it(store, damage):
    mine = claimed(store)
    save_shard(store, 1, 10)
    key = f"{checkpoint_prefix(1, 10)}/rank-00000.bin"
    data = store.get(key).data
    match damage:
        case "cut":
            store.put(key, data[:-1])
        case "changed":
            store.put(key, b"x" + data[1:])
        case "deleted":
            store.delete(key)
    with pytest.raises(Corrupt, match=r"rank-00000\.bin"):
        mine.commit(1, 10)
    assert steps(store) == []


def test_an_older_attempt_cannot_commit(store):
    old = claimed(store, "a", 1)
    save_shard(store, 1, 10)
    claimed(store, "b", 2)
    assert old.commit(1, 10) == Fenced(2)
    assert steps(store) == []


def test_a_commit_whose_answer_was_lost_is_a_success_and_lists_the_step_once():
    store = MemoryStore()
    mine = claimed(store)
    save_shard(store, 1, 10)
    store.fates = ["answer lost"]
    assert isinstance(mine.commit(1, 10), Committed)
    assert steps(store) == [(1, 10)]


def test_committing_again_changes_nothing(store):
    mine = claimed(store)
    save_shard(store, 1, 10)
    first = mine.commit(1, 10)
    before = store.get(HEAD_KEY)
    assert mine.commit(1, 10) == first
    assert store.get(HEAD_KEY) == before


def test_a_step_older_than_one_committed_by_the_same_attempt_is_refused(store):
    mine = claimed(store)
    save_shard(store, 1, 10)
    save_shard(store, 1, 20)
    mine.commit(1, 20)
    with pytest.raises(Superseded, match="newer"):
        mine.commit(1, 10)
    assert steps(store) == [(1, 20)]


def test_only_the_newest_are_kept_and_the_objects_of_the_others_go(store):
    mine = claimed(store, keep_last=2)
    for step in (10, 20, 30):
        save_shard(store, 1, step)
        mine.commit(1, step)
    assert steps(store) == [(1, 20), (1, 30)]
    assert list(store.list(f"{checkpoint_prefix(1, 10)}/")) == []
    assert list(store.list(f"{checkpoint_prefix(1, 20)}/")) != []


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_why(store):
    mine = claimed(store)
    for step in (10, 20):
        save_shard(store, 1, step)
        mine.commit(1, step)
    store.delete(f"{checkpoint_prefix(1, 20)}/rank-00000.bin")
    again = ledger(store, "b")
    again.claim(2, "Own")
    chosen = again.choose(head(store))
    assert chosen.entry is not None
    assert chosen.entry.step == 10
    (why,) = chosen.rejected
    assert "step 20" in why
    assert "missing" in why


def test_a_manifest_of_another_content_and_the_same_size_is_found_before_workers_meet_it(store):
    mine = claimed(store)
    for step in (10, 20):
        save_shard(store, 1, step)
        mine.commit(1, step)
    manifest = store.stat(f"{checkpoint_prefix(1, 20)}/manifest.json")
    store.put(manifest.key, b" " * manifest.size)
    again = ledger(store, "b")
    again.claim(2, "Own")
    chosen = again.choose(head(store))
    assert chosen.entry is not None
    assert chosen.entry.step == 10
    assert "found digest" in chosen.rejected[0]


def test_what_is_dropped_is_deleted_by_several_requests_at_a_time():
    """Of 64 members it is hundreds of objects, and the next commit waits for it."""

    class Slow(MemoryStore):
        under_way = most = 0
        together = threading.Event()

        def delete(self, key: str) -> None:
            with self._lock:
                self.under_way += 1
                self.most = max(self.most, self.under_way)
                if self.most > 1:
                    self.together.set()
            self.together.wait(10)
            super().delete(key)
            with self._lock:
                self.under_way -= 1

    store = Slow()
    mine = ledger(store, "a", keep_last=1)
    mine.claim(1, "Own")
    for step in (10, 20):
        save_shard(store, 1, step)
        mine.commit(1, step)
    assert store.most > 1
    assert not list(store.list(checkpoint_prefix(1, 10)))


def test_workers_need_one_manifest_whatever_the_size_of_the_gang():
    """All ranks ask at once when an attempt starts: a request for each member would be ranks times members."""

    class Counting(MemoryStore):
        read: tuple[str, ...] = ()

        def get(self, key: str) -> Found:
            self.read += (key,)
            return super().get(key)

    store = Counting()
    mine = ledger(store, "a")
    mine.claim(1, "Own")
    for member in range(8):
        save_shard(store, 1, 10, member, ranks=(member,), world_size=8)
    committed = mine.commit(1, 10)
    assert isinstance(committed, Committed)
    store.read = ()
    index = read_index(store, reference(committed.entry))
    assert len(index.files) == 8
    assert store.read == (f"{checkpoint_prefix(1, 10)}/manifest.json",)


def test_history_after_a_fallback_replaces_what_was_rejected(store):
    mine = claimed(store)
    for step in (10, 20):
        save_shard(store, 1, step)
        mine.commit(1, step)
    store.delete(f"{checkpoint_prefix(1, 20)}/manifest.json")
    again = claimed(store, "b", 2)
    save_shard(store, 2, 20)
    again.commit(2, 20)
    assert steps(store) == [(1, 10), (2, 20)]


def test_a_changed_manifest_is_not_what_head_says(store):
    mine = claimed(store)
    save_shard(store, 1, 10)
    mine.commit(1, 10)
    key = f"{checkpoint_prefix(1, 10)}/manifest.json"
    manifest = json.loads(store.get(key).data)
    store.put(key, json.dumps(manifest).encode())
    with pytest.raises(CheckpointLost, match="digest"):
        ledger(store, "b").choose(head(store))


def test_all_checkpoints_lost_is_an_error_and_never_a_start_at_zero(store):
    mine = claimed(store)
    for step in (10, 20):
        save_shard(store, 1, step)
        mine.commit(1, step)
        store.delete(f"{checkpoint_prefix(1, step)}/rank-00000.bin")
    with pytest.raises(CheckpointLost, match="none is intact"):
        ledger(store, "b").choose(head(store))


def test_a_claimer_adopts_what_the_attempt_before_uploaded_whole_but_did_not_live_to_commit(store):
    first = claimed(store)
    save_shard(store, 1, 10)
    first.commit(1, 10)
    save_shard(store, 1, 20)
    save_shard(store, 1, 30, ranks=(0,), world_size=2)
    second = ledger(store, "b")
    taken = second.claim(2, "Own")
    assert isinstance(taken, Claimed)
    adopted = second.adopt(taken)
    assert [(e.attempt, e.step) for e in adopted.entries] == [(1, 10), (1, 20)]
    assert adopted == head(store)


def test_leftovers_of_fenced_attempts_are_swept_and_what_head_lists_stays(store):
    first = claimed(store)
    save_shard(store, 1, 10)
    first.commit(1, 10)
    save_shard(store, 1, 20, ranks=(0,), world_size=2)
    second = claimed(store, "b", 2)
    save_shard(store, 2, 20)
    assert second.sweep(2) == 1
    assert list(store.list(f"{checkpoint_prefix(1, 20)}/")) == []
    assert list(store.list(f"{checkpoint_prefix(1, 10)}/")) != []
    assert isinstance(second.commit(2, 20), Committed)


def test_a_claimer_that_another_has_followed_adopts_and_deletes_nothing(store):
    """Its own adoption was written, the answer was lost, and the next claimer starts from what it lists."""
    claimed(store)
    save_shard(store, 1, 10, ranks=(0,), world_size=2)
    save_shard(store, 1, 20)
    late = ledger(store, "b")
    taken = late.claim(2, "Own")
    assert isinstance(taken, Claimed)
    put_if_match, base = store.put_if_match, []

    def answer_lost(key, data, version):
        store.put_if_match = put_if_match
        put_if_match(key, data, version)
        next_one = ledger(store, "c")
        base.append(next_one.choose(next_one.claim(3, "Own").head).entry)
        raise Unreachable("no answer")

    store.put_if_match = answer_lost
    assert late.adopt(taken) == Fenced(3)
    assert late.sweep(2) == 0
    assert (base[0].attempt, base[0].step) == (1, 20)
    assert ledger(store, "d").choose(head(store)).entry == base[0]


def test_a_head_that_vanished_is_not_written_anew(store):
    mine = claimed(store)
    save_shard(store, 1, 10)
    store.delete(HEAD_KEY)
    with pytest.raises(CheckpointLost, match="gone"):
        mine.commit(1, 10)
