"""Causes: recognised on one member, chosen among many, charged and put right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest

from starcoder_operator.api.v1alpha1 import StarCoderRunStatus
from starcoder_operator.domain import failure
from starcoder_operator.domain.failure import CAUSES, Cause, Charge, Failure
from starcoder_operator.domain.hearing import USUAL
from starcoder_operator.domain.members import MemberView, members_of
from starcoder_operator.domain.snapshot import ContainerView, Snapshot
from starcoder_trainer.contract import names
from starcoder_trainer.contract import report as contract
from tests.support.scenarios import make_run

NOW = "2026-01-01T00:00:00Z"


def snapshot() -> Snapshot:
    """Two members that train in attempt 1."""
    return make_run().workers(2).training().snapshot


def found(after: Snapshot) -> tuple[Failure, ...]:
    assert after.assignment is not None
    boot_ids = {m.index: m.boot_id for m in after.assignment.assignment.members}
    return failure.find(members_of(after), 1, boot_ids)


def with_report(before: Snapshot, **fields: Any) -> Snapshot:
    """Member 1's report changed."""
    first, second = before.leases
    assert second.report is not None
    return replace(before, leases=(first, replace(second, report=replace(second.report, **fields))))


def with_pod(before: Snapshot, **fields: Any) -> Snapshot:
    return replace(before, pods=tuple(replace(p, **fields) if p.member == 1 else p for p in before.pods))


def only_cause(after: Snapshot) -> Cause:
    (one,) = found(after)
    assert one.member == 1
    return one.cause


def worker(**fields: Any) -> dict[str, Any]:
    return {"containers": (ContainerView(names.CONTAINER_WORKER, False, 1, **fields),)}


AGENT_WENT = ContainerView(names.CONTAINER_AGENT, False, 1, exit_code=255, terminated_reason="Unknown")
AGENT_DOWN = ContainerView(names.CONTAINER_AGENT, False, 0, exit_code=137, terminated_reason="Error")


def test_a_gang_that_trains_shows_no_failure() -> None:
    assert found(snapshot()) == ()


@pytest.mark.parametrize("cause", get_args(contract.Cause))
def test_what_an_agent_reports_is_taken_as_it_says(cause: contract.Cause) -> None:
    said = contract.Failure(cause, "words", exit_code=70, rank=3)
    (one,) = found(with_report(snapshot(), state="failed", failure=said))
    assert (one.cause, one.message, one.exit_code, one.pod) == (cause, "rank 3: words", 70, "a-w1-0")


@pytest.mark.parametrize(
    ("after", "cause"),
    [
        (with_pod(snapshot(), deleting=True), Cause.POD_DELETED),
        (with_pod(snapshot(), deleting=True, disruption="EvictionByEvictionAPI"), Cause.DISRUPTED),
        (with_pod(snapshot(), phase="Failed"), Cause.POD_FAILED),
        (with_pod(snapshot(), phase="Succeeded"), Cause.CONTAINER_CRASHED),
        (with_pod(snapshot(), **worker(exit_code=1, terminated_reason="Error")), Cause.CONTAINER_CRASHED),
        (with_pod(snapshot(), **worker(exit_code=137, terminated_reason="OOMKilled")), Cause.OUT_OF_MEMORY),
        (with_pod(snapshot(), **worker(exit_code=255, terminated_reason="Unknown")), Cause.NODE_RESTARTED),
        (with_pod(snapshot(), containers=(AGENT_WENT,)), Cause.NODE_RESTARTED),
        (with_pod(with_report(snapshot(), boot_id="another"), containers=(AGENT_WENT,)), Cause.NODE_RESTARTED),
        (with_report(snapshot(), boot_id="another"), Cause.AGENT_RESTARTED),
        (with_pod(snapshot(), containers=(AGENT_DOWN,)), Cause.AGENT_RESTARTED),
        (with_report(snapshot(), fenced_by=2), Cause.FENCED),
        (with_report(snapshot(), state="failed", failure=None), Cause.CRASH),
    ],
)
def test_a_failure_is_recognised_by_its_sign(after: Snapshot, cause: Cause) -> None:
    assert only_cause(after) is cause


