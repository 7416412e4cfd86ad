"""What the API server says becomes one Snapshot, or no pass at all; never a guess."""

import copy
import math
from dataclasses import replace

import pytest

from starcoder_operator.adapters.errors import ApiAbsent, NotFound, Unavailable
from starcoder_operator.adapters.kinds import (
    CONFIG_MAPS,
    LEASES,
    NODES,
    POD_GROUPS,
    PODS,
    ROLE_BINDINGS,
    ROLES,
    RUNS,
    SERVICE_ACCOUNTS,
    kind_of,
)
from starcoder_operator.adapters.memory import Memory
from starcoder_operator.adapters.nodes import NodeCache
from starcoder_operator.adapters.sightings import Sightings
from starcoder_operator.build import assignment, lease, rbac
from starcoder_operator.build.containers import Image
from starcoder_operator.build.owner import Owner
from starcoder_operator.build.pdb import disruption_budget
from starcoder_operator.build.pod import pod
from starcoder_operator.domain.snapshot import ContainerView
from starcoder_operator.gang import GANGS, gang_of
from starcoder_operator.observe import ACCESS_SEEN_FOR, Observer, Unreadable, container_view, covers, pod_view
from starcoder_trainer.contract import names
from starcoder_trainer.contract.assignment import Assignment, Layout, Member
from starcoder_trainer.contract.report import Report
from tests.support.runs import changed, run

OWNER = Owner("default", "good", "uid-1")
SPEC = run().spec
KEY = ("default", "good")


class Time:
    def __init__(self):
        self.seconds = 1000.0

    def monotonic(self):
        return self.seconds

    def now(self):
        return "2026-12-01T00:00:00Z"


class Server:
    """Objects as the API server would hand them out; counts what it is asked."""

    def __init__(self, *things):
        self.things = {}
        self.absent = set()
        self.down = set()
        self.asked = []
        for thing in things:
            self.add(thing)

    def add(self, thing):
        thing = copy.deepcopy(thing)
        meta = thing["metadata"]
        meta.setdefault("uid", f"{thing['kind']}-{meta['name']}")
        meta.setdefault("resourceVersion", str(len(self.things) + 1))
        kind = NODES if thing["kind"] == "Node" else kind_of(thing)
        self.things[kind, meta["name"]] = thing
        return thing

    def _asked(self, kind):
        self.asked.append(kind)
        if kind in self.down:
            raise Unavailable(f"{kind}: no answer")
        if kind in self.absent:
            raise ApiAbsent(f"{kind}: no such API")

    async def get(self, kind, namespace, name):
        self._asked(kind)
        if (kind, name) not in self.things:
            raise NotFound(f"{kind} {name}")
        return copy.deepcopy(self.things[kind, name])

    async def list(self, kind, namespace, labels=""):
        self._asked(kind)
        key, _, value = labels.partition("=")
        return [
            copy.deepcopy(thing)
            for (of, _), thing in self.things.items()
            if of == kind and (thing["metadata"].get("labels") or {}).get(key) == value
        ]


def stored_run(**changes):
    document = changed(**changes)
    document["metadata"] |= {"uid": "uid-1", "generation": 3, "creationTimestamp": "2026-11-30T00:00:00Z"}
    return document


def made_pod(member=0, incarnation=0, *, node="n1", **status):
    manifest = pod(
        OWNER,
        SPEC,
        Image("i"),
        member=member,
        incarnation=incarnation,
        avoid_nodes=("n9",) if incarnation else (),
        gang=gang_of(SPEC).joined(SPEC, "good-p0", size=2, member=member),
    )
    manifest["spec"] |= {"nodeName": node} if node else {}
    return manifest | {"status": {"phase": "Running", "podIP": "10.0.0.1", **status}}


def answered(member, report):
    manifest = lease.lease(OWNER, member)
    manifest["metadata"]["annotations"] = {names.ANNOTATION_REPORT: report}
    return manifest | {"spec": {"renewTime": "2026-12-01T00:00:00.000000Z"}}


def group(name, at, **more):
    found = gang_of(SPEC).group
    manifest = found.manifest(OWNER, SPEC, name, 2) | more
    return manifest | {"metadata": manifest["metadata"] | {"creationTimestamp": at}}


