"""A run's agents may read its assignment and answer in its Leases, each by name, and nothing else."""

import pytest

from starcoder_operator.build.assignment import config_map
from starcoder_operator.build.lease import lease
from starcoder_operator.build.owner import Owner
from starcoder_operator.build.rbac import access
from starcoder_trainer.contract import names
from starcoder_trainer.contract.assignment import Assignment, Layout, Member
from tests.support.runs import run

OWNER = Owner("training", "good", "uid-1")
ASSIGNMENT = Assignment("uid-1", 3, "hold", (Member(0, "b"),), 2, Layout(2, 1, 1))


def made(**changes):
    return {m["kind"]: m for m in access("training", "good", "uid-1", run(**changes).spec, 2)}


def test_every_right_names_its_objects():
    rules = made()["Role"]["rules"]
    assert [(r["resources"], r["resourceNames"], r["verbs"]) for r in rules] == [
        (["configmaps"], ["good-assignment"], ["get", "list", "watch"]),
        (["leases"], ["good-w0", "good-w1"], ["get", "update", "patch"]),
    ]


def test_the_role_is_bound_to_the_runs_own_account():
    found = made()
    name = names.service_account_name("good")
    assert list(found) == ["ServiceAccount", "Role", "RoleBinding"]
    assert {m["metadata"]["name"] for m in found.values()} == {name}
    assert found["RoleBinding"]["roleRef"] == {
        "apiGroup": "rbac.authorization.k8s.io",
        "kind": "Role",
        "name": name,
    }
    assert found["RoleBinding"]["subjects"] == [{"kind": "ServiceAccount", "name": name, "namespace": "training"}]


def test_an_account_with_cloud_identity_is_used_and_not_made():
    found = made(workers__serviceAccountName="cloud")
    assert list(found) == ["Role", "RoleBinding"]
    assert found["RoleBinding"]["subjects"][0]["name"] == "cloud"


@pytest.mark.parametrize(
    "manifest",
    [*access("training", "good", "uid-1", run().spec, 2), lease(OWNER, 1), config_map(OWNER, ASSIGNMENT, "{}")],
    ids=lambda m: m["kind"],
)
def test_an_object_goes_with_its_run_and_holds_nothing_up(manifest):
    meta = manifest["metadata"]
    assert meta["namespace"] == "training"
    assert meta["labels"][names.LABEL_RUN] == "good"
    assert "finalizers" not in meta
    (owner,) = meta["ownerReferences"]
    assert owner == {
        "apiVersion": "starcoder.dev/v1alpha1",
        "kind": "StarCoderRun",
        "name": "good",
        "uid": "uid-1",
        "controller": True,
        "blockOwnerDeletion": False,
    }


def test_a_members_lease_says_whose_it_is():
    made = lease(OWNER, 1)
    assert made["metadata"]["name"] == names.lease_name("good", 1)
    assert made["metadata"]["labels"][names.LABEL_MEMBER] == "1"


def test_assignment_and_configuration_are_one_object():
    made = config_map(OWNER, ASSIGNMENT, '{"a":1}')
    assert made["metadata"]["name"] == names.assignment_name("good")
    assert Assignment.from_json(made["data"][names.ASSIGNMENT_KEY]) == ASSIGNMENT
    assert made["data"][names.CONFIG_KEY] == '{"a":1}'
