"""A Plan becomes objects of a real API server, with the operator's own rights and in a restricted namespace."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from kubernetes import client, config

from starcoder_operator.act import Actor
from starcoder_operator.adapters import connection
from starcoder_operator.adapters.clock import SystemClock
from starcoder_operator.adapters.errors import Conflict, Refused
from starcoder_operator.adapters.events import Events
from starcoder_operator.adapters.kinds import (
    CONFIG_MAPS,
    DISRUPTION_BUDGETS,
    EVENTS,
    LEASES,
    POD_GROUPS,
    PODS,
    ROLE_BINDINGS,
    ROLES,
    RUNS,
    SERVICE_ACCOUNTS,
)
from starcoder_operator.adapters.kube import Kube
from starcoder_operator.adapters.memory import Memory
from starcoder_operator.adapters.metrics import Metrics
from starcoder_operator.adapters.nodes import NodeCache
from starcoder_operator.adapters.sightings import Sightings
from starcoder_operator.api.v1alpha1 import StarCoderRunStatus
from starcoder_operator.api.v1alpha1.goodput import Buckets, Goodput, Recovery, StageSeconds
from starcoder_operator.domain.plan import (
    CreatePod,
    DeleteGang,
    DeletePod,
    EmitEvent,
    EnsureAccess,
    EnsureDisruptionBudget,
    EnsureGang,
    EnsureLeases,
    Plan,
    WriteAssignment,
)
from starcoder_operator.domain.snapshot import Snapshot
from starcoder_operator.observe import Observer
from starcoder_operator.settings import Settings
from starcoder_trainer.contract import names
from starcoder_trainer.contract.assignment import Assignment, Layout, Member
from tests.support.operator_space import OPERATOR, Space, space
from tests.support.runs import changed

pytestmark = pytest.mark.integration

WRITES = ("create", "update", "patch", "delete")


@pytest.fixture(scope="module")
def here(kubeconfig: Path) -> Iterator[Space]:
    with space(kubeconfig, "act") as found:
        yield found


@pytest.fixture(scope="module")
def operators_kubeconfig(here: Space, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return here.kubeconfig_of(OPERATOR, tmp_path_factory.mktemp("operator"))


@dataclass
class Bench:
    """One run and an operator's observer and actor, without a planner between them."""

    here: Space
    name: str
    observe: Observer
    act: Actor
    memory: Memory
    calls: Counter[str]
    metrics: Metrics

    async def look(self) -> Snapshot:
        return await self.observe(self.here.name, self.name)

    async def do(self, *actions, status: StarCoderRunStatus | None = None) -> float | None:
        snapshot = await self.look()
        return await self.act(snapshot, Plan(status or snapshot.status, tuple(actions)))

    @property
    def problems(self) -> dict[str, str]:
        return self.memory.of((self.here.name, self.name), self.uid).problems

    @property
    def uid(self) -> str:
        return str(self.here.get(RUNS, self.name)["metadata"]["uid"])

    @property
    def written(self) -> int:
        return sum(self.calls[verb] for verb in WRITES)

    def assignment(self, **changes) -> Assignment:
        members = (Member(0), Member(1))
        return replace(Assignment(self.uid, 1, "hold", members, 2, Layout(2, 1, 2)), **changes)


@pytest.fixture
async def make_bench(here: Space, operators_kubeconfig: Path) -> AsyncIterator:
    calls: Counter[str] = Counter()
    kube = Kube(await connection.load(str(operators_kubeconfig)), count=lambda verb, code: calls.update([verb]))
    clock, memory, metrics = SystemClock(), Memory(), Metrics()

    def make(*, trainer_image: str = "localhost/trainer:1", **changes) -> Bench:
        name = f"run-{uuid.uuid4().hex[:8]}"
        here.apply(changed(name=name, **changes))
        return Bench(
            here=here,
            name=name,
            observe=Observer(kube, clock, Sightings(clock), NodeCache(), memory),
            act=Actor(
                kube=kube,
                events=Events(kube, "test"),
                clock=clock,
                memory=memory,
                settings=Settings(trainer_image=trainer_image),
                metrics=metrics,
            ),
            memory=memory,
            calls=calls,
            metrics=metrics,
        )

    yield make
    await kube.close()


