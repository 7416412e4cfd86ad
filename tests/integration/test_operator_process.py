"""The operator's own process against a real API server: it starts, leads, serves runs, and ends when told."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from starcoder_operator import handlers
from starcoder_operator.adapters import connection
from starcoder_operator.adapters.clock import SystemClock
from starcoder_operator.adapters.kinds import (
    CONFIG_MAPS,
    EVENTS,
    LEASES,
    NODES,
    POD_GROUPS,
    PODS,
    ROLE_BINDINGS,
    ROLES,
    RUNS,
    SERVICE_ACCOUNTS,
)
from starcoder_operator.adapters.nodes import NodeCache
from starcoder_operator.adapters.sightings import Sightings
from starcoder_trainer.contract import names
from starcoder_trainer.contract.assignment import Assignment, Member
from starcoder_trainer.contract.config import TrainingConfig
from tests.support.operator_space import OPERATOR, PATIENCE, Space, space, until
from tests.support.runs import changed

pytestmark = pytest.mark.integration

KINDS = (SERVICE_ACCOUNTS, ROLES, ROLE_BINDINGS, LEASES, POD_GROUPS, PODS, CONFIG_MAPS)
ELECTION = "starcoder-operator"


@pytest.fixture(scope="module")
def here(kubeconfig: Path) -> Iterator[Space]:
    with space(kubeconfig, "process") as found:
        yield found


@pytest.fixture(scope="module")
def operators_kubeconfig(here: Space, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return here.kubeconfig_of(OPERATOR, tmp_path_factory.mktemp("operator"))


@dataclass
class Process:
    """One replica, and what it says of itself."""

    running: subprocess.Popen[bytes]
    log: Path
    port: int = field(default=0, init=False)

    def logged(self, message: str) -> dict[str, object] | None:
        for line in self.log.read_text().splitlines():
            if message in line and line.startswith("{"):
                return dict(json.loads(line))
        return None

    def listen(self) -> None:
        line = until(lambda: self._alive() and self.logged("health and metrics served"), "it listens")
        assert line
        self.port = int(str(line["port"]))

    def _alive(self) -> bool:
        assert self.running.poll() is None, self.log.read_text()
        return True

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as e:
            return e.code, e.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples that have these labels."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.get("/metrics")[1])
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def writes(self) -> float:
        return sum(
            self.metric("starcoder_operator_api_calls_total", verb=v) for v in ("create", "update", "patch", "delete")
        )

    def passes(self) -> float:
        return self.metric("starcoder_operator_reconcile_seconds_count")

    def ready(self) -> bool:
        return self._alive() and self.get("/readyz")[0] == 200

    def leads(self) -> bool:
        return self._alive() and self.metric("starcoder_operator_leading") == 1

    def end(self, number: signal.Signals) -> int:
        self.running.send_signal(number)
        return self.running.wait(60)


@pytest.fixture
def start(here: Space, operators_kubeconfig: Path, tmp_path: Path) -> Iterator:
    started: list[Process] = []

    def start(*arguments: str, ready: bool = True) -> Process:
        log = tmp_path / f"operator-{len(started)}.log"
        command = [
            sys.executable,
            "-m",
            "starcoder_operator",
            f"--kubeconfig={operators_kubeconfig}",
            f"--namespaces={here.name}",
            f"--lease-namespace={here.name}",
            "--host=127.0.0.1",
            "--port=0",
            "--log-format=json",
            f"--identity=replica-{len(started)}",
            *arguments,
        ]
        with log.open("wb") as out:
            process = Process(subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ}), log)
        started.append(process)
        process.listen()
        if ready:
            until(process.ready, "it is ready")
        return process

    yield start
    for process in started:
        process.running.kill()
        process.running.wait()


ALONE = ("--leader-election=false", "--trainer-image=localhost/trainer:1")
QUICK = (
    "--lease-duration=3",
    "--lease-renew-deadline=2",
    "--lease-retry-period=1",
    "--trainer-image=localhost/trainer:1",
)


@pytest.fixture
def run(here: Space, request: pytest.FixtureRequest) -> Iterator:
    applied: list[str] = []

    def apply(**changes: object) -> str:
        name = "r" + re.sub(r"[^a-z0-9]+", "-", request.node.name)[-30:].strip("-")
        here.apply(changed(name=name, **changes))
        applied.append(name)
        return name

    yield apply
    for name in applied:
        if here.find(RUNS, name):
            here.delete(RUNS, name)


def test_it_leads_serves_probes_and_metrics_and_ends_when_told(start, here):
    process = start(*QUICK)
    until(process.leads, "it leads")
    assert process.get("/healthz") == (200, "ok\n")
    assert process.get("/readyz") == (200, "ok\n")
    assert process.metric("starcoder_operator_build_info") == 1
    assert process.metric("starcoder_operator_api_calls_total", verb="get", code="200") > 0
    assert here.get(LEASES, ELECTION)["spec"]["holderIdentity"] == "replica-0"
    assert process.end(signal.SIGTERM) == 0
    assert here.get(LEASES, ELECTION)["spec"].get("holderIdentity", "") == ""
    assert "Traceback" not in process.log.read_text()


def test_a_standby_takes_over_from_one_that_was_killed(start, run, here):
    first = start(*QUICK)
    until(first.leads, "the first leads")
    second = start(*QUICK)
    assert not second.leads()
    first.end(signal.SIGKILL)
    name = run()
    until(second.leads, "the second leads")
    until(lambda: len(here.owned(PODS, name)) == 2, "the second serves the run")
    assert here.get(LEASES, ELECTION)["spec"]["holderIdentity"] == "replica-1"


def test_one_that_cannot_renew_ends_instead_of_acting_on(start, here):
    process = start(*QUICK)
    until(process.leads, "it leads")

    def taken() -> bool:
        here.patch(LEASES, ELECTION, {"spec": {"holderIdentity": "somebody-else", "leaseDurationSeconds": 600}})
        return process.running.poll() is not None

    until(taken, "it ends")
    assert process.running.returncode == 1
    assert process.logged("leadership lost")
    here.delete(LEASES, ELECTION)


async def test_what_others_do_in_the_event_loop_outlives_the_watches(operators_kubeconfig, here):
    """kopf's own runner takes every younger task for its own."""
    configuration = await connection.load(str(operators_kubeconfig))
    watched, stop, done = asyncio.Event(), asyncio.Event(), asyncio.Event()
    told: list[str] = []

    def on_listed(plural: str) -> None:
        assert plural in told, "the watch begins after the list"
        if plural == NODES.plural:
            watched.set()

    trace = handlers.traces(
        note=lambda: None, count=lambda *_: None, on_outage=lambda: None, on_list=told.append, on_listed=on_listed
    )

    async def session() -> tuple[str, aiohttp.ClientSession]:
        return configuration.host, await connection.watch_session(configuration, [trace])

    clock = SystemClock()
    edge = handlers.Edge(enqueue=lambda _: None, note=lambda: None, sightings=Sightings(clock), nodes=NodeCache())
    watches = asyncio.create_task(handlers.watch(handlers.registry(edge, session), namespaces=(here.name,), stop=stop))
    await asyncio.wait_for(watched.wait(), PATIENCE)
    younger = asyncio.create_task(done.wait())
    stop.set()
    await asyncio.wait_for(watches, PATIENCE)
    assert not younger.done()
    done.set()
    assert await younger


