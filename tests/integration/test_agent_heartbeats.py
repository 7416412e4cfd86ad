"""Gangs of agents, each a process, that answer a real API server: what they write there, and whom they find silent."""

from __future__ import annotations

import asyncio
import json
import signal
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from kubernetes.aio import client, config, watch

from starcoder_trainer.contract import names
from starcoder_trainer.contract.assignment import Assignment, Layout, Member, Relay
from starcoder_trainer.contract.report import Report
from tests.support.agent_processes import AgentProcesses
from tests.support.training import training_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

PATIENCE = 300.0
RUN = "demo"
RENEWALS = 10
"""So many of the relay are watched, 2 s apart."""
NOISE = 6
"""Writes of others that a busy machine may cause meanwhile: an agent that misses two answers speaks for itself."""


class Gang:
    """The operator's part."""

    def __init__(self, api: client.ApiClient, folder: Path) -> None:
        self.namespace = f"beats-{uuid.uuid4().hex[:8]}"
        self.api, self.folder = api, folder
        self.core, self.leases = client.CoreV1Api(api), client.CoordinationV1Api(api)
        self.size = 0
        self.processes: AgentProcesses

    async def make(self, size: int) -> None:
        self.size = size
        rbac = client.RbacAuthorizationV1Api(self.api)
        await self.core.create_namespace({"metadata": {"name": self.namespace}})
        await self.core.create_namespaced_service_account(self.namespace, {"metadata": {"name": "agent"}})
        rules = [
            {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [names.assignment_name(RUN)],
             "verbs": ["get", "list", "watch"]},
            {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"],
             "resourceNames": [names.lease_name(RUN, i) for i in range(size)], "verbs": ["get", "update", "patch"]},
        ]  # fmt: skip
        await rbac.create_namespaced_role(self.namespace, {"metadata": {"name": "agent"}, "rules": rules})
        binding = {
            "metadata": {"name": "agent"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "agent"},
            "subjects": [{"kind": "ServiceAccount", "name": "agent", "namespace": self.namespace}],
        }
        await rbac.create_namespaced_role_binding(self.namespace, binding)
        for i in range(size):
            await self.leases.create_namespaced_lease(self.namespace, {"metadata": {"name": names.lease_name(RUN, i)}})
        token = await self.core.create_namespaced_service_account_token("agent", self.namespace, {"spec": {}})
        made = self.api.configuration
        self.processes = AgentProcesses(
            self.folder, host=made.host, ca=made.ssl_ca_cert, token=token.status.token, namespace=self.namespace,
            run=RUN,
        )  # fmt: skip

    async def form(self, size: int) -> None:
        """All run, the first member relays, and each other's Lease says so."""
        await self.make(size)
        self.processes.__enter__()
        for i in range(size):
            self.processes.start(i)
        await self.until(lambda said: len(said) == size)
        await self.assign(1)
        await self.until(lambda said: len(_relayed(said)) == size - 1)

    async def assign(self, attempt: int) -> None:
        said = await self.reports()
        leader = said[0]
        assert leader.listens is not None
        members = tuple(Member(i, said[i].boot_id) for i in range(self.size))
        written = Assignment(
            "uid-1", attempt, "hold", members, 1, Layout(1, 1, self.size),
            relay=Relay(0, leader.boot_id, leader.listens),
        )  # fmt: skip
        name = names.assignment_name(RUN)
        body = {
            "metadata": {"name": name},
            "data": {names.ASSIGNMENT_KEY: written.to_json(), names.CONFIG_KEY: training_config().to_json()},
        }
        if attempt == 1:
            await self.core.create_namespaced_config_map(self.namespace, body)
        else:
            await self.core.replace_namespaced_config_map(name, self.namespace, body)

    async def reports(self) -> dict[int, Report]:
        found = await self.leases.list_namespaced_lease(self.namespace)
        texts = {x.metadata.name: (x.metadata.annotations or {}).get(names.ANNOTATION_REPORT) for x in found.items}
        return {int(name.rsplit("w", 1)[1]): Report.from_json(text) for name, text in texts.items() if text}

    async def until(self, met: Callable[[dict[int, Report]], bool]) -> dict[int, Report]:
        said: dict[int, Report] = {}
        try:
            async with asyncio.timeout(PATIENCE):
                while not met(said := await self.reports()):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        except TimeoutError:
            tail = "\n".join(self.processes.log.read_text().splitlines()[-30:])
            raise AssertionError(f"not within {PATIENCE:.0f} s; the agents say {said}\n{tail}") from None
        return said

    async def writes(self, until: Callable[[Counter[int], Report], bool]) -> Counter[int]:
        """Member to how often its Lease is written from now on, until the numbers and the report just written say to
        stop."""
        counted: Counter[int] = Counter()
        start = await self.leases.list_namespaced_lease(self.namespace)
        async with asyncio.timeout(PATIENCE), watch.Watch() as stream:
            async for event in stream.stream(
                self.leases.list_namespaced_lease,
                self.namespace,
                resource_version=start.metadata.resource_version,
            ):
                meta = event["object"].metadata
                member = int(meta.name.rsplit("w", 1)[1])
                counted[member] += 1
                if until(counted, Report.from_json(meta.annotations[names.ANNOTATION_REPORT])):
                    break
        return counted


