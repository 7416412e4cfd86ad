"""A member's Pod: what runs in it, what it may do, and where it is placed."""

import pytest

from starcoder_operator.build.containers import AGENT_RESOURCES, UNPRIVILEGED, Image
from starcoder_operator.build.owner import Owner
from starcoder_operator.build.patch import PatchError
from starcoder_operator.build.pod import TOLERATION_SECONDS, pod
from starcoder_operator.domain.pod_template import ANNOTATION_AVOIDS, ANNOTATION_TEMPLATE, template_digest
from starcoder_trainer.agent.main import Settings
from starcoder_trainer.contract import names
from starcoder_trainer.contract.heartbeat import USUAL, Rhythm
from tests.support.runs import run

OWNER = Owner("training", "good", "uid-1")
IMAGE = Image("registry.example.com/trainer:1", "IfNotPresent")
MOUNTED = {
    "metadata.namespace": "training",
    "metadata.name": "good-w1-4",
    "status.podIP": "10.0.0.9",
    "spec.nodeName": "n",
}


def made(*, image=IMAGE, avoid_nodes=(), shun_nodes=(), gang=None, **changes):
    where = {"avoid_nodes": avoid_nodes, "shun_nodes": shun_nodes}
    return pod(OWNER, run(**changes).spec, image, member=1, incarnation=4, gang=gang, **where)


def container(manifest, name):
    spec = manifest["spec"]
    return next(c for c in [*spec["initContainers"], *spec["containers"]] if c["name"] == name)


def worker(manifest):
    return container(manifest, names.CONTAINER_WORKER)


def agent(manifest):
    return container(manifest, names.CONTAINER_AGENT)


def paths(of):
    return {m["mountPath"]: m["name"] for m in of["volumeMounts"]}


def volume(manifest, name):
    return next(v for v in manifest["spec"]["volumes"] if v["name"] == name)


def environment(of):
    """As kubelet fills it in."""
    return {
        v["name"]: v["value"] if "value" in v else MOUNTED[v["valueFrom"]["fieldRef"]["fieldPath"]] for v in of["env"]
    }


def test_its_name_is_never_used_again_and_labels_say_whose_it_is():
    meta = made()["metadata"]
    assert meta["name"] == "good-w1-4"
    assert meta["labels"] == {
        names.LABEL_RUN: "good",
        names.LABEL_MEMBER: "1",
        names.LABEL_INCARNATION: "4",
        "app.kubernetes.io/managed-by": "starcoder-operator",
    }
    assert meta["ownerReferences"][0]["uid"] == "uid-1"


def test_the_agent_reads_all_it_needs_from_its_environment():
    settings = Settings.from_environment(environment(agent(made())))
    assert (settings.run, settings.run_uid, settings.namespace) == ("good", "uid-1", "training")
    assert (settings.member, settings.incarnation, settings.pod) == (1, 4, "good-w1-4")
    assert (settings.pod_ip, settings.node) == ("10.0.0.9", "n")


def test_the_agent_is_told_the_rhythm_of_its_heartbeats():
    manifest = pod(OWNER, run().spec, Image("i"), member=1, incarnation=4, rhythm=Rhythm(0.5, 4))
    assert Settings.from_environment(environment(agent(manifest))).rhythm == Rhythm(0.5, 4)
    assert Settings.from_environment(environment(agent(made()))).rhythm == USUAL


def test_what_agent_and_worker_read_by_default_is_mounted():
    settings = Settings.from_environment(environment(agent(made())))
    for each in (agent, worker):
        mounted = paths(each(made(storage__credentialsSecret="s3")))
        assert mounted[str(settings.worker_socket.parent)] == "runtime"
        assert mounted[settings.scratch] == "scratch"
        assert mounted[str(settings.credentials_dir)] == "s3-credentials"
    assert agent(made())["ports"] == [{"name": "metrics", "containerPort": settings.metrics_port, "protocol": "TCP"}]


def test_the_agent_is_a_native_sidecar_and_the_worker_is_started_again_in_its_place():
    manifest = made()
    assert agent(manifest)["restartPolicy"] == "Always"
    assert agent(manifest) in manifest["spec"]["initContainers"]
    assert manifest["spec"]["restartPolicy"] == "OnFailure"
    assert agent(manifest)["command"] == ["starcoder-trainer", "agent"]
    assert worker(manifest)["command"] == ["starcoder-trainer", "worker"]


