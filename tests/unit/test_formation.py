"""The attempt's decision, one look at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from starcoder_operator.domain import formation
from starcoder_operator.domain.formation import Decision, Ended, Finished, Go, Hold, Stay, Unclear
from starcoder_operator.domain.members import members_of
from starcoder_operator.domain.snapshot import LeaseView, Snapshot
from starcoder_trainer.contract.report import Problem
from tests.support.scenarios import Scenario, make_run


def decide(snapshot: Snapshot, config: str | None = None) -> Decision:
    written = snapshot.assignment.config_json if snapshot.assignment else ""
    return formation.decide(snapshot, members_of(snapshot), written if config is None else config)


def held() -> Scenario:
    """Attempt 1 is held, all agents are in it and idle, the leader has made its offer."""
    run = make_run().workers(2)
    while not isinstance(decide(run.snapshot), Go):
        run.round()
    return run


def with_report(before: Snapshot, member: int, **fields: Any) -> Snapshot:
    def changed(lease: LeaseView) -> LeaseView:
        if lease.member != member or lease.report is None:
            return lease
        return replace(lease, report=replace(lease.report, **fields))

    return replace(before, leases=tuple(changed(lease) for lease in before.leases))


def test_the_first_attempt_is_held_before_anybody_answers() -> None:
    decision = decide(make_run().workers(2).snapshot)
    assert isinstance(decision, Hold)
    assert (decision.assignment.attempt, decision.assignment.phase) == (1, "hold")
    assert [m.boot_id for m in decision.assignment.members] == ["", ""]


def test_an_attempt_runs_once_all_are_idle_and_the_leader_offers() -> None:
    snapshot = held().snapshot
    decision = decide(snapshot)
    assert isinstance(decision, Go)
    report = snapshot.leases[0].report
    assert report is not None
    assert decision.assignment.offer == report.offer
    assert [m.index for m in decision.assignment.members] == [0, 1]


@pytest.mark.parametrize(
    ("member", "fields", "waits_for"),
    [
        (1, {"state": "draining", "attempt": 0}, "members 1 to be idle"),
        (1, {"attempt": 0}, "members 1 to be idle"),
        (0, {"offer": None}, "the leader, member 0, to claim HEAD"),
        (0, {"problem": Problem("DataNotFound", "x")}, "members 0 can't go on"),
    ],
)
def test_an_attempt_waits_for_those_who_are_not_ready(member: int, fields: dict[str, Any], waits_for: str) -> None:
    decision = decide(with_report(held().snapshot, member, **fields))
    assert isinstance(decision, Stay)
    assert waits_for in decision.waiting


@pytest.mark.parametrize(
    ("member", "fields", "attempt"),
    [
        (1, {"boot_id": "another"}, 2),
        (0, {"fenced_by": 7}, 8),
        (1, {"state": "failed"}, 2),
    ],
)
def test_a_held_attempt_that_can_t_run_any_more_gives_way_to_the_next(
    member: int, fields: dict[str, Any], attempt: int
) -> None:
    decision = decide(with_report(held().snapshot, member, **fields))
    assert isinstance(decision, Hold)
    assert decision.assignment.attempt == attempt


def test_a_changed_configuration_is_held_in_a_new_attempt() -> None:
    decision = decide(held().snapshot, config="{}")
    assert isinstance(decision, Hold)
    assert decision.assignment.attempt == 2


def test_a_lost_follower_leaves_its_place_open_in_the_same_attempt_and_a_lost_leader_ends_it() -> None:
    run = held()
    for member, attempt in ((1, 1), (0, 2)):
        snapshot = run.snapshot
        pods = tuple(replace(p, deleting=p.member == member) for p in snapshot.pods)
        decision = decide(replace(snapshot, pods=pods))
        assert isinstance(decision, Hold)
        assert decision.assignment.attempt == attempt
        assert [bool(m.boot_id) for m in decision.assignment.members] == [member != 0, member != 1]


def test_nothing_is_judged_while_no_agent_is_heard() -> None:
    for run in (held(), make_run().workers(2).training()):
        snapshot = run.snapshot
        silent = replace(snapshot, leases=tuple(replace(lease, age=99.0) for lease in snapshot.leases))
        assert isinstance(decide(silent), Unclear)


def test_what_is_recorded_and_not_written_is_written_as_it_is() -> None:
    snapshot = make_run().workers(2).training().snapshot
    decision = decide(replace(snapshot, status=snapshot.status.model_copy(update={"attempt": 5})))
    assert isinstance(decision, Hold)
    assert decision.assignment.attempt == 5


def test_an_assignment_of_another_run_is_none() -> None:
    snapshot = make_run().workers(2).training().snapshot
    assert formation.own_assignment(replace(snapshot, uid="another")) is None


def test_the_next_attempt_is_beyond_all_that_anybody_spoke_of() -> None:
    snapshot = make_run().workers(2).training().snapshot
    assert formation.next_attempt(with_report(snapshot, 1, attempt=4)) == 5
    assert formation.next_attempt(with_report(snapshot, 1, fenced_by=9)) == 10


def test_a_run_whose_last_checkpoint_is_in_head_is_finished_before_it_begins() -> None:
    run = held()
    snapshot = run.snapshot
    training = snapshot.spec.training.model_copy(update={"iterations": 10})
    complete = make_run().workers(2).until(lambda s: s.checkpoint is not None).status.checkpoint
    status = snapshot.status.model_copy(update={"checkpoint": complete})
    spec = snapshot.spec.model_copy(update={"training": training})
    assert isinstance(decide(replace(snapshot, spec=spec, status=status)), Finished)


def test_a_failure_after_the_last_checkpoint_is_none() -> None:
    run = make_run().workers(2).until(lambda s: s.iteration >= 95)
    while not formation.is_complete(run.snapshot):
        run.cluster.settle_cluster()
    snapshot = with_report(run.snapshot, 1, state="failed", attempt=1)
    assert isinstance(decide(snapshot), Finished)


def test_a_running_attempt_that_fails_ends_with_its_cause() -> None:
    decision = decide(make_run().workers(2).training().worker_fails(1).snapshot)
    assert isinstance(decision, Ended)
    assert decision.failure.cause == "Crash"
