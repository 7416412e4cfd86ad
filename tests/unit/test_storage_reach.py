"""One node that does not reach S3 costs a run a minute, and not its life."""

from __future__ import annotations

from starcoder_operator.domain import reasons
from starcoder_operator.domain.storage_reach import PATIENCE
from starcoder_trainer.agent import messages as m
from starcoder_trainer.contract.report import Problem
from tests.support.scenarios import Scenario, make_run

SOON = int(PATIENCE) - 10


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


def test_an_upload_that_is_tried_again_keeps_nobody_from_its_turn() -> None:
    """Those that have nothing to upload tell of no trouble, and may be without S3 all the same."""
    run = placed(make_run().workers(3).on_nodes(4))
    trouble = Problem("StorageUnreachable", "no answer from the endpoint")
    run.pod(2).agent.tell(m.StorageTrouble(run.cluster.world.now, trouble))
    run.without_storage(run.pod(0).view.node, run.pod(1).view.node).training()
    assert run.at_work[0] == 2


def test_while_s3_is_away_for_all_no_attempt_is_counted_and_it_trains_as_soon_as_it_is_back() -> None:
    run = make_run().workers(2).hindered("StorageUnreachable").until_quiet(10 * int(PATIENCE))
    assert run.status.restarts.total == 0
    assert run.status.attempt <= 11
    assert run.told.count(("Warning", "StorageUnreachable")) <= 11
    run.mended().training()


def test_who_has_nobody_beside_it_goes_on_trying() -> None:
    run = make_run().workers(1).hindered("StorageUnreachable").until_quiet(5 * int(PATIENCE))
    assert run.status.attempt == 1
    run.mended().training()
    assert run.status.attempt == 1


def test_an_upload_that_one_node_can_not_end_holds_up_no_attempt() -> None:
    run = make_run().workers(2).spares(1).on_nodes(4).training()
    agent = run.pod(0).agent
    agent.tell(m.StorageTrouble(run.cluster.world.now, Problem("StorageUnreachable", "no answer from the endpoint")))
    run.without_storage(run.pod(0).view.node).worker_fails(1).until(lambda s: s.restarts.total == 1)
    run.until_quiet(SOON)
    assert run.phase == "hold"
    run.training()
    assert run.at_work[0] == 1


def test_uploads_that_no_node_can_end_cost_no_more_attempts_than_others_do_and_hold_up_none() -> None:
    """An outage meets uploads on all nodes, and their trouble outlasts it: the next try of a large one takes long."""
    run = make_run().workers(3).spares(1).on_nodes(5).with_spec(training__iterations=100_000).training()
    for member in range(4):
        trouble = Problem("StorageUnreachable", "no answer from the endpoint")
        run.pod(member).agent.tell(m.StorageTrouble(run.cluster.world.now, trouble))
    run.until_quiet(2 * int(PATIENCE)).hindered("StorageUnreachable").worker_fails(1).until(lambda s: s.attempt == 2)
    run.until_quiet(5 * int(PATIENCE))
    assert run.status.attempt <= 2 + 5
    run.mended().training()
    assert run.status.restarts.total == 1


def test_a_leader_s_patience_begins_with_its_trouble() -> None:
    run = placed(make_run().workers(2)).hindered("DataNotFound").until_quiet(5 * int(PATIENCE))
    assert run.status.attempt == 1
    run.hindered("StorageUnreachable").until_quiet(SOON)
    assert run.status.attempt == 1
    run.until_quiet(20)
    assert run.status.attempt == 2


def test_what_all_members_share_is_no_reason_for_another_leader() -> None:
    run = make_run().workers(2).hindered("CredentialsMissing").until_quiet(5 * int(PATIENCE))
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


def test_a_member_that_was_moved_for_it_and_can_not_read_elsewhere_either_is_not_moved_again() -> None:
    """An object that only its ranks read may be gone."""
    run = make_run().workers(2).on_nodes(5).training()
    for _ in range(4):
        can_not_read(run, 1)
    assert len(run.status.avoided_nodes) == 1


def test_what_was_verified_in_between_speaks_for_the_node() -> None:
    run = make_run().workers(2).on_nodes(3).training()
    can_not_read(run, 1)
    step = run.status.checkpoint.iteration if run.status.checkpoint else 0
    run.until(lambda s: s.checkpoint is not None and s.checkpoint.iteration > step)
    can_not_read(run, 1)
    assert run.status.avoided_nodes == ()


def test_two_failures_far_apart_are_not_in_a_row() -> None:
    run = make_run().workers(2).on_nodes(3).training()
    can_not_read(run, 1)
    last = run.status.last_failure
    assert last is not None
    long_ago = last.model_copy(update={"at": "2025-12-31T12:00:00Z"})
    run.cluster.status = run.status.model_copy(update={"last_failure": long_ago})
    can_not_read(run, 1)
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
