"""Claiming HEAD: one holder an attempt, never backwards, never another run's by accident."""

from dataclasses import replace

import pytest

from starcoder_trainer.agent import preflight
from starcoder_trainer.agent.ledger import CheckpointLost, Claimed, Committed, Fenced, Foreign
from starcoder_trainer.contract.ledger import HEAD_KEY, Head
from starcoder_trainer.storage.file import FileStore
from starcoder_trainer.storage.store import Unreachable
from tests.support.checkpoints import RUN, MemoryStore, ledger, save_shard
from tests.support.training import training_config

OTHER = replace(RUN, uid="uid-2")


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else FileStore(f"file://{tmp_path}")


def head(store):
    return Head.from_json(store.get(HEAD_KEY).data)


def test_a_leader_tells_that_the_store_answers_when_head_is_its_own_and_not_before(store):
    """What comes then, adopting and choosing, can take long, and is no outage."""
    told = []

    def claim(attempt):
        mine, config = ledger(store, "a"), training_config()
        answered = lambda: told.append(head(store).attempt)  # noqa: E731
        preflight.claim(attempt, config, mine, store.uri, "127.0.0.1", answered=answered).listener.close()

    claim(2)
    assert told == [2]
    with pytest.raises(preflight.FencedByHead):
        claim(1)
    assert told == [2]


def test_head_that_somebody_put_back_meanwhile_is_claimed_again(store, monkeypatch):
    mine, answers = ledger(store, "a"), [Fenced(1)]
    adopt = mine.adopt
    monkeypatch.setattr(mine, "adopt", lambda claimed: answers.pop() if answers else adopt(claimed))
    preflight.claim(2, training_config(), mine, store.uri, "127.0.0.1").listener.close()
    assert (answers, head(store).attempt) == ([], 2)


def test_the_first_claim_makes_head_without_entries(store):
    store.put("unrelated.txt", b"")
    claimed = ledger(store, "a").claim(1, "Own")
    assert isinstance(claimed, Claimed)
    assert claimed.head == head(store)
    assert (claimed.head.attempt, claimed.head.holder, claimed.head.entries) == (1, "a", ())


def test_a_higher_attempt_takes_head_over_and_a_lower_one_is_told_by_whom_it_is_fenced(store):
    ledger(store, "a").claim(1, "Own")
    assert isinstance(ledger(store, "b").claim(4, "Own"), Claimed)
    assert ledger(store, "a").claim(2, "Own") == Fenced(4)
    assert head(store).holder == "b"


def test_an_attempt_has_one_holder(store):
    ledger(store, "a").claim(1, "Own")
    assert ledger(store, "b").claim(1, "Own") == Fenced(1)


def test_claiming_again_what_one_has_changes_nothing(store):
    mine = ledger(store, "a")
    mine.claim(1, "Own")
    before = store.get(HEAD_KEY)
    assert isinstance(mine.claim(1, "Own"), Claimed)
    assert store.get(HEAD_KEY) == before


def test_head_of_another_run_is_refused_with_what_to_do(store):
    ledger(store, "a").claim(1, "Own")
    outcome = ledger(store, "b", OTHER).claim(5, "Own")
    assert isinstance(outcome, Foreign)
    assert "uid-1" in outcome.message
    assert "Adopt" in outcome.message
    assert head(store).run_uid == "uid-1"


def test_adopt_takes_over_the_entries_and_must_go_beyond_the_attempt_found(store):
    first = ledger(store, "a")
    first.claim(3, "Own")
    first.choose(head(store))
    save_shard(store, 3, 10)
    committed = first.commit(3, 10)
    second = ledger(store, "b", OTHER)
    assert second.claim(1, "Adopt") == Fenced(3)
    claimed = second.claim(4, "Adopt")
    assert isinstance(committed, Committed)
    assert isinstance(claimed, Claimed)
    assert claimed.head.run_uid == "uid-2"
    assert claimed.head.entries == (committed.entry,)
    save_shard(store, 3, 20)
    assert first.commit(3, 20) == Fenced(4), "the run that was taken over must not commit"


def test_a_claim_whose_answer_was_lost_is_no_defeat():
    store = MemoryStore()
    store.fates = ["answer lost"]
    claimed = ledger(store, "a").claim(1, "Own")
    assert isinstance(claimed, Claimed)
    assert head(store) == claimed.head


def test_a_claim_whose_request_was_lost_is_tried_again():
    store = MemoryStore()
    store.fates = ["request lost", "request lost"]
    assert isinstance(ledger(store, "a").claim(1, "Own"), Claimed)


def test_a_store_that_never_answers_leaves_the_outcome_unknown():
    store = MemoryStore()
    store.fates = ["request lost"] * 50
    with pytest.raises(Unreachable, match="outcome"):
        ledger(store, "a").claim(1, "Own")


def test_checkpoints_without_head_stop_the_run_instead_of_starting_at_zero(store):
    mine = ledger(store, "a")
    mine.claim(1, "Own")
    mine.choose(head(store))
    save_shard(store, 1, 10)
    mine.commit(1, 10)
    store.delete(HEAD_KEY)
    with pytest.raises(CheckpointLost, match="restore"):
        ledger(store, "b").claim(2, "Own")


def test_an_unreadable_head_stops_the_run(store):
    store.put(HEAD_KEY, b"{")
    with pytest.raises(CheckpointLost, match="not JSON"):
        ledger(store, "a").claim(1, "Own")
