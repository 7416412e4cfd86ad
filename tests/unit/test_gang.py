"""Gangs behind one Protocol: Kubernetes' own PodGroup, and none."""

from typing import get_args

import pytest

from starcoder_operator.adapters.kinds import PERMISSIONS, POD_GROUPS
from starcoder_operator.api.v1alpha1.storage import Scheduling
from starcoder_operator.build.owner import Owner
from starcoder_operator.domain.snapshot import GangView
from starcoder_operator.gang import GANGS, gang_of
from tests.support.runs import run

OWNER = Owner("training", "good", "uid-1")


def native(**changes):
    return gang_of(run(**changes).spec)


def group(**changes):
    found = native(**changes).group.manifest(OWNER, run(**changes).spec, "good-p0", 2)
    return found | {"metadata": found["metadata"] | {"uid": "u", "resourceVersion": "5"}}


def test_every_gang_that_a_spec_may_ask_for_is_carried_out():
    assert set(GANGS) == set(get_args(Scheduling.model_fields["gang"].annotation))


@pytest.mark.parametrize("gang", GANGS.values(), ids=GANGS)
def test_the_operator_may_do_with_a_group_all_it_does(gang):
    if gang.group is None:
        return
    (permission,) = (p for p in PERMISSIONS if p.kind == gang.group.kind)
    assert {"list", "watch", "create", "patch", "delete", "get"} <= set(permission.verbs)


def test_a_native_group_needs_all_its_pods_and_is_preempted_whole():
    assert group()["spec"] == {
        "schedulingPolicy": {"gang": {"minCount": 2}},
        "disruptionMode": {"all": {}},
    }
    assert group()["metadata"]["ownerReferences"][0]["uid"] == "uid-1"
    assert native().group.kind is POD_GROUPS


def test_a_native_group_has_the_priority_of_its_pods():
    assert group(scheduling__priorityClassName="train")["spec"]["priorityClassName"] == "train"


@pytest.mark.parametrize(("status", "scheduled"), [("True", True), ("False", False), ("Unknown", None), (None, None)])
def test_a_native_group_says_whether_it_was_placed(status, scheduled):
    condition = {"type": "PodGroupInitiallyScheduled", "status": status, "message": "no room"}
    found = group() | {"status": {"conditions": [condition] if status else []}}
    assert native().group.view(found) == GangView(
        name="good-p0",
        uid="u",
        resource_version="5",
        min_count=2,
        scheduled=scheduled,
        message="no room" if status else "",
    )


def test_a_patch_of_the_size_is_seen_as_the_new_size():
    found = group()
    assert native().group.view(found | native().group.resized(1)).min_count == 1


def test_a_native_pod_joins_by_name_and_membership_is_what_the_server_kept():
    joined = native().joined(run().spec, "good-p0", size=2, member=0)
    assert native().membership(joined) == "good-p0"
    assert native().membership({"spec": {}}) == ""


def test_without_a_gang_there_is_no_object_and_pods_are_as_they_are():
    alone = native(scheduling__gang="None")
    assert alone.group is None
    assert alone.joined(run().spec, "good-p0", size=2, member=0) == {}
    assert alone.membership({"spec": {"schedulingGroup": {"podGroupName": "x"}}}) == ""


def kueue(**changes):
    return run(scheduling__gang="Kueue", scheduling__queue="team", **changes).spec


def test_a_pod_joins_kueue_s_group_by_labels_and_annotations_alone():
    found = gang_of(kueue())
    assert found.group is None
    assert found.joined(kueue(), "good-p3", size=2, member=1) == {
        "metadata": {
            "labels": {"kueue.x-k8s.io/queue-name": "team", "kueue.x-k8s.io/pod-group-name": "good-p3"},
            "annotations": {
                "kueue.x-k8s.io/pod-group-total-count": "2",
                "kueue.x-k8s.io/retriable-in-group": "false",
                "kueue.x-k8s.io/role-hash": "worker",
                "kueue.x-k8s.io/pod-group-pod-index-label": "starcoder.dev/member",
            },
        }
    }


def test_a_member_beyond_the_size_of_its_group_has_no_index_there_which_kueue_would_refuse():
    joined = gang_of(kueue()).joined(kueue(), "good-p3", size=1, member=1)
    assert "kueue.x-k8s.io/pod-group-pod-index-label" not in joined["metadata"]["annotations"]


def test_a_pod_is_kueue_s_when_its_webhook_has_labelled_it():
    gang, pod = gang_of(kueue()), gang_of(kueue()).joined(kueue(), "good-p3", size=2, member=0)
    assert (gang.membership(pod), gang.size(pod)) == ("", 2)
    pod["metadata"]["labels"]["kueue.x-k8s.io/managed"] = "true"
    assert gang.membership(pod) == "good-p3"
    assert (gang.membership({"metadata": {}}), gang.size({"metadata": {}})) == ("", 0)


@pytest.mark.parametrize("gang", ["Native", "None"])
def test_other_gangs_ask_no_size_of_a_pod(gang):
    assert GANGS[gang].size({"metadata": {"annotations": {"kueue.x-k8s.io/pod-group-total-count": "2"}}}) == 0
