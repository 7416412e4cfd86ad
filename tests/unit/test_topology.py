"""Rank order by topology domain, and Pods kept in one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from starcoder_operator.build.containers import Image
from starcoder_operator.build.owner import Owner
from starcoder_operator.build.pod import pod
from tests.support.runs import run
from tests.support.scenarios import Scenario, make_run

RACK = "example.com/rack"


def racked(*racks: str, **changes: object) -> Scenario:
    """Workers on as many nodes, node-i in racks[i] (empty: no label)."""
    key: dict[str, object] = {"scheduling__topologyKey": RACK}
    scenario = make_run().workers(len(racks)).on_nodes(len(racks)).with_spec(**(key | changes))
    nodes = scenario.cluster.nodes
    for (name, node), rack in zip(sorted(nodes.items()), racks, strict=True):
        nodes[name] = replace(node, labels={RACK: rack} if rack else {})
    return scenario


def order(scenario: Scenario) -> list[int]:
    assert scenario.snapshot.assignment is not None
    return [place.index for place in scenario.snapshot.assignment.assignment.members]


def nodes(scenario: Scenario) -> list[str]:
    return [scenario.pod(i).view.node for i in order(scenario)]


def test_members_of_a_rack_are_neighbours_and_the_leader_s_rack_is_first() -> None:
    scenario = racked("b", "a", "b", "a", "c").training()
    assert nodes(scenario) == ["node-0", "node-2", "node-1", "node-3", "node-4"]
    assert order(scenario)[0] == 0


def test_nodes_without_the_label_are_last() -> None:
    assert nodes(racked("b", "", "a", "b").training()) == ["node-0", "node-3", "node-2", "node-1"]


def test_without_a_key_members_are_in_the_order_of_their_indexes() -> None:
    assert order(racked("b", "a", "b", "a", scheduling__topologyKey=None).training()) == [0, 1, 2, 3]


def test_the_order_is_made_once_and_takes_no_attempt_of_its_own() -> None:
    scenario = racked("b", "a", "b").training()
    assert (scenario.status.attempt, scenario.status.restarts.total) == (1, 0)


def test_survivors_keep_their_places_whatever_rack_the_replacement_is_in() -> None:
    scenario = racked("b", "a", "b").training()
    before = order(scenario)
    scenario.cluster.nodes["node-9"] = replace(scenario.cluster.node("node-9"), labels={RACK: "z"})
    lost = scenario.pod(before[1]).view.node
    scenario.failed(lost).training()
    assert order(scenario) == before
    assert "node-9" in nodes(scenario)


def built(**changes: object) -> dict[str, object]:
    spec = run(**changes).spec
    found = pod(Owner("default", "good", "uid-1"), spec, Image("i"), member=0, incarnation=0)
    affinity: dict[str, object] = found["spec"].get("affinity") or {}
    return affinity


NEAR = {"labelSelector": {"matchLabels": {"starcoder.dev/run": "good"}}, "topologyKey": RACK}


def test_pods_prefer_the_domain_of_the_run_s_other_pods() -> None:
    assert built(scheduling__topologyKey=RACK) == {
        "podAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": NEAR}]
        }
    }  # fmt: skip


def test_pods_may_be_required_to_be_in_one_domain_beside_what_the_user_wants() -> None:
    own = {"labelSelector": {"matchLabels": {"app": "cache"}}, "topologyKey": "kubernetes.io/hostname"}
    affinity = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [own]}}
    found = built(
        scheduling__topologyKey=RACK, scheduling__topologyPolicy="Required", workers__affinity=affinity
    )  # fmt: skip
    assert found == {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [own, NEAR]}}


@pytest.mark.parametrize("policy", ["Preferred", "Required"])
def test_without_a_key_nothing_attracts_pods(policy: str) -> None:
    assert built(scheduling__topologyPolicy=policy) == {}