def test_only_the_agent_has_the_api_token():
    manifest = made()
    assert manifest["spec"]["automountServiceAccountToken"] is False
    token = next(v["name"] for v in manifest["spec"]["volumes"] if "projected" in v)
    holders = [
        c["name"]
        for c in [*manifest["spec"]["initContainers"], *manifest["spec"]["containers"]]
        if token in paths(c).values()
    ]
    assert holders == [names.CONTAINER_AGENT]
    assert paths(agent(manifest))["/var/run/secrets/kubernetes.io/serviceaccount"] == token
    sources = volume(manifest, token)["projected"]["sources"]
    found = {k: v for s in sources for k, v in s.items()}
    assert found["serviceAccountToken"]["path"] == "token"
    assert found["configMap"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}]
    assert found["downwardAPI"]["items"][0]["path"] == "namespace"


def test_only_the_worker_has_gpus():
    manifest = made(workers__resources={"requests": {"cpu": 4}, "limits": {"memory": "8Gi"}})
    assert worker(manifest)["resources"] == {
        "requests": {"cpu": "4", "nvidia.com/gpu": "2"},
        "limits": {"memory": "8Gi", "nvidia.com/gpu": "2"},
    }
    assert agent(manifest)["resources"] == AGENT_RESOURCES
    assert environment(agent(manifest))["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert "NVIDIA_VISIBLE_DEVICES" not in environment(worker(manifest))


def test_a_gpu_may_have_another_resource_name():
    assert worker(made(workers__gpuResource="amd.com/gpu"))["resources"]["limits"] == {"amd.com/gpu": "2"}


def test_it_meets_the_restricted_pod_security_standard():
    spec = made()["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["securityContext"]["fsGroup"] == spec["securityContext"]["runAsGroup"]
    for each in [*spec["initContainers"], *spec["containers"]]:
        assert each["securityContext"] == UNPRIVILEGED
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    assert not any("hostPath" in v for v in spec["volumes"])


def test_what_a_container_writes_goes_to_volumes():
    manifest = made()
    assert worker(manifest)["securityContext"]["readOnlyRootFilesystem"] is True
    tmp = {paths(agent(manifest))["/tmp"], paths(worker(manifest))["/tmp"]}
    assert len(tmp) == 2
    assert all(environment(each(manifest))["HOME"] == "/tmp" for each in (agent, worker))


def test_a_secret_may_be_missing_when_the_pod_starts():
    secret = volume(made(storage__credentialsSecret="s3"), "s3-credentials")["secret"]
    assert secret["secretName"] == "s3"
    assert secret["optional"] is True


def test_without_a_secret_none_is_mounted():
    manifest = made()
    assert not any("secret" in v for v in manifest["spec"]["volumes"])
    assert names.CREDENTIALS_DIR not in paths(worker(manifest))


def test_shared_memory_has_the_size_that_was_asked_for():
    manifest = made(workers__sharedMemory="64Gi")
    assert volume(manifest, paths(worker(manifest))["/dev/shm"])["emptyDir"] == {
        "medium": "Memory",
        "sizeLimit": "64Gi",
    }
    assert "/dev/shm" not in paths(worker(made()))


def test_scratch_is_the_nodes_own_disk_by_default():
    assert volume(made(), "scratch")["emptyDir"] == {}
    sized = made(workers__scratch={"emptyDir": {"sizeLimit": "1Ti"}})
    assert volume(sized, "scratch")["emptyDir"] == {"sizeLimit": "1Ti"}


def test_a_directory_of_the_node_is_the_runs_alone_and_can_be_written():
    manifest = made(workers__scratch={"hostPath": {"path": "/mnt/nvme/"}})
    assert volume(manifest, "scratch")["hostPath"] == {
        "path": "/mnt/nvme/training/good/uid-1",
        "type": "DirectoryOrCreate",
    }
    first = manifest["spec"]["initContainers"][0]
    assert first["command"] == ["chown", "10001:10001", names.SCRATCH_DIR]
    assert first["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN"]}
    assert paths(first) == {names.SCRATCH_DIR: "scratch"}


def test_scratch_may_be_a_claim_that_comes_and_goes_with_the_pod():
    claim = made(workers__scratch={"ephemeral": {"size": "1Ti", "storageClassName": "fast"}})
    assert volume(claim, "scratch")["ephemeral"]["volumeClaimTemplate"]["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "1Ti"}},
        "storageClassName": "fast",
    }


def test_variables_are_the_workers_and_win_over_what_is_not_reserved():
    variables = [{"name": "HOME", "value": "/scratch"}, {"name": "NCCL_DEBUG", "value": "INFO"}]
    manifest = made(workers__env=variables, workers__envFrom=[{"secretRef": {"name": "wandb"}}])
    assert environment(worker(manifest))["HOME"] == "/scratch"
    assert [v["name"] for v in worker(manifest)["env"]].count("HOME") == 1
    assert worker(manifest)["env"][-2:] == variables
    assert worker(manifest)["envFrom"] == [{"secretRef": {"name": "wandb"}}]
    assert "NCCL_DEBUG" not in environment(agent(manifest))
    assert "envFrom" not in agent(manifest)


def test_lost_nodes_are_tolerated_for_seconds_only():
    tolerations = {t["key"]: t for t in made()["spec"]["tolerations"]}
    for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"):
        assert tolerations[key] == {
            "key": key,
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": TOLERATION_SECONDS,
        }


def test_tolerations_of_the_user_stand_beside_or_instead():
    own = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 9}
    gpu = {"key": "nvidia.com/gpu", "operator": "Exists"}
    found = made(workers__tolerations=[own, gpu])["spec"]["tolerations"]
    assert [t["key"] for t in found] == [
        "node.kubernetes.io/not-ready",
        "node.kubernetes.io/unreachable",
        "nvidia.com/gpu",
    ]
    assert found[1:] == [own, gpu]


