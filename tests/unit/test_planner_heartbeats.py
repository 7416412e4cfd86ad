"""Heartbeats in the planner's scenarios: who is found lost, how soon, and what it costs the API server."""

from __future__ import annotations

from dataclasses import replace

import pytest

from starcoder_operator.domain import reasons
from starcoder_operator.domain.hearing import USUAL, Limits
from starcoder_operator.domain.looks import LOOK_AT_SUSPECT
from starcoder_operator.domain.members import LossKind, members_of
from starcoder_operator.domain.planner import plan
from starcoder_operator.domain.snapshot import Snapshot
from starcoder_trainer.contract.heartbeat import Rhythm
from tests.support.scenarios import Scenario, make_run

SOON = 5.0
"""Seconds: three beats, rounds of a second on both sides, and a pass."""


def training(workers: int, **changes: object) -> Scenario:
    """All but the relay rest, for longer than an agent may be silent."""
    return make_run().workers(workers).with_spec(training__iterations=10_000, **changes).training().until_quiet(20)


def relay_of(run: Scenario) -> int | None:
    assert run.cluster.assignment is not None
    relay = run.cluster.assignment.assignment.relay
    return relay.member if relay else None


def places(run: Scenario) -> list[bool]:
    assert run.cluster.assignment is not None
    return [bool(m.boot_id) for m in run.cluster.assignment.assignment.members]


@pytest.mark.parametrize("member", [0, 1, 2])
def test_a_lost_node_is_noticed_by_three_missed_beats_before_the_control_plane_says_anything(member: int) -> None:
    run = training(3)
    died = run.cluster.world.now
    run.node_dies(run.pod(member).view.node, noticed=False).until(lambda s: s.attempt == 2)
    assert run.cluster.world.now - died <= SOON
    assert run.status.last_failure is not None
    assert run.status.last_failure.cause == "AgentUnresponsive"
    assert f"the agent of Pod a-w{member}-0 misses its heartbeats" in run.status.last_failure.message


def test_two_beats_missed_end_no_attempt() -> None:
    run = training(3)
    node = run.pod(1).view.node
    run.cluster.down.add(node)
    run.round().round()
    run.cluster.down.discard(node)
    run.until_quiet(30)
    assert (run.status.attempt, run.status.restarts.total) == (1, 0)


@pytest.mark.parametrize("cut", [0, 2])
def test_who_loses_its_way_to_the_relay_and_renews_its_lease_is_not_lost(cut: int) -> None:
    run = training(3)
    run.cluster.cut_off = {cut}
    run.until_quiet(60)
    assert [bool(x.report and x.report.suspects) for x in run.cluster.leases.values()] == [True, cut == 0, True]
    assert (run.status.attempt, run.status.restarts.total, run.status.state) == (1, 0, "Running")
    run.cluster.cut_off = set()
    run.until_quiet(10)
    assert not any(x.report and x.report.suspects for x in run.cluster.leases.values())


@pytest.mark.parametrize(
    ("workers", "apart", "named"),
    [(3, {2}, 2), (3, {0}, 0), (2, {1}, 1), (2, {0}, 1), (5, {2, 3}, 2), (5, {1, 2, 3}, 0)],
    ids=["one of three", "the relay", "one of two", "the relay of two", "the smaller side", "the relay's side"],
)
def test_a_network_that_is_cut_between_living_agents_is_charged_to_nobody_and_told_by_node(
    workers: int, apart: set[int], named: int
) -> None:
    run = training(workers)
    run.cluster.cut_off = apart
    run.until_quiet(8)
    assert run.status.checkpoint is not None
    run.worker_fails(1, "Peer").passes()
    assert run.said("Training") == ("Unknown", reasons.PEER_LOST), "another cause may show"
    run.until(lambda s: s.attempt == 2)
    last = run.status.last_failure
    assert last is not None
    assert (run.status.attempt, last.cause, last.member) == (2, "NetworkCut", named)
    assert last.node == run.pod(named).view.node
    assert "reach the API server and not each other" in last.message
    assert run.status.restarts_without_progress == 0