def test_a_run_gets_all_it_needs(start, run, here):
    start(*ALONE)
    name = run()
    until(lambda: here.find(CONFIG_MAPS, names.assignment_name(name)), "the assignment is written")
    made = {kind.kind: [o["metadata"]["name"] for o in here.owned(kind, name)] for kind in KINDS}
    assert made == {
        "ServiceAccount": [f"{name}-agent"],
        "Role": [f"{name}-agent"],
        "RoleBinding": [f"{name}-agent"],
        "Lease": [f"{name}-w0", f"{name}-w1"],
        "PodGroup": [f"{name}-p1"],
        "Pod": [f"{name}-w0-0", f"{name}-w1-0"],
        "ConfigMap": [f"{name}-assignment"],
    }
    data = here.get(CONFIG_MAPS, names.assignment_name(name))["data"]
    assignment = Assignment.from_json(data[names.ASSIGNMENT_KEY])
    uid = here.get(RUNS, name)["metadata"]["uid"]
    assert (assignment.run_uid, assignment.attempt, assignment.phase) == (uid, 1, "hold")
    assert assignment.members == (Member(0), Member(1))
    assert TrainingConfig.from_json(data[names.CONFIG_KEY]).run.uid == uid
    status = until(lambda: here.status(name), "a status is written")
    assert (status["state"], status["attempt"], status["incarnations"]) == ("Pending", 1, [0, 0])
    assert {p["spec"]["schedulingGroup"]["podGroupName"] for p in here.owned(PODS, name)} == {f"{name}-p1"}


def test_whatever_is_made_goes_with_its_run(start, run, here):
    start(*ALONE)
    name = run()
    until(lambda: here.find(CONFIG_MAPS, names.assignment_name(name)), "the assignment is written")
    uid = here.get(RUNS, name)["metadata"]["uid"]
    for kind in KINDS:
        for thing in here.owned(kind, name):
            assert [o["uid"] for o in thing["metadata"]["ownerReferences"]] == [uid]
    assert not here.get(RUNS, name)["metadata"].get("finalizers")
    here.delete(RUNS, name)
    assert here.find(RUNS, name) is None


