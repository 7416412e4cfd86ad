"""The chart grants the operator what it uses and nothing else."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from devcluster import binaries
from starcoder_operator.adapters.kinds import PERMISSIONS

pytestmark = pytest.mark.integration

CHART = Path(__file__).resolve().parents[2] / "helm" / "starcoder-operator"
Right = tuple[str, str, str]
"""(group, resource, verb)"""

USED = {
    (p.kind.group, f"{p.kind.plural}/{p.subresource}" if p.subresource else p.kind.plural, verb)
    for p in PERMISSIONS
    for verb in p.verbs
}
OF_NODES = {right for right in USED if right[1] == "nodes"}


def rendered(*arguments: str) -> list[dict[str, Any]]:
    command = [binaries.path("helm"), "template", "release", CHART, "--namespace", "operators", *arguments]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [document for document in yaml.safe_load_all(shown) if document]


def granted(documents: list[dict[str, Any]]) -> dict[str, set[Right]]:
    """ "Kind namespace/name" of each role that is bound to the operator's account -> what it grants."""
    account = next(d for d in documents if d["kind"] == "Deployment")["spec"]["template"]["spec"]["serviceAccountName"]
    bound = {
        (d["roleRef"]["kind"], d["metadata"].get("namespace", ""), d["roleRef"]["name"])
        for d in documents
        if d["kind"].endswith("RoleBinding") and any(s["name"] == account for s in d["subjects"])
    }
    return {
        f"{d['kind']} {d['metadata'].get('namespace', '')}/{d['metadata']['name']}": {
            (group, resource, verb)
            for rule in d["rules"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }
        for d in documents
        if d["kind"] in ("Role", "ClusterRole")
        and (d["kind"], d["metadata"].get("namespace", ""), d["metadata"]["name"]) in bound
    }


def election(roles: dict[str, set[Right]]) -> dict[str, set[Right]]:
    return {name: rights for name, rights in roles.items() if name.endswith("-election")}


def test_cluster_wide_it_has_what_it_uses():
    roles = granted(rendered())
    (rights,) = (rights for name, rights in roles.items() if name not in election(roles))
    assert rights == USED


def test_in_named_namespaces_it_has_what_it_uses_there_and_nodes_in_the_cluster():
    roles = granted(rendered("--set", "watchNamespaces={a,b}"))
    rest = {name: rights for name, rights in roles.items() if name not in election(roles)}
    assert {name.split()[0] + " " + name.split()[1].split("/")[0]: rights for name, rights in rest.items()} == {
        "ClusterRole ": OF_NODES,
        "Role a": USED - OF_NODES,
        "Role b": USED - OF_NODES,
    }


@pytest.mark.parametrize("arguments", [(), ("--set", "watchNamespaces={a}")], ids=["cluster", "namespace"])
def test_nothing_is_granted_by_wildcard_and_no_secrets(arguments):
    for rights in granted(rendered(*arguments)).values():
        for right in rights:
            assert not any("*" in part for part in right)
            assert right[1].split("/")[0] != "secrets"


def test_the_election_has_its_one_lease():
    documents = rendered()
    (role,) = (d for d in documents if d["kind"] == "Role" and d["metadata"]["name"].endswith("-election"))
    deployment = next(d for d in documents if d["kind"] == "Deployment")
    environment = {e["name"]: e.get("value") for e in deployment["spec"]["template"]["spec"]["containers"][0]["env"]}
    named, create = role["rules"]
    assert named["resourceNames"] == [environment["STARCODER_OPERATOR_LEASE_NAME"]]
    assert named["verbs"] == ["get", "update"]
    assert (create["resources"], create["verbs"]) == (["leases"], ["create"])
    assert role["metadata"]["namespace"] == environment["STARCODER_OPERATOR_LEASE_NAMESPACE"] == "operators"