def test_a_cut_that_shows_after_its_attempt_was_counted_is_charged_no_more_than_that_once() -> None:
    run = training(3)
    run.cluster.cut_off = {2}
    run.worker_fails(1, "Peer").until(lambda s: s.attempt == 2)
    assert run.status.restarts.by_cause == {"Peer": 1}
    run.until_quiet(5)
    for _ in range(6):
        if run.phase == "run" and run.status.state == "Running":
            run.worker_fails(1, "FormationTimeout")
        run.until_quiet(20)
    counted = run.status.restarts.by_cause
    assert counted.pop("Peer", 0) <= 1
    assert counted.keys() == {"NetworkCut"}
    assert run.status.state != "Failed"


def test_the_node_that_is_cut_off_twice_is_left() -> None:
    run = make_run().workers(3).on_nodes(4).with_spec(training__iterations=10_000).training().until_quiet(5)
    node = run.pod(2).view.node
    run.cluster.cut_off = {2}
    run.until_quiet(8).worker_fails(1, "Peer").until(lambda s: s.attempt == 2 and s.state == "Running")
    run.until_quiet(2).worker_fails(1, "Peer").until(lambda s: s.attempt == 3)
    run.until_quiet(3)
    assert [a.node for a in run.status.avoided_nodes] == [node]
    assert "a-w2-1" in run.pods


def test_attempts_that_a_cut_network_ends_come_ever_more_seldom() -> None:
    run = training(3, failurePolicy={"nodeAvoidance": {"ttl": "0s"}})
    run.cluster.cut_off = {2}
    run.until_quiet(8).worker_fails(1, "Peer").until(lambda _: run.phase == "run" and bool(run.pod(1).agent.running))
    run.worker_fails(1, "FormationTimeout").until(lambda s: s.attempt == 3).until_quiet(3)
    assert run.status.restarts.by_cause == {"NetworkCut": 2}
    assert run.said("Training") == ("False", reasons.BACKING_OFF)


def test_where_agents_never_heard_each_other_trying_ends() -> None:
    """A policy of the namespace, since before the run: no try helps."""
    run = make_run().workers(3).with_spec(training__iterations=10_000)
    run.cluster.cut_off = {1, 2}
    while run.status.state != "Failed":
        run.round()
        agent = run.pod(1).agent if "a-w1-0" in run.pods else None
        if agent is not None and agent.running and run.phase == "run":
            run.worker_fails(1, "FormationTimeout")
    assert run.status.state == "Failed"
    assert run.status.restarts.by_cause == {"FormationTimeout": 4}


def test_an_agent_that_was_started_again_is_not_cut_off() -> None:
    run = training(3)
    run.cluster.agent_restarts("a-w2-0")
    run.worker_fails(1, "Peer").until(lambda s: s.attempt == 2)
    run.until_quiet(20)
    assert "NetworkCut" not in run.status.restarts.by_cause


def test_a_hang_of_the_code_stays_one_where_agents_do_not_hear_each_other() -> None:
    """As where a policy forbids the heartbeats alone."""
    run = training(3)
    run.cluster.cut_off = {2}
    run.until_quiet(8).worker_fails(1, "Hang").until(lambda s: s.attempt == 2)
    assert run.status.restarts.by_cause == {"Hang": 1}


@pytest.mark.parametrize("workers", [2, 16])
def test_the_leases_of_all_but_the_relay_rest_while_the_gang_trains(workers: int) -> None:
    run = training(workers)
    before = {i: lease.writes for i, lease in run.cluster.leases.items()}
    run.until_quiet(60)
    written = {i: lease.writes - before[i] for i, lease in run.cluster.leases.items()}
    assert written.pop(0) > 0
    assert set(written.values()) == {0}


def test_leases_rest_while_a_gang_waits_for_a_node_and_a_second_loss_is_noticed_as_soon() -> None:
    run = training(3)
    run.node_dies(run.pod(1).view.node).until_quiet(10)
    assert (run.phase, relay_of(run)) == ("hold", 0)
    before = run.cluster.leases[2].writes
    run.until_quiet(60)
    assert run.cluster.leases[2].writes == before
    assert places(run) == [True, False, True]
    run.node_dies(run.pod(2).view.node, noticed=False)
    for _ in range(round(SOON)):
        run.round()
    assert places(run) == [True, False, False]


def test_where_the_leader_has_no_node_another_takes_the_beats_until_it_is_back() -> None:
    run = training(3)
    node = run.pod(0).view.node
    run.node_dies(node).until_quiet(10)
    assert (run.phase, relay_of(run)) == ("hold", 1)
    before = run.cluster.leases[2].writes
    run.until_quiet(60)
    assert run.cluster.leases[2].writes == before
    run.node_returns(node).training()
    assert relay_of(run) == 0