def node(name, ready="True"):
    return {
        "kind": "Node",
        "metadata": {"name": name},
        "status": {"conditions": [{"type": "Ready", "status": ready}]},
    }


REPORT = Report(boot_id="b0", pod="good-w0-0", incarnation=0, node="n2", attempt=1, state="idle")
ASSIGNMENT = Assignment("uid-1", 1, "hold", (Member(0, "b0"), Member(1)), 2, Layout(2, 1, 2))


class Bench:
    def __init__(self, *things):
        self.time = Time()
        self.server = Server(stored_run(), *things)
        self.memory = Memory()
        self.nodes = NodeCache(fault_conditions=("GpuMemWatch",))
        self.sightings = Sightings(self.time)
        self.observe = Observer(self.server, self.time, self.sightings, self.nodes, self.memory)

    async def look(self):
        return await self.observe(*KEY)


@pytest.fixture
def bench():
    return Bench()


async def test_a_run_that_nobody_has_touched_is_seen_as_it_is(bench):
    seen = await bench.look()
    assert (seen.namespace, seen.name, seen.uid, seen.generation) == ("default", "good", "uid-1", 3)
    assert seen.spec == SPEC
    assert (seen.pods, seen.leases, seen.nodes, seen.gang, seen.assignment) == ((), (), {}, None, None)
    assert seen.gang_api
    assert not seen.rbac_present
    assert not seen.deleting
    assert (seen.now, seen.clock) == ("2026-12-01T00:00:00Z", 1000.0)


async def test_nodes_are_all_only_after_the_list_has_come_to_its_end(bench):
    bench.nodes.node_seen(node("n1"))
    assert not (await bench.look()).nodes_complete
    bench.nodes.all_listed()
    assert (await bench.look()).nodes_complete
    bench.nodes.forget_nodes()
    assert not (await bench.look()).nodes_complete


async def test_a_pod_is_seen_with_what_decides_its_fate(bench):
    scheduled = {"type": "PodScheduled", "status": "True"}
    bench.server.add(made_pod(1, 4, conditions=[scheduled, {"type": "Ready", "status": "True"}]))
    (seen,) = (await bench.look()).pods
    assert (seen.name, seen.member, seen.incarnation) == ("good-w1-4", 1, 4)
    assert (seen.phase, seen.node, seen.ip, seen.ready, seen.scheduled) == ("Running", "n1", "10.0.0.1", True, True)
    assert (seen.scheduling_group, seen.avoided_nodes, seen.disruption) == ("good-p0", ("n9",), "")
    assert seen.template


async def test_a_pod_that_finds_no_place_says_why(bench):
    reason = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}
    bench.server.add(made_pod(node="", phase="Pending", conditions=[reason]))
    (seen,) = (await bench.look()).pods
    assert (seen.scheduled, seen.node, seen.unschedulable_message) == (False, "", "0/3 nodes are available")


async def test_a_field_that_the_server_dropped_is_seen_to_be_missing(bench):
    dropped = made_pod()
    del dropped["spec"]["schedulingGroup"]
    bench.server.add(dropped)
    assert (await bench.look()).pods[0].scheduling_group == ""


async def test_a_disrupted_pod_says_by_what():
    condition = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
    manifest = Server().add(made_pod(conditions=[condition]))
    assert pod_view(manifest, GANGS["Native"], 0.0).disruption == "PreemptionByScheduler"


async def test_a_pod_that_was_given_up_says_why():
    manifest = Server().add(made_pod(phase="Failed"))
    manifest["status"] |= {"reason": "UnexpectedAdmissionError", "message": "no device left"}
    assert pod_view(manifest, GANGS["Native"], 0.0).why == "UnexpectedAdmissionError: no device left"


@pytest.mark.parametrize("kind", [PODS, LEASES, CONFIG_MAPS, POD_GROUPS, ROLES, RUNS], ids=str)
async def test_what_cannot_be_read_ends_the_pass(bench, kind):
    grant(bench)
    bench.server.down.add(kind)
    with pytest.raises(Unavailable):
        await bench.look()


async def test_a_node_that_cannot_be_read_ends_the_pass(bench):
    bench.server.add(made_pod())
    bench.server.down.add(NODES)
    with pytest.raises(Unavailable):
        await bench.look()