@pytest.fixture
def bench(make_bench) -> Bench:
    return make_bench()


def gang(bench: Bench, number: int = 1) -> str:
    return f"{bench.name}-p{number}"


def everything(bench: Bench) -> tuple:
    return (
        EnsureAccess(),
        EnsureLeases((0, 1)),
        EnsureGang(gang(bench), 2),
        CreatePod(0, 0, gang(bench)),
        CreatePod(1, 0, gang(bench)),
        WriteAssignment(bench.assignment(), "{}", ""),
    )


def made_of(bench: Bench) -> dict[str, list[str]]:
    kinds = (SERVICE_ACCOUNTS, ROLES, ROLE_BINDINGS, LEASES, POD_GROUPS, PODS, CONFIG_MAPS)
    return {k.kind: [o["metadata"]["name"] for o in bench.here.owned(k, bench.name)] for k in kinds}


async def test_all_that_a_run_needs_is_made(bench):
    await bench.do(*everything(bench))
    run = bench.name
    assert made_of(bench) == {
        "ServiceAccount": [f"{run}-agent"],
        "Role": [f"{run}-agent"],
        "RoleBinding": [f"{run}-agent"],
        "Lease": [f"{run}-w0", f"{run}-w1"],
        "PodGroup": [f"{run}-p1"],
        "Pod": [f"{run}-w0-0", f"{run}-w1-0"],
        "ConfigMap": [f"{run}-assignment"],
    }
    assert bench.problems == {}


async def test_what_is_made_belongs_to_the_run_and_holds_nothing_up(bench):
    await bench.do(*everything(bench))
    kinds = (SERVICE_ACCOUNTS, ROLES, ROLE_BINDINGS, LEASES, POD_GROUPS, PODS, CONFIG_MAPS)
    for kind in kinds:
        for thing in bench.here.owned(kind, bench.name):
            (owner,) = thing["metadata"]["ownerReferences"]
            assert (owner["kind"], owner["name"], owner["uid"]) == ("StarCoderRun", bench.name, bench.uid)
            assert owner["controller"] is True
            assert not owner.get("blockOwnerDeletion")
            assert not [f for f in thing["metadata"].get("finalizers", ()) if f.startswith("starcoder")]


async def test_what_was_made_is_observed_as_it_was_meant(bench):
    await bench.do(*everything(bench))
    seen = await bench.look()
    assert seen.rbac_present
    assert {p.name: (p.member, p.incarnation, p.scheduling_group) for p in seen.pods} == {
        f"{bench.name}-w0-0": (0, 0, gang(bench)),
        f"{bench.name}-w1-0": (1, 0, gang(bench)),
    }
    assert {lease.member for lease in seen.leases} == {0, 1}
    assert (seen.gang.name, seen.gang.min_count, seen.gang_api) == (gang(bench), 2, True)
    assert seen.assignment.assignment == bench.assignment()


@pytest.fixture
def priority(here: Space) -> Iterator[str]:
    classes, name = client.SchedulingV1Api(here.api), f"{here.name}-train"
    classes.create_priority_class({"metadata": {"name": name}, "value": 1000})
    yield name
    classes.delete_priority_class(name)


async def test_the_server_keeps_all_that_a_group_says_and_its_pods_have_its_priority(make_bench, priority):
    bench = make_bench(scheduling__priorityClassName=priority)
    await bench.do(*everything(bench))
    (group,) = bench.here.owned(POD_GROUPS, bench.name)
    assert group["spec"]["schedulingPolicy"] == {"gang": {"minCount": 2}}
    assert group["spec"]["disruptionMode"] == {"all": {}}
    assert group["spec"]["priority"] == 1000
    assert {pod["spec"]["priority"] for pod in bench.here.owned(PODS, bench.name)} == {1000}


