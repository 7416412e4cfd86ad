"""The verdict over a soak."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from bench.soak.judge import NEAR, Verdict, judge, unaccounted
from bench.soak.kept import damaged
from bench.soak.losses import Losses, Told
from bench.soak.trunk import HistoryGap, Stretch, Trunk
from bench.soak.undisturbed import Undisturbed
from devcluster.cluster import Cluster
from starcoder_trainer.agent.ledger import Ledger
from starcoder_trainer.agent.messages import Upload
from starcoder_trainer.agent.upload import upload_shard
from starcoder_trainer.contract.assignment import Layout
from starcoder_trainer.contract.config import RunIdentity
from starcoder_trainer.contract.ledger import HEAD_KEY, Entry, Head, RankManifest
from starcoder_trainer.contract.worker import Saved
from starcoder_trainer.storage.file import FileStore

NOW = datetime(2026, 1, 1, 0, 1, 40, tzinfo=UTC)
WHOLE, HALF = Layout(2, 1, 2), Layout(2, 1, 1)
TRUNK = Trunk({2: 1, 4: 1, 6: 2, 8: 4}, {1: WHOLE, 2: WHOLE, 4: HALF})
CALM = Undisturbed({i: f"{10 - i}.0" for i in range(1, 9)}, {})


def told(start: int, layout: Layout, *losses: str) -> Told:
    """Of the iterations from `start` on."""
    return Told(start, layout, {start + i: {loss} for i, loss in enumerate(losses, 1)})


def verdict(**attempts: Told) -> Verdict:
    """`a1=` is attempt 1."""
    return judge(TRUNK, [2, 4, 8], {int(name[1:]): said for name, said in attempts.items()}, CALM)


def test_a_run_that_lost_nothing_and_has_every_loss_is_good() -> None:
    found = verdict(
        a1=told(0, WHOLE, "9.0", "8.0", "7.0", "6.0", "5.0"),
        a2=told(4, WHOLE, "5.0", "4.0"),
        a4=told(6, HALF, "3.0", "2.0", "1.0"),
    )
    assert found.good
    assert (found.compared, found.abandoned) == (8, 1)


def test_a_checkpoint_that_goes_back_is_lost() -> None:
    assert judge(TRUNK, [4, 8, 6], {1: told(0, WHOLE, "9.0")}, CALM).lost == 1


def test_a_checkpoint_that_is_listed_and_not_whole_is_lost() -> None:
    found = judge(TRUNK, [4, 8], {1: told(0, WHOLE, "9.0")}, CALM, damaged=1)
    assert found.lost == 1
    assert not found.good


@pytest.mark.parametrize("harm", ["byte", "file"])
def test_what_head_lists_is_read_back(tmp_path: Path, harm: str) -> None:
    folder, store = tmp_path / "scratch", FileStore(f"file://{tmp_path}/store")
    folder.mkdir()
    (tmp_path / "store").mkdir()
    ledger = Ledger(store, RunIdentity("soak", "default", "uid"), "boot", 3, pause=lambda _: None)
    ledger.claim(1, "Own")
    for step in (2, 4):
        (folder / "rank-00000.bin").write_bytes(bytes(range(64)))
        manifest = RankManifest(1, step, 0, ("rank-00000.bin",), (), {"step": str(step)})
        (folder / "rank-00000.json").write_text(manifest.to_json())
        upload_shard(store, 0, Upload(1, step, 1, (Saved(1, 0, step, str(folder), 0.1, 64),)))
        ledger.commit(1, step)
    head = Head.from_json(store.get(HEAD_KEY).data)
    assert [entry.step for entry in head.entries] == [2, 4]
    assert damaged(store, head) == ()
    path = tmp_path / "store" / "a1" / "step-00000002" / "rank-00000.bin"
    if harm == "byte":
        path.write_bytes(bytes(64))
    else:
        path.unlink()
    (found,) = damaged(store, head)
    assert found.startswith("iteration 2 of attempt 1: ")


def test_a_restart_at_zero_after_a_checkpoint_is_seen() -> None:
    found = verdict(a1=told(0, WHOLE, "9.0"), a2=told(0, WHOLE, "9.0"))
    assert found.restarts_at_zero == 1
    assert not found.good


def test_a_loss_that_counts_is_equal_to_the_last_digit() -> None:
    assert verdict(a4=told(6, HALF, "3.0000001")).different
    assert verdict(a4=Told(6, HALF, {7: {"3.0", "3.0000001"}})).different, "two Pods of one attempt"


def test_a_loss_that_does_not_count_is_equal_to_the_last_digit_in_the_same_layout() -> None:
    assert not verdict(a1=told(4, WHOLE, "5.0")).different
    assert verdict(a1=told(4, WHOLE, "5.0000001")).different


def test_in_another_layout_a_loss_that_does_not_count_may_differ_by_rounding() -> None:
    assert verdict(a3=told(6, WHOLE, "3.00001")).good is False, "nothing that counts was compared"
    assert not verdict(a3=told(6, WHOLE, "3.00001")).different
    assert verdict(a3=told(6, WHOLE, "3.001")).different
    assert verdict(a2=told(4, WHOLE, "5.0", "4.0", "3.001")).different, "beyond what it committed"


def test_far_from_where_the_layouts_parted_rounding_may_be_anything() -> None:
    far = NEAR + 1
    trunk = Trunk({far: 2}, {2: HALF})
    calm = Undisturbed({far - 1: "3.0", far: "3.0"}, {})
    found = judge(trunk, [far], {1: Told(0, WHOLE, {far - 1: {"3.1"}, far: {"3.1"}})}, calm)
    assert len(found.different) == 1


def test_losses_on_both_sides_of_a_change_of_layout_differ_by_rounding_alone() -> None:
    def beside(loss: str) -> Verdict:
        return judge(TRUNK, [8], {4: told(6, HALF, "3.0")}, Undisturbed(CALM.losses, {7: loss}))

    assert beside("3.00001").good
    assert beside("3.001").different


def test_nothing_compared_is_not_good() -> None:
    assert not verdict().good


def test_seconds_that_are_in_no_bucket_or_in_two_are_not_good() -> None:
    def run(**buckets: float) -> dict[str, object]:
        return {"metadata": {"creationTimestamp": "2026-01-01T00:00:00Z"}, "status": {"goodput": {"buckets": buckets}}}

    assert unaccounted(run(queued=10.0, training=90.0), NOW) == 0
    assert unaccounted(run(queued=10.0, training=85.0), NOW) == pytest.approx(0.05)
    assert unaccounted(run(queued=10.0, training=95.0), NOW) == pytest.approx(0.05)
    sound = {1: told(0, WHOLE, "9.0")}
    assert judge(TRUNK, [8], sound, CALM, unaccounted=0.009).good
    assert not judge(TRUNK, [8], sound, CALM, unaccounted=0.05).good


def test_what_lies_between_two_checkpoints_was_trained_by_the_attempt_that_committed_the_later_one() -> None:
    assert TRUNK.stretches() == (Stretch(6, WHOLE), Stretch(8, HALF))
    assert [TRUNK.trained_by(i) for i in (1, 4, 5, 7, 8, 9)] == [1, 1, 2, 4, 4, None]
    assert TRUNK.is_all(WHOLE, 0, 6)
    assert TRUNK.is_all(HALF, 6, 8)
    assert not TRUNK.is_all(WHOLE, 5, 7)
    assert not TRUNK.is_all(HALF, 6, 9), "nobody knows of the last"


def test_checkpoints_that_came_and_went_unseen_are_an_error() -> None:
    trunk = Trunk()
    trunk.see([Entry(20, 1, "", "", 0), Entry(40, 1, "", "", 0)], lambda _: WHOLE)
    trunk.see([Entry(40, 1, "", "", 0), Entry(60, 3, "", "", 0)], lambda _: HALF)
    assert trunk.stretches() == (Stretch(40, WHOLE), Stretch(60, HALF))
    with pytest.raises(HistoryGap, match="from iteration 100 on, and was last seen with that of 60"):
        trunk.see([Entry(100, 3, "", "", 0)], lambda _: HALF)


def test_a_log_tells_losses_of_the_attempt_that_began_last() -> None:
    log = (
        "INFO starcoder_trainer.worker: iteration 40 of 100; attempt 3, TP2 x PP1 x DP2; formed in 0.30 s",
        "INFO starcoder_trainer.worker: iteration 41/100 | loss 4.25 | learning rate 1.000e-03 | 0.2 s",
        "INFO starcoder_trainer.worker: iteration 40 of 100; attempt 4, TP2 x PP1 x DP1; formed in 0.30 s",
        "INFO starcoder_trainer.worker: iteration 41/100 | loss 4.5 | learning rate 1.000e-03 | 0.2 s",
        "INFO starcoder_trainer.worker: iteration 42/100 | loss 4.1",
    )
    losses = Losses(Cluster("unused"), "soak")
    losses.take(log)
    losses.take(log[:2])
    assert losses.attempts == {3: Told(40, WHOLE, {41: {"4.25"}}), 4: Told(40, HALF, {41: {"4.5"}})}