@pytest.mark.parametrize("kind", [PODS, LEASES, CONFIG_MAPS], ids=str)
async def test_an_api_that_is_gone_is_not_taken_for_no_objects(bench, kind):
    bench.server.absent.add(kind)
    with pytest.raises(ApiAbsent):
        await bench.look()


async def test_a_server_without_groups_is_seen_as_such(bench):
    bench.server.absent.add(POD_GROUPS)
    seen = await bench.look()
    assert (seen.gang, seen.gang_api) == (None, False)


async def test_groups_are_not_asked_for_where_none_are_wanted(bench):
    bench.server.add(stored_run(scheduling__gang="None"))
    bench.server.absent.add(POD_GROUPS)
    seen = await bench.look()
    assert (seen.gang, seen.gang_api) == (None, True)
    assert POD_GROUPS not in bench.server.asked


async def test_the_newest_group_is_the_present_placement(bench):
    for name, at in (
        ("good-p9", "2026-12-01T00:00:00Z"),
        ("good-p10", "2026-12-01T00:00:00Z"),
        ("good-p2", "2026-11-01T00:00:00Z"),
    ):
        bench.server.add(group(name, at))
    seen = (await bench.look()).gang
    assert (seen.name, seen.min_count) == ("good-p10", 2)


async def test_a_group_that_is_being_deleted_is_left_out(bench):
    bench.server.add(group("good-p1", "2026-11-01T00:00:00Z"))
    leaving = group("good-p2", "2026-12-01T00:00:00Z")
    leaving["metadata"]["deletionTimestamp"] = "2026-12-01T00:00:05Z"
    bench.server.add(leaving)
    assert (await bench.look()).gang.name == "good-p1"


async def test_objects_of_another_run_of_the_name_are_left_out(bench):
    other = Owner("default", "good", "uid-0")
    stranger = made_pod()
    stranger["metadata"]["ownerReferences"][0]["uid"] = "uid-0"
    for thing in (stranger, lease.lease(other, 0), assignment.config_map(other, ASSIGNMENT, "{}")):
        bench.server.add(thing)
    bench.server.add(group("good-p0", "2026-12-01T00:00:00Z", metadata=other.metadata("good-p0")))
    seen = await bench.look()
    assert (seen.pods, seen.leases, seen.gang, seen.assignment) == ((), (), None, None)


async def test_a_pod_without_the_labels_of_a_member_is_left_out(bench):
    strange = made_pod()
    strange["metadata"]["labels"][names.LABEL_MEMBER] = "first"
    bench.server.add(strange)
    assert (await bench.look()).pods == ()


async def test_a_report_is_read_from_its_lease(bench):
    bench.server.add(answered(0, REPORT.to_json()))
    bench.server.add(lease.lease(OWNER, 1))
    seen = {view.member: view for view in (await bench.look()).leases}
    assert seen[0].report == REPORT
    assert seen[1].report is None
    assert seen[1].name == names.lease_name("good", 1)


async def test_a_report_that_makes_no_sense_counts_as_none(bench, caplog):
    bench.server.add(answered(0, '{"boot_id": 7'))
    assert (await bench.look()).leases[0].report is None
    await bench.look()
    assert caplog.text.count("the report in Lease good-w0 can't be read") == 1


async def test_silence_is_counted_from_when_it_was_first_seen(bench):
    bench.server.add(answered(0, REPORT.to_json()))
    assert (await bench.look()).leases[0].age == 0
    bench.time.seconds += 7
    assert (await bench.look()).leases[0].age == 7
    renewed = answered(0, REPORT.to_json()) | {"spec": {"renewTime": "2026-12-01T00:00:02.000000Z"}}
    bench.server.add(renewed)
    assert (await bench.look()).leases[0].age == 0


RELAYED = Report(boot_id="b1", pod="good-w1-0", incarnation=0, node="n2", attempt=1, state="training", relayed_by="b0")


def renewed(bench, member, report, at):
    """The agent's Lease as it has just written it."""
    manifest = answered(member, report.to_json())
    manifest["spec"] |= {"holderIdentity": report.boot_id, "renewTime": at}
    bench.server.add(manifest)


