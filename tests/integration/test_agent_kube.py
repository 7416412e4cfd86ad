"""A whole agent against a real API server, with no right but those its run's Role gives."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import urllib.parse
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from kubernetes.aio import client, config

from starcoder_trainer.agent.main import Settings, serve
from starcoder_trainer.contract import names
from starcoder_trainer.contract.assignment import Assignment, Layout, Member
from starcoder_trainer.contract.config import StorageConfig
from starcoder_trainer.contract.heartbeat import Rhythm
from starcoder_trainer.contract.report import Report
from tests.support.training import training_config

pytestmark = pytest.mark.integration

SECONDS = 60
RUN = "demo"
RULES = [
    {
        "apiGroups": [""],
        "resources": ["configmaps"],
        "resourceNames": [names.assignment_name(RUN)],
        "verbs": ["get", "list", "watch"],
    },
    {
        "apiGroups": ["coordination.k8s.io"],
        "resources": ["leases"],
        "resourceNames": [names.lease_name(RUN, 0)],
        "verbs": ["get", "update", "patch"],
    },
]


class Wire:
    """TCP between agent and API server that can be cut: connections break and new ones are refused."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._open: set[asyncio.StreamWriter] = set()
        self.port = 0
        self._server: asyncio.Server | None = None

    async def connect(self) -> None:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._open):
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream = await asyncio.open_connection(*self._target)
        self._open |= {writer, upstream}

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    target.write(data)
                    await target.drain()
            target.close()

        await asyncio.gather(pump(reader, upstream), pump(upstream_reader, writer))
        self._open -= {writer, upstream}


