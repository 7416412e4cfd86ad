"""One node that does not reach S3 costs a run a minute, and not its life."""

from __future__ import annotations

from starcoder_operator.domain import reasons
from starcoder_operator.domain.storage_reach import LEADER_PATIENCE
from tests.support.scenarios import Scenario, make_run

SOON = int(LEADER_PATIENCE) - 10


def placed(run: Scenario) -> Scenario:
    """Its Pods have their nodes, and no attempt has begun."""
    return run.hindered("StorageUnreachable").until_quiet(5).mended()


def can_not_read(run: Scenario, member: int) -> Scenario:
    """The member's workers give up reading from S3 when the attempt starts."""
    return run.training().worker_fails(member, "Storage", "no answer from the endpoint").passes()


def test_where_the_leader_alone_is_without_s3_another_member_leads() -> None:
    run = placed(make_run().workers(3).on_nodes(4))
    run.without_storage(run.pod(0).view.node).until_quiet(SOON)
    assert run.said("Training") == ("False", "StorageUnreachable")
    assert run.status.attempt == 1, "most outages are over sooner"
    run.training()
    assert run.at_work == [1, 0, 2]
    assert (run.status.attempt, run.status.restarts.total) == (2, 0)


def test_a_member_that_stands_by_can_lead() -> None:
    run = placed(make_run().workers(1).spares(1).on_nodes(2))
    run.without_storage(run.pod(0).view.node).training()
    assert run.at_work == [1]


def test_where_two_nodes_are_without_s3_all_members_have_their_turn() -> None:
    run = placed(make_run().workers(3).on_nodes(4))
    run.without_storage(run.pod(0).view.node, run.pod(1).view.node).training()
    assert run.at_work[0] == 2
    assert run.status.attempt == 3


def test_while_s3_is_away_for_all_no_attempt_is_counted_and_it_trains_as_soon_as_it_is_back() -> None:
    run = make_run().workers(2).hindered("StorageUnreachable").until_quiet(10 * int(LEADER_PATIENCE))
    assert run.status.restarts.total == 0
    assert run.status.attempt <= 11
    assert run.told.count(("Warning", "StorageUnreachable")) <= 11
    run.mended().training()


def test_who_has_nobody_beside_it_goes_on_trying() -> None:
    run = make_run().workers(1).hindered("StorageUnreachable").until_quiet(5 * int(LEADER_PATIENCE))
    assert run.status.attempt == 1
    run.mended().training()
    assert run.status.attempt == 1


def test_what_all_members_share_is_no_reason_for_another_leader() -> None:
    run = make_run().workers(2).hindered("CredentialsMissing").until_quiet(5 * int(LEADER_PATIENCE))
    assert run.status.attempt == 1


def test_a_node_whose_workers_alone_can_not_read_twice_in_a_row_is_avoided() -> None:
    run = make_run().workers(2).on_nodes(3).training()
    bad = run.pod(1).view.node
    can_not_read(run, 1)
    assert run.status.avoided_nodes == (), "once is the service's as well as the node's"
    can_not_read(run, 1)
    (avoided,) = run.status.avoided_nodes
    assert (avoided.node, avoided.failures) == (bad, 2)
    assert "could not read from S3 twice in a row" in avoided.reason
    assert ("Warning", reasons.NODE_AVOIDED) in run.told
    assert run.training().pod(1).view.node != bad
    assert run.status.restarts_without_progress == 0


def test_the_leader_s_node_is_not_it_since_it_has_just_claimed_head() -> None:
    run = make_run().workers(2).on_nodes(3).training()
    can_not_read(can_not_read(run, 0), 0)
    assert run.status.avoided_nodes == ()


def test_where_others_can_not_read_either_it_is_not_the_node() -> None:
    run = make_run().workers(3).on_nodes(4).training()
    for _ in range(2):
        run.training().stands_still(2, "Storage", "no answer")
        run.worker_fails(1, "Storage", "no answer").passes()
    assert run.status.avoided_nodes == ()
    can_not_read(run, 2)
    can_not_read(run, 1)
    assert run.status.avoided_nodes == ()