async def heard(bench):
    """Member to (seconds since it was heard, seconds since its own Lease was renewed)."""
    return {lease.member: (lease.age, lease.renewed) for lease in (await bench.look()).leases}


async def test_an_agent_is_heard_through_the_relay_that_speaks_for_it(bench):
    renewed(bench, 0, REPORT, "1")
    renewed(bench, 1, RELAYED, "1")
    assert await heard(bench) == {0: (0, 0), 1: (0, 0)}
    bench.time.seconds += 60
    renewed(bench, 0, REPORT, "2")
    assert await heard(bench) == {0: (0, 0), 1: (0, 60)}
    bench.time.seconds += 7
    assert await heard(bench) == {0: (7, 7), 1: (7, 67)}


async def test_a_suspect_was_last_heard_when_its_relay_spoke_for_it_the_last_time(bench):
    renewed(bench, 0, REPORT, "1")
    renewed(bench, 1, RELAYED, "1")
    await bench.look()
    bench.time.seconds += 60
    renewed(bench, 0, REPORT, "2")
    await bench.look()
    bench.time.seconds += 2
    renewed(bench, 0, replace(REPORT, suspects=(1,)), "3")
    assert await heard(bench) == {0: (0, 0), 1: (2, 62)}
    bench.time.seconds += 2
    renewed(bench, 0, replace(REPORT, suspects=(1,)), "4")
    assert await heard(bench) == {0: (0, 0), 1: (4, 64)}
    renewed(bench, 0, REPORT, "5")
    assert await heard(bench) == {0: (0, 0), 1: (0, 64)}


async def test_what_was_heard_through_a_relay_that_was_started_again_counts_from_its_last_renewal(bench):
    renewed(bench, 0, REPORT, "1")
    renewed(bench, 1, RELAYED, "1")
    await bench.look()
    bench.time.seconds += 60
    renewed(bench, 0, REPORT, "2")
    await bench.look()
    bench.time.seconds += 2
    renewed(bench, 0, replace(REPORT, boot_id="b0-again"), "3")
    assert await heard(bench) == {0: (0, 0), 1: (2, 62)}


async def test_after_an_outage_all_are_as_fresh_as_if_they_had_just_been_heard_and_none_is_witnessed(bench):
    renewed(bench, 0, REPORT, "1")
    renewed(bench, 1, RELAYED, "1")
    await bench.look()
    bench.time.seconds += 1
    renewed(bench, 0, REPORT, "2")
    assert [lease.witnessed for lease in (await bench.look()).leases] == [True, False]
    bench.time.seconds += 60
    bench.sightings.blind()
    assert await heard(bench) == {0: (0, 0), 1: (0, 0)}
    assert [lease.witnessed for lease in (await bench.look()).leases] == [False, False]
    bench.time.seconds += 1
    renewed(bench, 0, REPORT, "3")
    assert [lease.witnessed for lease in (await bench.look()).leases] == [True, False]


async def test_agents_are_heard_for_as_long_as_since_all_were_silent(bench):
    async def heard_for():
        return (await bench.look()).heard_for

    renewed(bench, 1, RELAYED, "1")
    for renewal in range(10):
        renewed(bench, 0, REPORT, str(renewal))
        assert await heard_for() == math.inf
        bench.time.seconds += 2
    renewed(bench, 1, replace(RELAYED, relayed_by="", suspects=(0,)), "2")
    assert await heard_for() == math.inf, "its Lease rested while the relay spoke for it: that was no silence of all"
    bench.time.seconds += 15
    assert await heard_for() == 0
    bench.time.seconds += 5
    renewed(bench, 0, REPORT, "10")
    assert await heard_for() == 0
    bench.time.seconds += 7
    renewed(bench, 1, RELAYED, "3")
    assert await heard_for() == 7


async def test_the_assignment_comes_with_its_version_and_configuration(bench):
    bench.server.add(assignment.config_map(OWNER, ASSIGNMENT, '{"a":1}'))
    seen = (await bench.look()).assignment
    assert (seen.assignment, seen.config_json) == (ASSIGNMENT, '{"a":1}')
    assert seen.resource_version == bench.server.things[CONFIG_MAPS, "good-assignment"]["metadata"]["resourceVersion"]


