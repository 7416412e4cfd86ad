"""What the planner makes of a failure beyond a restart: whose fault it is, how long it waits, which node is broken."""

from __future__ import annotations

from dataclasses import replace

import pytest

from starcoder_operator.api.v1alpha1 import LastFailure
from starcoder_operator.api.v1alpha1.failure_policy import Backoff
from starcoder_operator.domain import reasons
from starcoder_operator.domain.backoff import delay
from starcoder_operator.domain.failure import Cause, Failure
from starcoder_operator.domain.timestamps import seconds_between
from starcoder_operator.domain.user_error import judged
from tests.support.scenarios import Scenario, make_run

NOW = "2026-01-01T00:00:00Z"
BUG = "IndexError: list index out of range"


def reasons_until_training(run: Scenario) -> set[str | None]:
    """Reasons that the run gave from now until it trained again."""
    seen = set()
    while run.round().status.state != "Running":
        seen.add(run.status.reason)
    return seen


# User errors


def last(nodes: tuple[str, ...], iteration: int | None = 7, fingerprint: str | None = "f") -> LastFailure:
    return LastFailure(cause="Crash", at=NOW, nodes=nodes, iteration=iteration, fingerprint=fingerprint)


CRASH = Failure(Cause.CRASH, 1, "a-w1-0", "node-1", BUG, 70, iteration=7, fingerprint="f")


def test_the_same_exception_at_the_same_iteration_on_other_nodes_is_the_users() -> None:
    found = judged(last(("node-0",)), CRASH, ("node-1",))
    assert found.cause is Cause.USER_ERROR
    assert found.message.startswith(BUG)
    assert "after iteration 7, on node-0 and then on node-1" in found.message


@pytest.mark.parametrize(
    ("before", "found", "nodes"),
    [
        (None, CRASH, ("node-1",)),
        (last(("node-1",)), CRASH, ("node-1",)),
        (last(("node-0", "node-1")), CRASH, ("node-1", "node-2")),
        (last(("node-0",), iteration=6), CRASH, ("node-1",)),
        (last(("node-0",), fingerprint="g"), CRASH, ("node-1",)),
        (last(("node-0",), fingerprint=None), replace(CRASH, fingerprint=""), ("node-1",)),
        (last(("node-0",)), replace(CRASH, cause=Cause.DEVICE_ERROR), ("node-1",)),
        (last(()), CRASH, ("node-1",)),
        (last(("node-0",)), CRASH, ()),
    ],
    ids=["the first", "same node", "shared node", "iteration", "exception", "signals", "device", "unknown", "no node"],
)
def test_anything_less_proves_nothing(before: LastFailure | None, found: Failure, nodes: tuple[str, ...]) -> None:
    assert judged(before, found, nodes) == found


def test_a_run_whose_code_fails_on_two_nodes_in_a_row_is_failed_with_python_s_message() -> None:
    run = make_run().workers(2).on_nodes(2).training()
    run.round().worker_fails(0, message=BUG, fingerprint="f").passes()
    assert run.status.last_failure is not None
    assert (run.status.last_failure.fingerprint, run.status.last_failure.nodes) == ("f", ("node-0",))
    agent, iteration = run.pod(1).agent, run.status.last_failure.iteration
    run.until(lambda s: agent.running == 2 and agent.iteration == iteration)
    run.worker_fails(1, message=BUG, fingerprint="f").passes()
    assert (run.status.state, run.status.reason) == ("Failed", "UserError")
    assert BUG in run.status.message
    assert run.status.restarts.by_cause == {"Crash": 1, "UserError": 1}


# Back-off


def test_the_first_charged_failure_is_answered_at_once() -> None:
    run = make_run().workers(2).training()
    began = run.cluster.world.now
    run.worker_fails(0).until(lambda s: s.restarts.total == 1 and s.state == "Running")
    assert run.cluster.world.now - began < 10
    assert all(c.reason != reasons.BACKING_OFF for c in run.status.conditions)


def crashing(**policy: str) -> Scenario:
    """A run that has crashed twice without a checkpoint, up to the moment when it could run again."""
    run = make_run().workers(2).with_spec(checkpoint__everyIterations=100, **policy).training()
    run.worker_fails(0).until(lambda s: s.restarts.total == 1 and s.state == "Running")
    return run.worker_fails(0)


def test_a_second_one_without_a_newer_checkpoint_waits_and_says_until_when() -> None:
    run = crashing().until(lambda s: s.reason == reasons.BACKING_OFF)
    assert run.status.state == "Recovering"
    assert run.status.last_failure is not None
    until = run.condition("Training").message.rpartition(" tries again at ")[2]
    assert 5 <= seconds_between(run.status.last_failure.at, until) <= 10
    assert run.last is not None
    assert run.last.look_again is not None
    assert run.last.look_again <= seconds_between(run.passes().snapshot.now, until) + 1
    run.until(lambda s: s.state == "Running")
    assert seconds_between(run.snapshot.now, until) == 0
    assert run.status.attempt == 3