def terms(manifest):
    node = manifest["spec"]["affinity"]["nodeAffinity"]
    return node["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]


def forbidden(*nodes):
    return [{"key": "metadata.name", "operator": "NotIn", "values": [n]} for n in nodes]


def test_it_keeps_away_from_nodes_that_were_lost():
    manifest = made(avoid_nodes=("n1", "n2"))
    assert terms(manifest) == [{"matchFields": forbidden("n1", "n2")}]
    assert manifest["metadata"]["annotations"][ANNOTATION_AVOIDS] == "n1,n2"
    assert "affinity" not in made()["spec"]
    assert ANNOTATION_AVOIDS not in made()["metadata"]["annotations"]


def test_keeping_away_holds_for_each_of_the_users_alternatives():
    zones = [{"matchExpressions": [{"key": "zone", "operator": "In", "values": [z]}]} for z in "ab"]
    affinity = {
        "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [*zones, {}]}},
        "podAntiAffinity": {"x": 1},
    }
    manifest = made(avoid_nodes=("n1",), workers__affinity=affinity)
    assert terms(manifest) == [*(zone | {"matchFields": forbidden("n1")} for zone in zones), {}]
    assert manifest["spec"]["affinity"]["podAntiAffinity"] == {"x": 1}


def test_a_patch_of_the_affinity_does_not_bring_lost_nodes_back():
    required = {"nodeSelectorTerms": [{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}]}
    patch = {"spec": {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}}}
    (term,) = terms(made(avoid_nodes=("n1",), workers__podPatch=patch))
    assert term["matchFields"][-1:] == forbidden("n1")


def test_other_nodes_are_preferred_to_one_that_is_silent_whatever_else_is():
    users = {"weight": 5, "preference": {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}}
    field = "preferredDuringSchedulingIgnoredDuringExecution"
    manifest = made(shun_nodes=("n1", "n2"), workers__affinity={"nodeAffinity": {field: [users]}})
    others = {"weight": 100, "preference": {"matchFields": forbidden("n1", "n2")}}
    assert manifest["spec"]["affinity"]["nodeAffinity"] == {field: [users, others]}
    assert ANNOTATION_AVOIDS not in manifest["metadata"]["annotations"]


