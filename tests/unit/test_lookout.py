"""What the fork server sees of its workers, and what is read from the kernel and the flight recorder."""

from __future__ import annotations

import signal
from pathlib import Path

from starcoder_trainer.contract.worker import Collective, Look, Seen, Sight, decode_line, encode_line
from starcoder_trainer.lookout import STACKS_SECONDS, Lookout
from starcoder_trainer.proc_state import proc_state
from starcoder_trainer.witness import last_collective

DEAD = 2**22 + 7
"""No process: above the kernel's largest."""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def process(proc: Path, pid: int, state: str, *, catches: int = 0, blocks: int = 0, wchan: str = "0") -> None:
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    (folder / "status").write_text(f"Name:\tpython\nState:\t{state}\nSigBlk:\t{blocks:016x}\nSigCgt:\t{catches:016x}\n")
    (folder / "wchan").write_text(wchan)


def test_the_kernels_word_about_a_process_is_read(tmp_path: Path) -> None:
    usr1, usr2 = 1 << (signal.SIGUSR1 - 1), 1 << (signal.SIGUSR2 - 1)
    process(tmp_path, 7, "T (stopped)", catches=usr1, blocks=usr2, wchan="do_signal_stop")
    found = proc_state(7, tmp_path)
    assert (found.state, found.waits_in) == ("T", "do_signal_stop")
    assert found.answers(signal.SIGUSR1)
    assert found.answers(signal.SIGUSR2)
    assert not found.answers(signal.SIGHUP)


def test_of_a_process_that_is_gone_nothing_is_known(tmp_path: Path) -> None:
    found = proc_state(7, tmp_path)
    assert (found.state, found.waits_in, found.answers(signal.SIGUSR1)) == ("", "", False)


def test_a_look_without_stacks_is_answered_at_once(tmp_path: Path) -> None:
    process(tmp_path, DEAD, "S (sleeping)", wchan="futex_wait")
    lookout = Lookout(Clock(), tmp_path)
    assert lookout.patience() is None
    assert lookout.answer({4: DEAD}) is None, "nothing was asked"
    lookout.ask(Look(3), {4: DEAD})
    assert lookout.patience() == 0.0
    assert lookout.answer({4: DEAD}) == Seen(3, (Sight(4, DEAD, "S", "futex_wait"),))
    assert lookout.answer({4: DEAD}) is None, "once"


def test_stacks_are_what_a_worker_prints_until_the_answer_is_due(tmp_path: Path) -> None:
    clock = Clock()
    process(tmp_path, DEAD, "S (sleeping)")
    lookout = Lookout(clock, tmp_path)
    lookout.printed(4, b"before")
    lookout.ask(Look(3, stacks=True), {4: DEAD})
    assert lookout.patience() == STACKS_SECONDS
    lookout.printed(4, b"Thread 1")
    lookout.printed(5, b"of another worker")
    lookout.printed(4, b"  File x")
    lookout.collective(Collective(3, 4, True, "waits"))
    clock.now += STACKS_SECONDS / 2
    lookout.ask(Look(3), {4: DEAD})
    assert lookout.answer({4: DEAD}) is None, "a simple look in between waits with it"
    clock.now += STACKS_SECONDS / 2
    seen = lookout.answer({4: DEAD})
    assert seen is not None
    assert seen.stacks
    (one,) = seen.workers
    assert one.stacks == "Thread 1\n  File x\n"
    assert one.collective == Collective(3, 4, True, "waits")
    assert decode_line(encode_line(seen)) == seen


def test_workers_that_are_about_to_be_killed_are_heard_with_what_they_have_said(tmp_path: Path) -> None:
    process(tmp_path, DEAD, "S (sleeping)")
    lookout = Lookout(Clock(), tmp_path)
    lookout.ask(Look(3, stacks=True), {4: DEAD})
    lookout.printed(4, b"Thread 1")
    seen = lookout.answer({4: DEAD}, at_once=True)
    assert seen == Seen(3, (Sight(4, DEAD, "S", "", "Thread 1\n"),), stacks=True)
    assert lookout.patience() is None


def test_before_a_simple_look_is_due_there_is_nothing_to_hear(tmp_path: Path) -> None:
    lookout = Lookout(Clock(), tmp_path)
    assert lookout.answer({4: DEAD}, at_once=True) is None


def test_a_worker_that_ends_before_the_answer_is_due_is_heard_and_told_apart(tmp_path: Path) -> None:
    """Another Pod was faster to end its own, and broke this one's connections."""
    clock = Clock()
    process(tmp_path, DEAD, "S (sleeping)")
    process(tmp_path, DEAD + 1, "S (sleeping)")
    lookout = Lookout(clock, tmp_path)
    lookout.ask(Look(3, stacks=True), {4: DEAD, 5: DEAD + 1})
    lookout.printed(4, b"Thread 1")
    lookout.collective(Collective(3, 4, True, "waits"))
    clock.now += STACKS_SECONDS
    seen = lookout.answer({5: DEAD + 1})
    assert seen is not None
    assert seen.workers == (
        Sight(4, DEAD, "", "", "Thread 1\n", Collective(3, 4, True, "waits")), Sight(5, DEAD + 1, "S"),
    )  # fmt: skip


def entry(number: int, retired: bool, **more: object) -> dict[str, object]:
    return {
        "collective_seq_id": number, "p2p_seq_id": 0, "is_p2p": False, "profiling_name": "gloo:all_reduce",
        "process_group": ["0", "default_pg"], "input_sizes": [[4]], "retired": retired, "state": "scheduled",
        "time_created_ns": 1_000_000_000 * number, **more,
    }  # fmt: skip


def test_the_oldest_collective_that_has_not_ended_is_the_one_that_is_waited_for() -> None:
    record = {"entries": [entry(1, True), entry(2, False), entry(3, False)]}
    assert last_collective(record, 62_000_000_000) == (
        True, "waits since 60 s in gloo:all_reduce number 2 of group default_pg, sizes [[4]]",
    )  # fmt: skip


def test_where_all_have_ended_the_rank_is_outside_of_them() -> None:
    found = last_collective({"entries": [entry(1, True), entry(2, False, state="completed")]}, 3_000_000_000)
    assert found is not None
    assert not found[0]
    assert found[1].startswith("is in no collective; its last, 1 s ago, was gloo:all_reduce number 2")


def test_without_a_record_nothing_is_said() -> None:
    assert last_collective({}, 0) is None
    assert last_collective({"entries": []}, 0) is None