async def test_an_attempt_is_seen_with_the_time_for_which_it_is_in_its_phase(bench):
    bench.server.add(assignment.config_map(OWNER, ASSIGNMENT, "{}"))
    assert (await bench.look()).assignment.phase_for == 0
    bench.time.seconds += 12
    assert (await bench.look()).assignment.phase_for == 12
    drained = assignment.config_map(OWNER, replace(ASSIGNMENT, phase="drain"), "{}")
    bench.server.things[CONFIG_MAPS, "good-assignment"]["data"] = drained["data"]
    assert (await bench.look()).assignment.phase_for == 0


async def test_an_assignment_that_makes_no_sense_counts_as_none(bench):
    broken = assignment.config_map(OWNER, ASSIGNMENT, "{}")
    broken["data"][names.ASSIGNMENT_KEY] = "{"
    bench.server.add(broken)
    assert (await bench.look()).assignment is None


async def test_nodes_that_matter_are_asked_for_where_the_watch_has_not_shown_them(bench):
    bench.nodes.node_seen(node("n5"))
    for thing in (made_pod(0, 4), answered(1, REPORT.to_json()), node("n1"), node("n2", "Unknown")):
        bench.server.add(thing)
    seen = (await bench.look()).nodes
    assert {name: view.ready for name, view in seen.items()} == {"n1": True, "n2": None, "n5": True}


def grant(bench, members=2):
    for thing in rbac.access("default", "good", "uid-1", SPEC, members):
        bench.server.add(thing)


async def test_a_pod_that_is_being_deleted_is_seen_with_the_time_it_was_given_and_for_how_long(bench):
    leaving = made_pod()
    leaving["metadata"] |= {"deletionTimestamp": "2026-12-01T00:05:00Z", "deletionGracePeriodSeconds": 300}
    bench.server.add(leaving)
    (seen,) = (await bench.look()).pods
    assert (seen.deleting, seen.grace, seen.deleting_for) == (True, 300, 0)
    bench.time.seconds += 12
    (seen,) = (await bench.look()).pods
    assert seen.deleting_for == 12


async def test_a_pod_is_seen_with_the_time_for_which_it_has_a_node(bench):
    """Not that for which it waited for one."""
    waits = made_pod()
    waits["spec"].pop("nodeName", None)
    waits["status"]["conditions"] = [{"type": "PodScheduled", "status": "False"}]
    waits = bench.server.add(waits)
    (seen,) = (await bench.look()).pods
    assert (seen.scheduled, seen.scheduled_for) == (False, 0)
    bench.time.seconds += 600
    waits["spec"]["nodeName"] = "n1"
    waits["status"]["conditions"] = [{"type": "PodScheduled", "status": "True"}]
    bench.server.add(waits)
    (seen,) = (await bench.look()).pods
    assert (seen.scheduled, seen.scheduled_for, seen.age) == (True, 0, 600)
    bench.time.seconds += 12
    (seen,) = (await bench.look()).pods
    assert (seen.scheduled_for, seen.age) == (12, 612)


async def test_a_pod_that_stays_has_no_time_to_end(bench):
    bench.server.add(made_pod())
    await bench.look()
    bench.time.seconds += 12
    (seen,) = (await bench.look()).pods
    assert (seen.deleting, seen.grace, seen.deleting_for) == (False, 0, 0)


async def test_the_disruption_budget_of_the_run_is_seen_and_looked_at_anew_only_after_a_while(bench):
    assert (await bench.look()).budget is None
    bench.server.add(disruption_budget(OWNER, 3))
    assert (await bench.look()).budget is None
    bench.time.seconds += ACCESS_SEEN_FOR
    assert (await bench.look()).budget == 3


async def test_another_owners_disruption_budget_is_none(bench):
    bench.server.add(disruption_budget(Owner("default", "good", "uid-0"), 3))
    assert (await bench.look()).budget is None


async def test_access_is_there_when_all_of_it_is(bench):
    grant(bench)
    assert (await bench.look()).rbac_present


@pytest.mark.parametrize("kind", [SERVICE_ACCOUNTS, ROLES, ROLE_BINDINGS], ids=str)
async def test_access_is_missing_when_a_part_is(bench, kind):
    grant(bench)
    del bench.server.things[kind, names.service_account_name("good")]
    assert not (await bench.look()).rbac_present