def test_where_nothing_changes_nothing_is_written(start, run, here):
    process = start(*ALONE)
    name = run()
    until(lambda: here.find(CONFIG_MAPS, names.assignment_name(name)), "the assignment is written")

    def look_again() -> bool:
        """A pass that somebody caused; whether it wrote nothing."""
        passes, writes = process.passes(), process.writes()
        here.patch(RUNS, name, {"metadata": {"annotations": {"touched": str(passes)}}})
        until(lambda: process.passes() > passes, "there was a pass")
        return process.writes() == writes

    until(look_again, "the operator comes to rest")
    before = {k.kind: [o["metadata"]["resourceVersion"] for o in here.owned(k, name)] for k in KINDS}
    for _ in range(3):
        assert look_again()
    assert {k.kind: [o["metadata"]["resourceVersion"] for o in here.owned(k, name)] for k in KINDS} == before


def test_a_restarted_operator_repeats_nothing(start, run, here):
    first = start(*ALONE)
    name = run()
    until(lambda: here.find(CONFIG_MAPS, names.assignment_name(name)), "the assignment is written")
    assert first.end(signal.SIGTERM) == 0
    before = {k.kind: [o["metadata"]["resourceVersion"] for o in here.owned(k, name)] for k in KINDS}
    second = start(*ALONE)
    until(lambda: second.passes() >= 1 and second.metric("starcoder_operator_queue_depth") == 0, "it has looked")
    assert {k.kind: [o["metadata"]["resourceVersion"] for o in here.owned(k, name)] for k in KINDS} == before
    assert second.metric("starcoder_operator_runs", state="Pending") >= 1


def test_a_pod_that_was_deleted_is_replaced_under_a_new_name(start, run, here):
    start(*ALONE)
    name = run()
    until(lambda: len(here.owned(PODS, name)) == 2, "the Pods are made")
    here.delete(PODS, f"{name}-w1-0")
    until(lambda: here.find(PODS, f"{name}-w1-1"), "the replacement is made")
    assert [p["metadata"]["name"] for p in here.owned(PODS, name)] == [f"{name}-w0-0", f"{name}-w1-1"]


@pytest.mark.parametrize(
    ("changes", "reason", "part"),
    [
        ({"workers__podPatch": {"spec": {"nonsense": 1}}}, "PodInvalid", "nonsense"),
        ({"workers__podPatch": {"metadata": {"name": "x"}}}, "InvalidSpec", "spec.workers.podPatch.metadata: name"),
    ],
    ids=["unknown-field", "identity"],
)
def test_a_spec_that_makes_no_pod_is_not_accepted_and_mended_in_place(start, run, here, changes, reason, part):
    start(*ALONE)
    name = run(**changes)
    told = until(
        lambda: here.condition(name, "Accepted").get("status") == "False" and here.condition(name, "Accepted"),
        "it is told",
    )
    assert told["reason"] == reason
    assert part in told["message"]
    assert not any(here.owned(kind, name) for kind in KINDS)
    events = here.request("GET", EVENTS.path(here.name))["items"]
    assert reason in [e["reason"] for e in events if e["regarding"]["name"] == name]
    here.patch(RUNS, name, {"spec": {"workers": {"podPatch": None}}})
    until(lambda: here.condition(name, "Accepted").get("status") == "True", "it is accepted")
    until(lambda: len(here.owned(PODS, name)) == 2, "the Pods are made")


def test_without_an_image_it_says_what_to_do(start, run, here):
    start("--leader-election=false")
    name = run()
    until(lambda: here.condition(name, "Accepted").get("status") == "False", "it is not accepted")
    assert "spec.workers.image: not set" in here.condition(name, "Accepted")["message"]
    assert not any(here.owned(kind, name) for kind in KINDS)


def test_without_its_rights_it_is_not_ready_and_says_which_are_missing(start, here, tmp_path):
    process = start(f"--kubeconfig={here.kubeconfig_of('default', tmp_path)}", ready=False)
    code, said = until(lambda: process.get("/readyz")[1] != "starting\n" and process.get("/readyz"), "it has asked")
    assert code == 503
    assert f"no right to create pods in namespace {here.name}" in said
    assert process.get("/healthz")[0] == 200
    assert process.end(signal.SIGTERM) == 0


def test_help_is_shown_and_nonsense_refused():
    command = [sys.executable, "-m", "starcoder_operator"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "--trainer-image" in shown.stdout
    refused = subprocess.run([*command, "--port=x"], capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "port" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_without_a_way_to_the_api_server_it_says_how_to_name_one(tmp_path):
    command = [sys.executable, "-m", "starcoder_operator", f"--kubeconfig={tmp_path / 'none'}"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "no way to the API server" in refused.stderr
    assert "Traceback" not in refused.stderr