async def test_a_pass_that_was_cut_is_done_again_without_harm(bench):
    actions = everything(bench)[:-1]
    await bench.do(*actions)
    before = made_of(bench)
    await bench.do(*actions)
    assert made_of(bench) == before
    assert bench.problems == {}


async def test_a_changed_role_is_mended(bench):
    await bench.do(EnsureAccess())
    name = names.service_account_name(bench.name)
    rules = bench.here.get(ROLES, name)["rules"]
    bench.here.patch(ROLES, name, {"rules": []})
    await bench.do(EnsureAccess())
    assert bench.here.get(ROLES, name)["rules"] == rules


async def test_a_binding_to_another_role_is_made_anew(bench):
    name = names.service_account_name(bench.name)
    await bench.do(EnsureAccess())
    binding = bench.here.get(ROLE_BINDINGS, name)
    bench.here.delete(ROLE_BINDINGS, name)
    stray = {k: v for k, v in binding.items() if k != "metadata"} | {
        "metadata": {k: v for k, v in binding["metadata"].items() if k in ("name", "labels", "ownerReferences")},
        "roleRef": {**binding["roleRef"], "name": "other"},
    }
    bench.here.create_object(ROLE_BINDINGS, stray)
    await bench.do(EnsureAccess())
    assert bench.here.get(ROLE_BINDINGS, name)["roleRef"]["name"] == name


async def test_a_group_is_made_smaller_before_replacements_come(bench):
    await bench.do(EnsureGang(gang(bench), 2))
    await bench.do(EnsureGang(gang(bench), 1))
    assert (await bench.look()).gang.min_count == 1