async def test_access_is_missing_when_it_grants_something_else(bench):
    grant(bench, members=4)
    assert not (await bench.look()).rbac_present


async def test_access_is_missing_when_it_is_another_runs(bench):
    for thing in rbac.access("default", "good", "uid-0", SPEC, 2):
        bench.server.add(thing)
    assert not (await bench.look()).rbac_present


async def test_labels_on_access_are_peoples_business(bench):
    grant(bench)
    bench.server.things[SERVICE_ACCOUNTS, names.service_account_name("good")]["metadata"]["labels"] = {"team": "a"}
    assert (await bench.look()).rbac_present


async def test_access_is_looked_at_anew_only_after_a_while(bench):
    grant(bench)
    await bench.look()
    bench.server.asked.clear()
    assert (await bench.look()).rbac_present
    assert ROLES not in bench.server.asked
    bench.time.seconds += ACCESS_SEEN_FOR
    await bench.look()
    assert ROLES in bench.server.asked


async def test_what_was_refused_is_told_to_the_next_pass(bench):
    bench.memory.of(KEY, "uid-1").problems["create pod"] = "quota"
    assert (await bench.look()).problems == {"create pod": "quota"}


async def test_a_spec_of_another_version_is_told_by_field(bench):
    strange = stored_run()
    strange["spec"]["training"]["iterations"] = "many"
    bench.server.add(strange)
    with pytest.raises(Unreadable, match=r"spec\.training\.iterations: "):
        await bench.look()


async def test_a_run_that_is_gone_is_told(bench):
    bench.server.things.clear()
    with pytest.raises(NotFound):
        await bench.look()


@pytest.mark.parametrize(
    ("status", "seen"),
    [
        ({"ready": True, "state": {"running": {}}}, ContainerView("worker", True, 0)),
        (
            {"state": {"waiting": {"reason": "ErrImagePull", "message": "not found"}}},
            ContainerView("worker", False, 0, waiting_reason="ErrImagePull", waiting_message="not found"),
        ),
        (
            {
                "restartCount": 2,
                "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}},
            },
            ContainerView("worker", False, 2, "CrashLoopBackOff", "", "OOMKilled", 137),
        ),
        (
            {"state": {"terminated": {"reason": "Completed", "exitCode": 0}}},
            ContainerView("worker", False, 0, terminated_reason="Completed", exit_code=0),
        ),
    ],
    ids=["running", "waiting", "crashing", "ended"],
)
def test_a_container_says_how_it_is(status, seen):
    assert container_view({"name": "worker", **status}) == seen


@pytest.mark.parametrize(
    ("there", "wanted", "covered"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}, True),
        ({"a": {"b": 2}}, {"a": {"b": 1}}, False),
        ({}, {"a": {}}, False),
        ({"a": [1, 2]}, {"a": [1]}, False),
        ({"a": [1]}, {"a": [1]}, True),
    ],
)
def test_more_fields_than_wanted_are_fine_and_other_lists_are_not(there, wanted, covered):
    assert covers(there, wanted) is covered


async def test_a_node_is_seen_with_the_faults_that_its_conditions_tell_and_its_gpus(bench):
    bench.server.add(made_pod(1, 4))
    sick = node("n1") | {
        "status": {
            "allocatable": {"cpu": "8", "nvidia.com/gpu": "8", "example.com/odd": "1k"},
            "conditions": [
                {"type": "Ready", "status": "True"},
                {"type": "GpuMemWatch", "status": "True", "message": "ECC"},
                {"type": "MemoryPressure", "status": "True"},
            ],
        }
    }
    bench.server.add(sick)
    seen = (await bench.look()).nodes["n1"]
    assert (seen.ready, seen.faults, seen.extended) == (True, ("GpuMemWatch: ECC",), {"nvidia.com/gpu": 8})
    well = [c | {"status": "False"} if c["type"] == "GpuMemWatch" else c for c in sick["status"]["conditions"]]
    assert bench.nodes.node_seen(sick)
    assert bench.nodes.node_seen(sick | {"status": {"conditions": well}})
    assert (await bench.look()).nodes["n1"].faults == ()