def test_what_the_spec_says_of_the_pod_is_in_the_pod():
    spec = made(
        workers__nodeSelector={"gpu": "h100"},
        workers__runtimeClassName="nvidia",
        workers__imagePullSecrets=[{"name": "registry"}],
        workers__hostNetwork=True,
        workers__terminationGracePeriodSeconds=7,
        workers__serviceAccountName="cloud",
        scheduling__priorityClassName="train",
    )["spec"]
    assert spec["nodeSelector"] == {"gpu": "h100"}
    assert spec["runtimeClassName"] == "nvidia"
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert (spec["hostNetwork"], spec["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert spec["terminationGracePeriodSeconds"] == 7
    assert spec["serviceAccountName"] == "cloud"
    assert spec["priorityClassName"] == "train"


def test_all_containers_have_the_image_and_how_it_is_pulled():
    manifest = made(workers__scratch={"hostPath": {"path": "/x"}})
    for each in [*manifest["spec"]["initContainers"], *manifest["spec"]["containers"]]:
        assert (each["image"], each["imagePullPolicy"]) == ("registry.example.com/trainer:1", "IfNotPresent")
    assert "imagePullPolicy" not in worker(made(image=Image("i")))


def test_autoscalers_and_meshes_let_it_alone():
    annotations = made()["metadata"]["annotations"]
    assert annotations["karpenter.sh/do-not-disrupt"] == "true"
    assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    assert annotations["sidecar.istio.io/inject"] == "false"
    assert annotations["linkerd.io/inject"] == "disabled"
    assert annotations["kubectl.kubernetes.io/default-container"] == names.CONTAINER_WORKER


def test_it_says_what_it_was_built_from():
    assert made()["metadata"]["annotations"][ANNOTATION_TEMPLATE] == template_digest(run().spec)
    assert made()["metadata"]["annotations"] != made(workers__image="other")["metadata"]["annotations"]


def test_what_the_patch_says_wins_over_what_is_built():
    patch = {
        "metadata": {"annotations": {"karpenter.sh/do-not-disrupt": None, "k8s.v1.cni.cncf.io/networks": "rdma"}},
        "spec": {
            "schedulerName": "mine",
            "securityContext": {"seccompProfile": {"type": "Unconfined"}},
            "containers": [
                {"name": "worker", "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}}},
                {"name": "sidecar", "image": "x"},
            ],
            "initContainers": [{"name": "agent", "resources": {"limits": {"memory": "4Gi"}}}],
        },
    }
    manifest = made(workers__podPatch=patch)
    assert "karpenter.sh/do-not-disrupt" not in manifest["metadata"]["annotations"]
    assert manifest["metadata"]["annotations"]["k8s.v1.cni.cncf.io/networks"] == "rdma"
    assert manifest["spec"]["schedulerName"] == "mine"
    assert manifest["spec"]["securityContext"]["seccompProfile"] == {"type": "Unconfined"}
    assert manifest["spec"]["securityContext"]["runAsNonRoot"] is True
    assert worker(manifest)["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert agent(manifest)["resources"]["limits"] == {"memory": "4Gi"}
    assert [c["name"] for c in manifest["spec"]["containers"]] == ["worker", "sidecar"]


def test_a_patch_of_one_pod_does_not_reach_the_next():
    made(workers__podPatch={"spec": {"securityContext": {"runAsUser": 1}}})
    assert made()["spec"]["securityContext"]["runAsUser"] == 10001


def test_a_patch_cannot_say_that_it_was_built_from_something_else():
    patch = {"metadata": {"annotations": {ANNOTATION_TEMPLATE: "x", ANNOTATION_AVOIDS: "n9"}}}
    annotations = made(workers__podPatch=patch, avoid_nodes=("n1",))["metadata"]["annotations"]
    assert annotations[ANNOTATION_TEMPLATE] == template_digest(run(workers__podPatch=patch).spec)
    assert annotations[ANNOTATION_AVOIDS] == "n1"


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (
            {"initContainers": [{"name": "agent", "$patch": "delete"}]},
            "spec.workers.podPatch.spec.initContainers: found none, expected agent among them",
        ),
        (
            {"containers": [{"$patch": "replace"}, {"name": "mine"}]},
            "spec.workers.podPatch.spec.containers: found mine, expected worker among them",
        ),
        (
            {"containers": [{"name": "agent", "image": "x"}]},
            "spec.workers.podPatch.spec.containers: found agent, expected it under initContainers, where the agent is, "
            "a native sidecar",
        ),
    ],
)
def test_a_patch_leaves_agent_and_worker_in_place(spec, sentence):
    with pytest.raises(PatchError) as refused:
        made(workers__podPatch={"spec": spec})
    assert str(refused.value) == sentence


def test_it_joins_its_gang_whatever_the_patch_says():
    gang = {"spec": {"schedulingGroup": {"podGroupName": "good-p0"}}}
    patch = {"spec": {"schedulingGroup": {"podGroupName": "other"}}}
    assert made(gang=gang, workers__podPatch=patch)["spec"]["schedulingGroup"] == {"podGroupName": "good-p0"}
    assert "schedulingGroup" not in made()["spec"]


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({}, "300"),
        ({"workers__terminationGracePeriodSeconds": 7}, "7"),
        ({"workers__podPatch": {"spec": {"terminationGracePeriodSeconds": 900}}}, "900"),
        ({"workers__podPatch": {"spec": {"terminationGracePeriodSeconds": None}}}, "30"),
    ],
    ids=["default", "spec", "patch", "patched away"],
)
def test_the_agent_knows_how_long_its_pod_may_take_to_end(changes, seconds):
    (told,) = [v["value"] for v in agent(made(**changes))["env"] if v["name"] == names.ENV_GRACE_SECONDS]
    assert told == seconds