async def test_a_disruption_budget_is_made_and_changed_in_place(bench):
    await bench.do(EnsureDisruptionBudget(1))
    made = bench.here.get(DISRUPTION_BUDGETS, bench.name)
    assert made["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    assert made["spec"]["selector"] == {"matchLabels": {names.LABEL_RUN: bench.name}}
    assert made["metadata"]["ownerReferences"][0]["uid"] == bench.uid
    assert (await bench.look()).budget == 1
    await bench.do(EnsureDisruptionBudget(0))
    changed_now = bench.here.get(DISRUPTION_BUDGETS, bench.name)
    assert (changed_now["metadata"]["uid"], changed_now["spec"]["minAvailable"]) == (made["metadata"]["uid"], 0)
    bench.memory.of((bench.here.name, bench.name), bench.uid).budget = None
    assert (await bench.look()).budget == 0


async def test_an_assignment_is_replaced_only_as_it_was_read(bench):
    await bench.do(WriteAssignment(bench.assignment(), "{}", ""))
    version = (await bench.look()).assignment.resource_version
    await bench.do(WriteAssignment(bench.assignment(attempt=2), "{}", version))
    with pytest.raises(Conflict):
        await bench.do(WriteAssignment(bench.assignment(attempt=3), "{}", version))
    with pytest.raises(Conflict):
        await bench.do(WriteAssignment(bench.assignment(attempt=3), "{}", ""))
    assert (await bench.look()).assignment.assignment.attempt == 2


async def test_only_the_pod_that_was_meant_is_deleted(bench):
    await bench.do(EnsureAccess(), CreatePod(0, 0, ""))
    (pod,) = (await bench.look()).pods
    await bench.do(DeletePod(pod.name, "another-uid", "test"))
    assert len((await bench.look()).pods) == 1
    await bench.do(DeletePod(pod.name, pod.uid, "test"))
    assert [p for p in (await bench.look()).pods if not p.deleting] == []
    await bench.do(DeletePod(pod.name, pod.uid, "test"))


async def test_a_group_that_is_deleted_is_none_any_more(bench):
    await bench.do(EnsureGang(gang(bench), 2))
    there = (await bench.look()).gang
    await bench.do(DeleteGang(there.name, there.uid))
    assert (await bench.look()).gang is None


async def test_something_of_somebody_else_is_refused_and_remembered(bench):
    lease = names.lease_name(bench.name, 0)
    bench.here.create_object(LEASES, {"metadata": {"name": lease}})
    assert await bench.do(EnsureLeases((0,))) is not None
    assert (await bench.look()).problems["create lease"].startswith(f"Lease {lease} is there already")
    with pytest.raises(Refused, match="belongs to nobody"):
        await bench.do(EnsureLeases((0,)))
    bench.here.delete(LEASES, lease)
    await bench.do(EnsureLeases((0,)))
    assert (await bench.look()).problems == {}


async def test_a_refusal_is_forgotten_when_its_action_is_not_wanted_any_more(bench):
    bench.here.create_object(LEASES, {"metadata": {"name": names.lease_name(bench.name, 0)}})
    await bench.do(EnsureLeases((0,)))
    await bench.do()
    assert (await bench.look()).problems == {}


@pytest.mark.parametrize(
    ("patch", "part"),
    [
        ({"spec": {"containers": [{"name": "worker", "imagePullPolice": "Never"}]}}, "imagePullPolice"),
        ({"spec": {"containers": [{"name": "worker", "resources": {"limits": {"cpu": "x"}}}]}}, "quantities"),
        ({"spec": {"hostPID": True}}, "violates PodSecurity"),
        ({"spec": {"containers": [{"image": "x"}]}}, "expected name in every item"),
    ],
    ids=["unknown-field", "invalid-value", "pod-security", "no-key"],
)
async def test_of_a_spec_whose_pod_is_refused_nothing_is_made(make_bench, patch, part):
    bench = make_bench(workers__podPatch=patch)
    await bench.do(*everything(bench))
    assert part in (await bench.look()).problems["create pod"]
    assert not any(made_of(bench).values())


async def test_where_the_next_pod_is_refused_the_attempt_is_held_and_the_lost_pod_deleted_all_the_same(bench):
    """As where a quota has no room for it until the lost one is gone; the operator was started again meanwhile."""
    await bench.do(*everything(bench))
    bench.here.patch(RUNS, bench.name, {"spec": {"workers": {"podPatch": {"spec": {"hostPID": True}}}}})
    lost = next(p for p in (await bench.look()).pods if p.member == 1)
    held = WriteAssignment(bench.assignment(attempt=2), "{}", (await bench.look()).assignment.resource_version)
    group = gang(bench)
    await bench.do(held, DeletePod(lost.name, lost.uid, "lost"), EnsureGang(group, 1), CreatePod(1, 1, group))
    seen = await bench.look()
    assert "violates PodSecurity" in seen.problems["create pod"]
    assert seen.assignment.assignment.attempt == 2
    assert [p.name for p in seen.pods if not p.deleting] == [f"{bench.name}-w0-0"]


async def test_a_mended_patch_is_tried_again(make_bench):
    bench = make_bench(workers__podPatch={"spec": {"nonsense": 1}})
    await bench.do(*everything(bench))
    bench.here.patch(RUNS, bench.name, {"spec": {"workers": {"podPatch": {"spec": {"nonsense": None}}}}})
    await bench.do(*everything(bench))
    assert (await bench.look()).problems == {}
    assert len((await bench.look()).pods) == 2


async def test_without_any_image_nothing_is_made_and_it_is_told_what_to_do(make_bench):
    bench = make_bench(trainer_image="")
    await bench.do(*everything(bench))
    assert "spec.workers.image: not set" in (await bench.look()).problems["create pod"]
    assert not any(made_of(bench).values())


async def test_the_runs_own_image_wins_over_the_operators(make_bench):
    bench = make_bench(workers__image="registry.example.com/mine:1")
    await bench.do(EnsureAccess(), CreatePod(0, 0, ""))
    (pod,) = bench.here.owned(PODS, bench.name)
    assert {c["image"] for c in [*pod["spec"]["initContainers"], *pod["spec"]["containers"]]} == {
        "registry.example.com/mine:1"
    }


async def test_lost_nodes_are_kept_away_from(bench):
    await bench.do(EnsureAccess(), CreatePod(0, 0, "", avoid_nodes=("n1", "n2")))
    assert (await bench.look()).pods[0].avoided_nodes == ("n1", "n2")


async def test_the_server_takes_every_field_a_spec_may_have(make_bench):
    bench = make_bench(
        workers__env=[
            {"name": "A", "value": "1"},
            {"name": "B", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}},
        ],
        workers__envFrom=[{"configMapRef": {"name": "more", "optional": True}, "prefix": "X_"}],
        workers__tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        workers__nodeSelector={"gpu": "h100"},
        workers__sharedMemory="1Gi",
        workers__scratch={"ephemeral": {"size": "1Ti", "storageClassName": "fast"}},
        workers__imagePullSecrets=[{"name": "registry"}],
        workers__resources={"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "2Gi"}},
        workers__affinity={
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [{"matchExpressions": [{"key": "z", "operator": "Exists"}]}]
                }
            }
        },
        storage__credentialsSecret="s3",
    )
    await bench.do(EnsureAccess(), CreatePod(0, 0, "", avoid_nodes=("n1",), shun_nodes=("n2",)))
    assert bench.problems == {}
    assert len((await bench.look()).pods) == 1