def test_an_operator_that_takes_over_waits_until_the_same_moment() -> None:
    run = crashing().until(lambda s: s.reason == reasons.BACKING_OFF)
    said = run.condition("Training").message
    run.waits(1).passes()
    assert run.condition("Training").message == said


def test_a_clock_that_went_back_does_not_stretch_the_wait() -> None:
    run = crashing().until(lambda s: s.reason == reasons.BACKING_OFF)
    run.waits(-20).passes().passes()
    assert run.phase == "run"


def test_a_run_that_is_told_not_to_wait_does_not() -> None:
    run = crashing(failurePolicy__backoff__initial="0s")
    assert reasons.BACKING_OFF not in reasons_until_training(run)
    assert run.status.restarts_without_progress == 2


def test_failures_of_nodes_are_never_waited_for() -> None:
    run = make_run().workers(2).on_nodes(4).training()
    for _ in range(2):
        assert reasons.BACKING_OFF not in reasons_until_training(run.node_dies(run.pod(1).view.node))


def test_an_object_that_can_t_be_read_again_and_again_is_waited_for_and_charged_to_nobody() -> None:
    run = make_run().workers(2).training()
    for count in (1, 2, 3):
        run.until(lambda s: s.state == "Running")
        run.worker_fails(1, "Storage", "DataNotFound: s3://corpus/python/7").passes()
        run.until(lambda s, count=count: s.restarts.total == count)
        waits = delay(run.cluster.spec.failure_policy.backoff, run.cluster.uid, run.status)
        assert (waits > 0) == (count > 1), f"after failure {count}"
    run.until(lambda s: s.reason == reasons.BACKING_OFF)
    assert "3 failures without a newer verified checkpoint (any number is allowed)" in run.status.message
    assert run.status.restarts_without_progress == 0
    run.until(lambda s: s.state == "Running" and (s.checkpoint is not None))
    run.worker_fails(1, "Storage").passes()
    assert delay(run.cluster.spec.failure_policy.backoff, run.cluster.uid, run.status) == 0, "it came further"


def test_a_wait_says_how_many_are_allowed_of_its_own_kind() -> None:
    """As many failures are charged here as reads have failed."""
    run = crashing().until(lambda s: s.restarts.total == 2)
    for count in (3, 4):
        run.until(lambda s: s.state == "Running")
        run.worker_fails(1, "Storage").until(lambda s, count=count: s.restarts.total == count)
    run.until(lambda s: s.reason == reasons.BACKING_OFF)
    assert run.status.restarts_without_progress == 2
    assert "2 failures without a newer verified checkpoint (any number is allowed)" in run.status.message


def test_waits_double_up_to_the_longest_and_no_two_runs_wait_alike() -> None:
    run = crashing().passes().status
    policy = Backoff.model_validate({"initial": "10s", "max": "60s"})

    def wait(failures: int, uid: str = "uid-a") -> float:
        return delay(policy, uid, run.model_copy(update={"restarts_without_progress": failures}))

    assert [wait(n) for n in (0, 1)] == [0, 0]
    for failures, longest in ((2, 10), (3, 20), (4, 40), (5, 60), (6, 60), (5000, 60)):
        assert longest / 2 <= wait(failures) <= longest
    assert len({wait(3, f"uid-{i}") for i in range(20)}) == 20


def test_a_node_lost_after_crashes_is_not_waited_for_either() -> None:
    status = crashing().passes().status
    assert delay(Backoff(), "uid-a", status) > 0
    assert status.last_failure is not None
    lost = status.model_copy(update={"last_failure": status.last_failure.model_copy(update={"cause": "NodeLost"})})
    assert delay(Backoff(), "uid-a", lost) == 0


# Devices


def test_a_node_whose_device_is_faulty_loses_its_member_to_another_and_is_avoided_while_it_is() -> None:
    run = make_run().workers(2).on_nodes(3).training()
    node = run.pod(1).view.node
    run.device_breaks(node, "SysLogsXIDError: XID 79").passes()
    assert run.status.restarts.by_cause == {"DeviceUnhealthy": 1}
    assert run.status.restarts_without_progress == 0
    assert run.status.last_failure is not None
    assert run.status.last_failure.message == f"node {node} has a faulty device: SysLogsXIDError: XID 79"
    run.training()
    assert run.pod(1).view.node != node
    assert run.pod(1).view.avoided_nodes == (node,)


def test_a_pod_that_waits_for_the_node_of_a_faulty_device_comes_back_to_it_when_that_is_mended() -> None:
    run = make_run().workers(2).on_nodes(2).training()
    node = run.pod(1).view.node
    run.device_breaks(node, "GpuMemWatch").until_quiet(5)
    assert run.said("Scheduled") == ("False", reasons.UNSCHEDULABLE)
    run.device_breaks(node).training()
    assert run.pod(1).view.node == node


def test_a_cordon_ends_nothing() -> None:
    run = make_run().workers(2).training()
    run.cordoned(run.pod(1).view.node).until_quiet(3)
    assert (run.status.state, run.status.restarts.total) == ("Running", 0)