def test_a_pod_that_its_node_gave_up_is_told_with_the_kubelets_words() -> None:
    (one,) = found(with_pod(snapshot(), phase="Failed", why="UnexpectedAdmissionError: no device left"))
    assert one.message == "Pod a-w1-0 was given up by node node-1 (UnexpectedAdmissionError: no device left)"


def test_a_dead_node_is_the_cause_whatever_its_pod_says() -> None:
    before = with_pod(snapshot(), deleting=True, disruption="DeletionByTaintManager")
    nodes = before.nodes | {"node-1": replace(before.nodes["node-1"], ready=None)}
    leases = (before.leases[0], replace(before.leases[1], age=USUAL.heard))
    assert only_cause(replace(before, nodes=nodes, leases=leases)) is Cause.NODE_LOST


def test_a_silent_agent_among_others_that_answer_is_unresponsive() -> None:
    before = snapshot()
    first, second = before.leases
    assert only_cause(replace(before, leases=(first, replace(second, age=60.0)))) is Cause.AGENT_UNRESPONSIVE


def test_a_silent_agent_whose_container_starts_again_keeps_its_pod_for_a_while() -> None:
    before = with_pod(snapshot(), containers=(AGENT_DOWN,))
    first, second = before.leases

    def silent_for(age: float) -> Snapshot:
        return replace(before, leases=(first, replace(second, age=age)))

    limits = replace(USUAL, stale=15.0)
    assert [m.loss is None for m in members_of(silent_for(14.0), limits)] == [True, True]
    assert [m.loss is None for m in members_of(silent_for(15.0), limits)] == [True, False]


def test_an_agent_that_started_again_and_has_not_spoken_yet_keeps_its_pod_for_a_while() -> None:
    started = ContainerView(names.CONTAINER_AGENT, True, 1, exit_code=137, terminated_reason="Error")
    before = with_pod(snapshot(), containers=(started,), agent_changed=2.0)
    first, second = before.leases
    assert first.report is not None
    relay = replace(first, report=replace(first.report, suspects=(1,)), witnessed=True)
    missed = replace(second, age=4.0, renewed=4.0, witnessed=True)

    def stands(pods: Snapshot) -> bool:
        return members_of(replace(pods, leases=(relay, missed)))[1].loss is None

    assert stands(before)
    assert not stands(with_pod(before, agent_changed=None))
    assert not stands(with_pod(before, agent_changed=60.0)), "that one has spoken since"


def test_a_container_that_went_waits_for_what_the_kubelet_says_of_it() -> None:
    gone = contract.Failure("ContainerCrashed", "the fork server went away")
    (unexplained,) = found(with_report(snapshot(), state="failed", failure=gone))
    assert unexplained.may_have_another_cause
    killed = worker(exit_code=137, terminated_reason="OOMKilled")
    (explained,) = found(with_pod(with_report(snapshot(), state="failed", failure=gone), **killed))
    assert explained.cause is Cause.OUT_OF_MEMORY
    assert not explained.may_have_another_cause


@pytest.mark.parametrize("fields", [{"deleting": True}, {"phase": "Succeeded"}])
def test_a_member_that_is_done_fails_no_more(fields: dict[str, Any]) -> None:
    assert found(with_pod(with_report(snapshot(), state="done"), **fields)) == ()


def test_what_an_agent_said_of_an_attempt_before_is_no_failure_of_this_one() -> None:
    said = contract.Failure("Crash", "old")
    assert found(with_report(snapshot(), attempt=0, state="failed", failure=said)) == ()


def test_a_worker_container_that_ended_before_and_runs_again_is_no_failure() -> None:
    again = ContainerView(names.CONTAINER_WORKER, True, 1, exit_code=1, terminated_reason="Error")
    assert found(with_pod(snapshot(), containers=(again,))) == ()