async def test_a_status_that_differs_is_written_and_one_that_does_not_is_not(bench):
    status = StarCoderRunStatus(state="Starting", attempt=1)
    await bench.do(status=status)
    assert bench.here.status(bench.name)["state"] == "Starting"
    before = bench.written
    await bench.do(status=status)
    assert bench.written == before


async def test_a_status_made_from_an_old_snapshot_is_refused(bench):
    old = await bench.look()
    await bench.do(status=StarCoderRunStatus(state="Starting"))
    with pytest.raises(Conflict):
        await bench.act(old, Plan(StarCoderRunStatus(state="Running")))
    assert bench.here.status(bench.name)["state"] == "Starting"


async def test_mere_progress_waits_its_turn(bench):
    status = StarCoderRunStatus(state="Running", iteration=1)
    await bench.do(status=status)
    wait = await bench.do(status=status.model_copy(update={"iteration": 2}))
    assert 0 < wait <= Settings().status_interval
    assert bench.here.status(bench.name)["iteration"] == 1
    await bench.do(status=status.model_copy(update={"iteration": 2, "state": "Succeeded"}))
    assert bench.here.status(bench.name)["iteration"] == 2


async def test_time_alone_is_never_written_and_goes_with_other_news(bench):
    began = "2026-01-01T00:00:00.000Z"
    goodput = Goodput(since=began, as_of=began, bucket="queued")
    recovery = Recovery(cause="Crash", at=began, from_attempt=1, to_attempt=2, iteration=9, stage="placing")
    status = StarCoderRunStatus(state="Pending", goodput=goodput, recoveries=(recovery,))
    await bench.do(status=status)
    later = goodput.model_copy(update={"as_of": "2026-01-01T01:00:00.000Z", "buckets": Buckets(queued=3600)})
    longer = recovery.model_copy(update={"seconds": StageSeconds(placing=3600)})
    assert await bench.do(status=status.model_copy(update={"goodput": later, "recoveries": (longer,)})) is None
    assert bench.here.status(bench.name)["goodput"] == goodput.to_dict()
    formed = later.model_copy(update={"bucket": "forming"})
    await bench.do(status=status.model_copy(update={"goodput": formed, "recoveries": (longer,)}))
    assert bench.here.status(bench.name)["goodput"]["buckets"]["queued"] == 3600
    assert bench.here.status(bench.name)["recoveries"] == [longer.to_dict()]


async def test_a_recovery_is_counted_when_its_end_is_written(bench):
    began = "2026-01-01T00:00:00.000Z"
    recovery = Recovery(cause="Crash", at=began, from_attempt=1, to_attempt=2, iteration=9, stage="placing")
    over = recovery.model_copy(update={"stage": None, "seconds": StageSeconds(forming=1.5), "total": 1.5})
    for record in (recovery, over, over):
        await bench.do(status=StarCoderRunStatus(state="Running", recoveries=(record,)))
    labels = {"namespace": bench.here.name, "name": bench.name, "cause": "Crash"}
    assert bench.metrics.registry.get_sample_value("starcoder_run_recoveries_total", labels) == 1


