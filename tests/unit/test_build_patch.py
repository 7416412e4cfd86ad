"""A podPatch is merged into a Pod as Kubernetes merges a strategic-merge patch."""

import copy

import pytest

from starcoder_operator.build.patch import PatchError, strategic_merge

POD = {
    "metadata": {"name": "p", "labels": {"a": "1"}},
    "spec": {
        "initContainers": [{"name": "agent", "image": "i"}],
        "containers": [
            {
                "name": "worker",
                "image": "i",
                "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
                "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
                "resources": {"limits": {"nvidia.com/gpu": "8"}},
                "securityContext": {"capabilities": {"drop": ["ALL"]}},
            }
        ],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
        "tolerations": [{"key": "x"}],
    },
}


def patched(spec):
    return strategic_merge(POD, {"spec": spec})["spec"]


def worker(**patch):
    return patched({"containers": [{"name": "worker", **patch}]})["containers"][0]


def test_neither_the_pod_nor_the_patch_is_changed():
    pod, patch = (
        copy.deepcopy(POD),
        {"spec": {"containers": [{"name": "worker", "env": [{"name": "A", "value": "9"}]}]}},
    )
    before = copy.deepcopy(patch)
    strategic_merge(pod, patch)["spec"]["containers"][0]["env"][0]["value"] = "changed"
    assert pod == POD
    assert patch == before


def test_objects_are_merged_field_by_field():
    assert worker(resources={"limits": {"rdma/hca": 8}})["resources"] == {
        "limits": {"nvidia.com/gpu": "8", "rdma/hca": 8}
    }


@pytest.mark.parametrize(
    ("field", "key", "item"),
    [
        ("env", "name", {"name": "A", "value": "9"}),
        ("volumeMounts", "mountPath", {"mountPath": "/tmp", "subPath": "x"}),
    ],
)
def test_items_of_a_container_are_merged_by_their_key(field, key, item):
    before, after = POD["spec"]["containers"][0][field], worker(**{field: [item]})[field]
    assert [i[key] for i in after] == [i[key] for i in before]
    assert after[0] == before[0] | item


@pytest.mark.parametrize(
    ("field", "key"),
    [
        ("containers", "name"),
        ("initContainers", "name"),
        ("volumes", "name"),
        ("imagePullSecrets", "name"),
        ("hostAliases", "ip"),
        ("topologySpreadConstraints", "topologyKey"),
        ("resourceClaims", "name"),
        ("schedulingGates", "name"),
    ],
)
def test_new_items_of_a_pod_go_to_the_end(field, key):
    before = POD["spec"].get(field, [])
    assert patched({field: [{key: "new", "x": 1}]})[field] == [*before, {key: "new", "x": 1}]


def test_ports_are_told_apart_by_their_number():
    assert worker(ports=[{"containerPort": 1, "name": "a"}, {"containerPort": 1, "protocol": "UDP"}])["ports"] == [
        {"containerPort": 1, "name": "a", "protocol": "UDP"}
    ]


def test_a_list_without_a_key_is_replaced():
    assert patched({"tolerations": [{"key": "y"}]})["tolerations"] == [{"key": "y"}]
    assert worker(securityContext={"capabilities": {"add": ["IPC_LOCK"], "drop": ["NET_RAW"]}})["securityContext"] == {
        "capabilities": {"add": ["IPC_LOCK"], "drop": ["NET_RAW"]}
    }


def test_null_takes_a_field_away():
    assert "securityContext" not in worker(securityContext=None)
    assert patched({"volumes": [{"name": "tmp", "emptyDir": None, "hostPath": {"path": "/t"}}]})["volumes"] == [
        {"name": "tmp", "hostPath": {"path": "/t"}}
    ]


def test_null_in_what_is_new_is_left_out():
    assert patched({"dnsConfig": {"options": None, "searches": ["a"]}})["dnsConfig"] == {"searches": ["a"]}


def test_an_item_is_deleted_by_directive():
    assert worker(env=[{"name": "A", "$patch": "delete"}])["env"] == [{"name": "B", "value": "2"}]


def test_a_list_is_replaced_by_directive():
    assert worker(env=[{"$patch": "replace"}, {"name": "C"}])["env"] == [{"name": "C"}]


def test_an_object_is_replaced_by_directive():
    assert worker(resources={"$patch": "replace", "limits": {"cpu": 1}})["resources"] == {"limits": {"cpu": 1}}


def test_an_object_is_emptied_by_directive():
    assert worker(resources={"$patch": "delete"})["resources"] == {}


def test_only_retained_keys_stay():
    volume = {"name": "tmp", "$retainKeys": ["name", "hostPath"], "hostPath": {"path": "/t"}}
    assert patched({"volumes": [volume]})["volumes"] == [{"name": "tmp", "hostPath": {"path": "/t"}}]


@pytest.mark.parametrize(
    ("patch", "sentence"),
    [
        (
            {"spec": {"containers": [{"image": "x"}]}},
            "spec.workers.podPatch.spec.containers: found an item without it, expected name in every item, by which "
            "items are told apart",
        ),
        (
            {"spec": {"containers": {"name": "worker"}}},
            "spec.workers.podPatch.spec.containers: found object, expected a list of objects",
        ),
        (
            {"spec": {"volumes": "tmp"}},
            "spec.workers.podPatch.spec.volumes: found string, expected a list of objects",
        ),
        (
            {"spec": {"containers": [{"name": "worker", "resources": 7}]}},
            "spec.workers.podPatch.spec.containers.resources: found number, expected object",
        ),
        (
            {"spec": {"tolerations": {}}},
            "spec.workers.podPatch.spec.tolerations: found object, expected list",
        ),
        (
            {"spec": {"$setElementOrder/containers": []}},
            "spec.workers.podPatch.spec.$setElementOrder/containers: found a directive that is not understood, "
            "expected $patch or $retainKeys",
        ),
        (
            {"spec": {"$patch": "munge"}},
            "spec.workers.podPatch.spec: found $patch: munge, expected merge, replace or delete",
        ),
    ],
    ids=lambda v: "" if isinstance(v, str) else str(v),
)
def test_what_cannot_be_applied_is_told_with_its_place(patch, sentence):
    with pytest.raises(PatchError) as refused:
        strategic_merge(POD, patch)
    assert str(refused.value) == sentence