@dataclass
class Cluster:
    """The operator's part: one member, its objects in a namespace of their own."""

    api: client.ApiClient
    namespace: str
    folder: Path
    s3: object
    bucket: str
    wire: Wire
    host: str
    agents: list[asyncio.Task[None]] = field(default_factory=list)
    stops: list[asyncio.Event] = field(default_factory=list)
    servers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.core = client.CoreV1Api(self.api)
        self.leases = client.CoordinationV1Api(self.api)
        self.config = replace(
            training_config(iterations=4, checkpoint_uri=f"s3://{self.bucket}/run"),
            storage=StorageConfig(endpoint=self.s3.endpoint, path_style=True),
        )

    def plan(self, **plan) -> None:
        (self.folder / "plan.json").write_text(json.dumps({"iterations": 4, "every": 2} | plan))

    async def make(self) -> None:
        rbac = client.RbacAuthorizationV1Api(self.api)
        await self.core.create_namespace({"metadata": {"name": self.namespace}})
        await self.core.create_namespaced_service_account(self.namespace, {"metadata": {"name": "agent"}})
        await rbac.create_namespaced_role(self.namespace, {"metadata": {"name": "agent"}, "rules": RULES})
        await rbac.create_namespaced_role_binding(
            self.namespace,
            {
                "metadata": {"name": "agent"},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "agent"},
                "subjects": [{"kind": "ServiceAccount", "name": "agent", "namespace": self.namespace}],
            },
        )
        for i in range(2):
            await self.leases.create_namespaced_lease(self.namespace, {"metadata": {"name": names.lease_name(RUN, i)}})
        (self.folder / "AWS_ACCESS_KEY_ID").write_text(self.s3.access_key)
        (self.folder / "AWS_SECRET_ACCESS_KEY").write_text(self.s3.secret_key)
        self.plan()

    async def start_agent(self, incarnation: int = 0) -> None:
        socket_path = self.folder / f"worker-{incarnation}.sock"
        self.servers.append(
            subprocess.Popen(  # noqa: ASYNC220 - returns at once
                [sys.executable, "-m", "tests.support.fork_server", socket_path, self.folder / "plan.json"],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        )
        token = await self.core.create_namespaced_service_account_token("agent", self.namespace, {"spec": {}})
        own = client.Configuration()
        own.host = f"https://{self.host}:{self.wire.port}"
        own.ssl_ca_cert = self.api.configuration.ssl_ca_cert
        own.api_key["BearerToken"] = f"Bearer {token.status.token}"
        settings = Settings(
            run=RUN,
            run_uid="uid-1",
            namespace=self.namespace,
            member=0,
            incarnation=incarnation,
            pod=names.pod_name(RUN, 0, incarnation),
            pod_ip="127.0.0.1",
            node="n1",
            rhythm=Rhythm(seconds=0.1),
            grace_seconds=30.0,
            worker_socket=socket_path,
            scratch=str(self.folder / f"scratch-{incarnation}"),
            credentials_dir=self.folder,
            metrics_port=0,
        )
        stop = asyncio.Event()

        async def run() -> None:
            async with client.ApiClient(own) as api:
                await serve(settings, api, lambda config, open_store: None, stop)

        self.stops.append(stop)
        self.agents.append(asyncio.create_task(run()))

    async def lease(self) -> tuple[Report | None, object]:
        lease = await self.leases.read_namespaced_lease(names.lease_name(RUN, 0), self.namespace)
        text = (lease.metadata.annotations or {}).get(names.ANNOTATION_REPORT)
        return (Report.from_json(text) if text else None), lease.spec

    async def until(self, true) -> Report:
        async with asyncio.timeout(SECONDS):
            while True:
                report, _ = await self.lease()
                if report and true(report):
                    return report
                for agent in self.agents:
                    if agent.done():
                        agent.result()
                await asyncio.sleep(0.05)

    async def assign(self, attempt: int, phase: str, boot_id: str, offer=None) -> None:
        assignment = Assignment("uid-1", attempt, phase, (Member(0, boot_id),), 2, Layout(1, 1, 2), offer)
        body = {
            "metadata": {"name": names.assignment_name(RUN)},
            "data": {names.ASSIGNMENT_KEY: assignment.to_json(), names.CONFIG_KEY: self.config.to_json()},
        }
        try:
            await self.core.replace_namespaced_config_map(names.assignment_name(RUN), self.namespace, body)
        except client.ApiException as e:
            if e.status != 404:
                raise
            await self.core.create_namespaced_config_map(self.namespace, body)

    async def form(self, attempt: int) -> None:
        boot_id = (await self.until(lambda r: True)).boot_id
        await self.assign(attempt, "hold", boot_id)
        report = await self.until(lambda r: r.attempt == attempt and r.offer)
        await self.assign(attempt, "run", boot_id, report.offer)


@pytest.fixture
async def cluster(kubeconfig, s3_server, bucket, tmp_path):
    async with await config.new_client_from_config(str(kubeconfig)) as api:
        target = urllib.parse.urlsplit(api.configuration.host)
        wire = Wire(target.hostname, target.port)
        await wire.connect()
        namespace = f"agent-{uuid.uuid4().hex[:8]}"
        cluster = Cluster(api, namespace, tmp_path, s3_server, bucket, wire, "127.0.0.1")
        await cluster.make()
        yield cluster
        for agent in cluster.agents:
            agent.cancel()
        await asyncio.gather(*cluster.agents, return_exceptions=True)
        for server in cluster.servers:
            server.kill()
            server.wait()
        await wire.cut()
        await cluster.core.delete_namespace(namespace)


async def test_an_agent_answers_in_its_lease_and_trains_to_the_end(cluster):
    await cluster.start_agent()
    await cluster.form(1)
    report = await cluster.until(lambda r: r.state == "done")
    assert report.verified.checkpoint.step == 4
    assert report.verified.uri == f"s3://{cluster.bucket}/run/a1/step-00000004"
    _, spec = await cluster.lease()
    assert spec.holder_identity == report.boot_id
    assert spec.renew_time is not None


async def test_the_lease_is_renewed_while_nothing_changes(cluster):
    await cluster.start_agent()
    await cluster.until(lambda r: True)
    _, first = await cluster.lease()

    async def renewed() -> bool:
        return (await cluster.lease())[1].renew_time > first.renew_time

    async with asyncio.timeout(SECONDS):
        while not await renewed():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_an_agent_whose_member_has_a_later_pod_stops_its_workers_and_keeps_still(cluster):
    cluster.plan(hang=3)
    await cluster.start_agent(incarnation=0)
    await cluster.form(1)
    await cluster.until(lambda r: r.state == "training")
    await cluster.start_agent(incarnation=1)
    later = await cluster.until(lambda r: r.incarnation == 1)
    await cluster.assign(2, "hold", later.boot_id)
    report = await cluster.until(lambda r: r.attempt == 2 and r.offer)
    assert report.incarnation == 1
    beats = {}
    async with asyncio.timeout(SECONDS):
        while len(beats) < 10:  # the earlier Pod would have beaten as often
            report, spec = await cluster.lease()
            beats[spec.renew_time] = report.incarnation
    assert set(beats.values()) == {1}


async def test_workers_train_on_while_the_api_server_is_away(cluster):
    fuse = cluster.folder / "fuse"
    cluster.plan(wait={"iteration": 3, "for": str(fuse)})
    await cluster.start_agent()
    await cluster.form(1)
    await cluster.until(lambda r: r.state == "training" and r.verified and r.verified.checkpoint.step == 2)
    await cluster.wire.cut()
    fuse.touch()
    local = cluster.folder / "scratch-0" / "checkpoints" / "a1"
    async with asyncio.timeout(SECONDS):  # the last step is saved and uploaded without the API server, then step 2 goes
        while not (cluster.folder / "saved-4").exists() or any((local / "step-00000002").glob("*")):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    report, _ = await cluster.lease()
    assert report.state == "training"
    await cluster.wire.connect()
    report = await cluster.until(lambda r: r.state == "done")
    assert report.verified.checkpoint.step == 4


async def test_a_stopped_agent_says_so_last(cluster):
    cluster.plan(hang=3)
    await cluster.start_agent()
    await cluster.form(1)
    await cluster.until(lambda r: r.state == "training")
    cluster.stops[0].set()
    await asyncio.wait_for(cluster.agents[0], SECONDS)
    report, _ = await cluster.lease()
    assert report.state == "draining"


async def test_a_mended_secret_is_taken_up_without_a_restart(cluster):
    (cluster.folder / "AWS_SECRET_ACCESS_KEY").write_text("wrong")
    await cluster.start_agent()
    boot_id = (await cluster.until(lambda r: True)).boot_id
    await cluster.assign(1, "hold", boot_id)
    report = await cluster.until(lambda r: r.problem)
    assert report.problem.reason == "StorageAccessDenied"
    (cluster.folder / "AWS_SECRET_ACCESS_KEY").write_text(cluster.s3.secret_key)
    report = await cluster.until(lambda r: r.offer)
    assert report.problem is None