async def test_an_event_told_twice_is_one_object_that_counts(bench):
    event = EmitEvent("Warning", "NodeLost", "node n1 is gone")
    await bench.do(event)
    await bench.do(event)
    found = [
        e
        for e in bench.here.request("GET", EVENTS.path(bench.here.name))["items"]
        if e["regarding"]["name"] == bench.name
    ]
    assert [(e["reason"], e["note"], e["series"]["count"]) for e in found] == [("NodeLost", "node n1 is gone", 2)]


# What the agents may do


def rules_of(api: client.ApiClient, namespace: str) -> list:
    """`kubectl auth can-i --list`, as comparable values."""
    review = {"spec": {"namespace": namespace}}
    status = client.AuthorizationV1Api(api).create_self_subject_rules_review(review).status
    assert not status.incomplete
    resources = [(r.api_groups, r.resources, r.resource_names, r.verbs) for r in status.resource_rules]
    return [*resources, *((r.non_resource_urls, r.verbs) for r in status.non_resource_rules)]


async def test_agents_may_read_their_assignment_and_write_their_leases_and_nothing_else(bench, here, tmp_path):
    await bench.do(EnsureAccess())
    found = {}
    for account in (names.service_account_name(bench.name), "default"):
        with config.new_client_from_config(str(here.kubeconfig_of(account, tmp_path))) as api:
            found[account] = rules_of(api, here.name)
    everybody = found.pop("default")
    (agents,) = found.values()
    assert [rule for rule in agents if rule not in everybody] == [
        ([""], ["configmaps"], [f"{bench.name}-assignment"], ["get", "list", "watch"]),
        (["coordination.k8s.io"], ["leases"], [f"{bench.name}-w0", f"{bench.name}-w1"], ["get", "update", "patch"]),
    ]


async def test_agents_do_what_they_have_to_and_are_refused_the_rest(bench, here, tmp_path):
    await bench.do(EnsureAccess(), EnsureLeases((0, 1)), WriteAssignment(bench.assignment(), "{}", ""))
    account = here.kubeconfig_of(names.service_account_name(bench.name), tmp_path)
    mine, other = names.assignment_name(bench.name), "kube-root-ca.crt"
    with config.new_client_from_config(str(account)) as api:
        core, leases = client.CoreV1Api(api), client.CoordinationV1Api(api)
        listed = core.list_namespaced_config_map(here.name, field_selector=f"metadata.name={mine}")
        assert [c.metadata.name for c in listed.items] == [mine]
        lease = {"metadata": {"annotations": {names.ANNOTATION_REPORT: "{}"}}}
        leases.patch_namespaced_lease(names.lease_name(bench.name, 1), here.name, lease)
        refused = [
            lambda: core.list_namespaced_config_map(here.name),
            lambda: core.read_namespaced_config_map(other, here.name),
            lambda: core.list_namespaced_secret(here.name),
            lambda: core.list_namespaced_pod(here.name),
            lambda: core.patch_namespaced_config_map(mine, here.name, {"data": {}}),
            lambda: leases.list_namespaced_lease(here.name),
            lambda: leases.patch_namespaced_lease("starcoder-operator", here.name, lease),
            lambda: leases.create_namespaced_lease(here.name, {"metadata": {"name": f"{bench.name}-w9"}}),
            lambda: leases.delete_namespaced_lease(names.lease_name(bench.name, 1), here.name),
        ]
        for call in refused:
            with pytest.raises(client.ApiException) as error:
                call()
            assert error.value.status == 403


async def test_a_status_is_written_whatever_characters_a_message_holds(bench):
    """gloo ends its errors with an emoji, and other libraries colour theirs."""
    message = 'GLHF! \U0001f3d6\ufe0f \x1b[31mred\x1b[0m \x85\x9b \u2028 \ufeff \x00 \\ud83c "quoted"'
    await bench.do(status=StarCoderRunStatus(message=message))
    assert bench.here.status(bench.name)["message"] == message