def test_agents_that_take_no_heartbeats_renew_their_leases_as_ever() -> None:
    run = make_run().workers(3).with_spec(training__iterations=10_000).without_relay().training()
    assert relay_of(run) is None
    before = run.cluster.leases[2].writes
    run.until_quiet(30)
    assert run.cluster.leases[2].writes - before >= 30
    run.node_dies(run.pod(2).view.node, noticed=False).until(lambda s: s.attempt == 2)
    assert run.status.state == "Recovering"


def suspected(member: int = 1) -> Snapshot:
    """The relay suspects the member, which has said nothing for a minute."""
    seen = training(3).snapshot
    relay = seen.leases[0]
    assert relay.report is not None
    return replace(seen, leases=tuple(
        replace(x, report=replace(relay.report, suspects=(member,))) if x.member == 0
        else replace(x, age=60.0, renewed=60.0) if x.member == member else x
        for x in seen.leases
    ))  # fmt: skip


def changed(seen: Snapshot, member: int, **fields: object) -> Snapshot:
    leases = (replace(x, **fields) if x.member == member else x for x in seen.leases)  # type: ignore[arg-type]
    return replace(seen, leases=tuple(leases))


def losses(seen: Snapshot, limits: Limits = USUAL) -> list[LossKind | None]:
    return [m.loss.kind if m.loss else None for m in members_of(seen, limits)]


def test_a_suspect_that_has_not_renewed_its_lease_is_lost_at_once() -> None:
    assert losses(suspected()) == [None, LossKind.SILENT, None]


def test_a_suspect_is_looked_at_when_its_last_renewal_is_as_old_as_three_beats() -> None:
    seen = changed(suspected(), 1, age=2.5, renewed=2.5)
    assert losses(seen) == [None, None, None]
    assert plan(seen).look_again == pytest.approx(0.55)
    assert losses(changed(seen, 1, age=3.0, renewed=3.0)) == [None, LossKind.SILENT, None]


@pytest.mark.parametrize("fields", [{"witnessed": False}, {"age": USUAL.heard, "renewed": USUAL.heard}])
def test_a_suspicion_of_before_an_outage_or_of_one_that_is_not_heard_itself_counts_for_nothing(
    fields: dict[str, object],
) -> None:
    seen = changed(changed(suspected(), 1, age=1.0), 0, **fields)
    assert losses(seen) == [None, None, None]


def test_a_suspicion_that_may_be_old_is_looked_at_again_soon() -> None:
    again = plan(changed(changed(suspected(), 1, age=1.0), 0, witnessed=False)).look_again
    assert again is not None
    assert again <= LOOK_AT_SUSPECT


def test_after_an_outage_a_suspect_has_a_longer_grace() -> None:
    seen = changed(suspected(), 1, witnessed=False, age=4.0, renewed=4.0)
    assert losses(seen) == [None, None, None]
    assert losses(changed(seen, 1, renewed=USUAL.heard)) == [None, LossKind.SILENT, None]


def test_one_that_is_no_relay_is_not_believed_about_others() -> None:
    seen = suspected()
    reports = {x.member: x.report for x in seen.leases}
    assert reports[0] is not None
    assert reports[2] is not None
    seen = changed(seen, 0, report=replace(reports[0], suspects=()))
    seen = changed(seen, 2, report=replace(reports[2], suspects=(1,)))
    assert losses(changed(seen, 1, age=1.0)) == [None, None, None]


def test_the_suspicions_of_a_relay_of_before_count_for_nothing() -> None:
    seen = changed(suspected(), 1, age=1.0)
    assert seen.assignment is not None
    relay = seen.assignment.assignment.relay
    assert relay is not None
    other = replace(seen.assignment.assignment, relay=replace(relay, boot_id="another"))
    assert losses(replace(seen, assignment=replace(seen.assignment, assignment=other))) == [None, None, None]


def test_limits_follow_the_rhythm_of_the_beats() -> None:
    limits = Limits.of(Rhythm(seconds=0.5, missed=4), 20.0)
    assert limits == Limits(stale=20.0, suspected=2.0, heard=4.0)
    assert Limits.of(Rhythm(), USUAL.stale) == USUAL