def test_of_many_failures_the_one_that_explains_the_others_is_the_cause() -> None:
    signs = [Failure(cause, i, f"p{i}", "", "") for i, cause in enumerate(reversed(Cause))]
    chosen = failure.primary(signs)
    assert chosen is not None
    assert chosen.cause is next(iter(CAUSES))
    assert failure.primary([]) is None


def test_of_equal_failures_the_lowest_member_s_is_told() -> None:
    chosen = failure.primary([Failure(Cause.PEER, i, "", "", "") for i in (3, 1, 2)])
    assert chosen is not None
    assert chosen.member == 1


def test_infrastructure_is_charged_to_nobody() -> None:
    free = {cause for cause, rule in CAUSES.items() if rule.charge is Charge.NOBODY}
    assert free == {
        Cause.NODE_LOST, Cause.DEVICE_UNHEALTHY, Cause.DISRUPTED, Cause.POD_DELETED, Cause.POD_FAILED,
        Cause.NODE_RESTARTED, Cause.STORAGE, Cause.DATA_STALL, Cause.AGENT_UNRESPONSIVE, Cause.FENCED,
        Cause.NETWORK_CUT,
    }  # fmt: skip


@pytest.mark.parametrize("cause", list(Cause))
def test_a_failure_is_counted_by_cause_and_charged_by_its_rule(cause: Cause) -> None:
    after = failure.charged(StarCoderRunStatus(), Failure(cause, 0, "p", "n", "why", 70), NOW)
    assert (after.restarts.total, after.restarts.by_cause) == (1, {cause: 1})
    assert after.restarts_without_progress == (CAUSES[cause].charge is Charge.RUN)
    assert after.last_failure is not None
    assert after.last_failure.to_dict() == {
        "cause": cause, "node": "n", "nodes": ["n"], "pod": "p", "member": 0, "exitCode": 70,
        "message": "why", "at": NOW,
    }  # fmt: skip


def test_a_better_cause_found_later_moves_the_count_and_gives_the_charge_back() -> None:
    before = failure.charged(StarCoderRunStatus(), Failure(Cause.CRASH, 0, "", "", ""), NOW)
    before = failure.charged(before, Failure(Cause.PEER, 1, "", "", ""), NOW)
    after = failure.reattributed(before, Failure(Cause.NODE_LOST, 2, "p", "n", "dead"))
    assert (after.restarts.total, after.restarts.by_cause) == (2, {"Crash": 1, "NodeLost": 1})
    assert after.restarts_without_progress == 1
    assert after.last_failure is not None
    assert (after.last_failure.cause, after.last_failure.at) == ("NodeLost", NOW)


def test_progress_gives_all_charges_back_and_keeps_the_counts() -> None:
    before = failure.charged(StarCoderRunStatus(), Failure(Cause.CRASH, 0, "", "", ""), NOW)
    after = failure.refunded(before)
    assert (after.restarts_without_progress, after.restarts.total) == (0, 1)


def test_a_member_that_is_not_lost_has_no_loss_to_tell() -> None:
    member: MemberView = members_of(snapshot())[0]
    assert failure.lost(member) is None


@pytest.mark.parametrize(
    "container", [AGENT_DOWN, replace(AGENT_DOWN, name=names.CONTAINER_WORKER)], ids=lambda c: c.name
)
def test_what_the_kubelet_says_of_a_container_is_behind_once_its_agent_was_heard_since(
    container: ContainerView,
) -> None:
    """The container was started again, and the attempt of the agent in it would be charged for the end of the last."""
    down = with_pod(snapshot(), containers=(container,), containers_for=1.0)
    first, second = down.leases
    assert found(replace(down, leases=(first, replace(second, renewed=2.0)))) != ()
    assert found(replace(down, leases=(first, replace(second, renewed=0.5)))) == ()
