"""What is held to be lost, and what is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from starcoder_operator.api.v1alpha1.workers import Toleration
from starcoder_operator.domain.hearing import USUAL
from starcoder_operator.domain.members import (
    NODE_INDEX_LAG,
    LossKind,
    all_silent,
    members_of,
)
from starcoder_operator.domain.members import node_trouble as trouble_of
from starcoder_operator.domain.snapshot import NodeView, Snapshot
from tests.support.scenarios import make_run

NODE = NodeView("n", True, False, ())


def snapshot() -> Snapshot:
    """Two members that train."""
    return make_run().workers(2).training().snapshot


def with_pod(before: Snapshot, **fields: Any) -> Snapshot:
    """Member 1's Pod changed."""
    return replace(before, pods=tuple(replace(p, **fields) if p.member == 1 else p for p in before.pods))


def with_lease_age(before: Snapshot, *ages: float) -> Snapshot:
    return replace(before, leases=tuple(replace(x, age=a) for x, a in zip(before.leases, ages, strict=True)))


def loss_of(after: Snapshot) -> LossKind | None:
    assert members_of(after)[0].loss is None
    loss = members_of(after)[1].loss
    return loss.kind if loss else None


def test_members_that_train_are_live() -> None:
    members = members_of(snapshot())
    assert [m.live for m in members] == [True, True]
    assert all(m.boot_id for m in members)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"deleting": True}, LossKind.DELETED),
        ({"deleting": True, "disruption": "PreemptionByScheduler"}, LossKind.DISRUPTED),
        ({"phase": "Failed", "disruption": "TerminationByKubelet"}, LossKind.DISRUPTED),
        ({"phase": "Failed"}, LossKind.FAILED),
        ({"phase": "Succeeded"}, LossKind.FINISHED),
        ({"node": "gone", "age": NODE_INDEX_LAG}, LossKind.NODE),
        ({"node": "gone", "age": NODE_INDEX_LAG - 1}, None),
        ({"disruption": "PreemptionByScheduler"}, None),
    ],
)
def test_a_pod_is_lost_by_what_the_api_server_says_of_it(fields: dict[str, Any], kind: LossKind | None) -> None:
    assert loss_of(with_pod(snapshot(), **fields)) == kind


def test_a_pod_that_is_not_there_is_lost_and_keeps_its_name() -> None:
    before = snapshot()
    after = replace(before, pods=tuple(p for p in before.pods if p.member != 1))
    assert loss_of(after) is LossKind.DELETED
    assert members_of(after)[1].pod_name == "a-w1-0"


def test_an_agent_that_is_silent_alone_is_lost_and_one_that_is_late_is_not() -> None:
    assert loss_of(with_lease_age(snapshot(), 1, USUAL.stale)) is LossKind.SILENT
    assert loss_of(with_lease_age(snapshot(), 1, USUAL.stale - 1)) is None


def test_agents_that_are_all_silent_are_not_lost() -> None:
    members = members_of(with_lease_age(snapshot(), 60, 60))
    assert [m.loss for m in members] == [None, None]
    assert all_silent(members)
    assert not all_silent(members_of(snapshot()))


def test_a_report_of_an_older_pod_says_nothing_of_the_newer() -> None:
    before = snapshot()
    newer = replace(before.pods[1], name="a-w1-1", uid="other", incarnation=1)
    member = members_of(replace(before, pods=(*before.pods, newer)))[1]
    assert (member.pod, member.report, member.live, member.boot_id) == (newer, None, False, "")
    assert member.last_incarnation == 1


def test_a_pod_older_than_what_is_recorded_does_not_count() -> None:
    before = snapshot()
    member = members_of(replace(before, status=before.status.model_copy(update={"incarnations": (0, 3)})))[1]
    assert (member.pod, member.last_incarnation) == (None, 3)


@pytest.mark.parametrize(
    ("node", "trouble"),
    [
        (NODE, None),
        (replace(NODE, unschedulable=True), None),
        (replace(NODE, ready=None), "node n is Unknown: its kubelet is silent"),
        (replace(NODE, ready=False), "node n is NotReady"),
        (replace(NODE, noexecute_taints=("maintenance",)), "node n has the NoExecute taint maintenance"),
        (None, "node n is gone"),
    ],
)
def test_a_node_is_in_trouble_where_pods_on_it_can_t_go_on(node: NodeView | None, trouble: str | None) -> None:
    others = {"m": replace(NODE, name="m")}
    assert trouble_of("n", others | ({"n": node} if node else {}), ()) == trouble


def test_no_node_is_in_trouble_where_nodes_can_t_be_read() -> None:
    assert trouble_of("n", {}, ()) is None


@pytest.mark.parametrize(
    ("toleration", "tolerated"),
    [
        (Toleration(key="maintenance", operator="Exists"), True),
        (Toleration(operator="Exists"), True),
        (Toleration(key="maintenance", operator="Exists", effect="NoSchedule"), False),
        (Toleration(key="maintenance", operator="Exists", toleration_seconds=60), False),
        (Toleration(key="other", operator="Exists"), False),
    ],
)
def test_a_taint_that_is_tolerated_for_ever_is_no_trouble(toleration: Toleration, tolerated: bool) -> None:
    nodes = {"n": replace(NODE, noexecute_taints=("maintenance",))}
    assert (trouble_of("n", nodes, (toleration,)) is None) == tolerated


def test_a_lost_node_s_own_toleration_does_not_make_it_well() -> None:
    nodes = {"n": replace(NODE, noexecute_taints=("node.kubernetes.io/unreachable",))}
    tolerated = (Toleration(key="node.kubernetes.io/unreachable", operator="Exists", toleration_seconds=5),)
    assert trouble_of("n", nodes, tolerated) is not None


@pytest.mark.parametrize(("age", "kind"), [(0.0, None), (USUAL.heard - 1, None), (USUAL.heard, LossKind.NODE)])
def test_an_agent_that_is_heard_vouches_for_a_node_whose_kubelet_is_silent(age: float, kind: LossKind | None) -> None:
    before = snapshot()
    node = next(p.node for p in before.pods if p.member == 1)
    unknown = replace(before, nodes=before.nodes | {node: replace(before.nodes[node], ready=None)})
    assert loss_of(with_lease_age(unknown, 0.0, age)) == kind


def test_no_agent_vouches_for_a_node_that_says_itself_that_it_is_not_ready() -> None:
    before = snapshot()
    node = next(p.node for p in before.pods if p.member == 1)
    assert (
        loss_of(replace(before, nodes=before.nodes | {node: replace(before.nodes[node], ready=False)})) is LossKind.NODE
    )