def _relayed(said: dict[int, Report]) -> list[int]:
    return [i for i, report in said.items() if report.relayed_by and report.relayed_by == said[0].boot_id]


@pytest.fixture
async def gang(kubeconfig: Path, tmp_path: Path) -> AsyncIterator[Gang]:
    async with await config.new_client_from_config(str(kubeconfig)) as api:
        found = Gang(api, tmp_path)
        yield found
        found.processes.__exit__()
        await found.core.delete_namespace(found.namespace)


@pytest.mark.parametrize("size", [8, 64])
async def test_what_a_gang_writes_into_the_api_server_does_not_grow_with_it(gang: Gang, size: int) -> None:
    await gang.form(size)
    counted = await gang.writes(lambda so_far, _: so_far[0] == RENEWALS)
    others = counted.total() - counted[0]
    print(json.dumps({"agents": size, "seconds": 2 * RENEWALS, "writes": counted.total(), "of others": others}))
    assert others <= NOISE


@pytest.mark.parametrize(("number", "beats"), [(signal.SIGKILL, 3), (signal.SIGSTOP, 13)], ids=["killed", "frozen"])
async def test_a_lost_agent_is_named_by_the_relay_after_three_beats_and_one_that_only_stands_still_later(
    gang: Gang, number: signal.Signals, beats: int
) -> None:
    await gang.form(8)
    gang.processes.signal(5, number)
    counted = await gang.writes(lambda _, report: report.suspects == (5,))
    # Two beats a renewal, the suspicion itself, and some for a busy machine.
    assert beats / 2 - 1 <= counted[0] <= beats / 2 + 4
    assert counted[5] == 0
    if number is signal.SIGSTOP:
        gang.processes.signal(5, signal.SIGCONT)
    else:
        gang.processes.start(5, incarnation=1)
        await gang.until(lambda said: said[5].incarnation == 1)
        await gang.assign(2)
    said = await gang.until(lambda said: not said[0].suspects and len(_relayed(said)) == 7)
    assert said[5].suspects == (), "who stood still itself suspects nobody"


async def test_agents_name_a_lost_relay_and_renew_their_leases_again(gang: Gang) -> None:
    await gang.form(8)
    gang.processes.signal(0, signal.SIGKILL)
    said = await gang.until(lambda said: all(said[i].suspects == (0,) for i in range(1, 8)))
    assert all(said[i].relayed_by == "" for i in range(1, 8))
    counted = await gang.writes(lambda so_far, _: so_far.total() >= 28)
    assert counted[0] == 0
    assert min(counted[i] for i in range(1, 8)) >= 2
