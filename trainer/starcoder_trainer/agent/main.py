"""`starcoder-trainer agent`: the native sidecar of a Pod, and the only holder of its API token."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kubernetes.aio import client
from kubernetes.aio import config as kubernetes_config

from starcoder_trainer.agent import connection
from starcoder_trainer.agent.heartbeat_tcp import HeartbeatService
from starcoder_trainer.agent.heartbeats import Heartbeats, Standing
from starcoder_trainer.agent.kube import LeaseName, LeaseWriter, watch_assignment
from starcoder_trainer.agent.logs import log_json
from starcoder_trainer.agent.messages import GRACE_SECONDS, Identity
from starcoder_trainer.agent.metrics import Metrics
from starcoder_trainer.agent.preflight import CheckData
from starcoder_trainer.agent.supervisor import Supervisor, Surroundings
from starcoder_trainer.contract import names
from starcoder_trainer.contract.assignment import Assignment
from starcoder_trainer.contract.config import StorageConfig
from starcoder_trainer.contract.heartbeat import Rhythm
from starcoder_trainer.contract.report import Report
from starcoder_trainer.storage.open import open_store
from starcoder_trainer.storage.store import ObjectStore

log = logging.getLogger(__name__)

GOODBYE_SECONDS = 2.0


class BadEnvironment(Exception):
    """A variable that the operator sets in every Pod is missing or no number."""


@dataclass(frozen=True)
class Settings:
    run: str
    run_uid: str
    namespace: str
    member: int
    incarnation: int
    pod: str
    pod_ip: str
    node: str
    grace_seconds: float
    rhythm: Rhythm
    worker_socket: Path = Path(names.WORKER_SOCKET)
    scratch: str = names.SCRATCH_DIR
    credentials_dir: Path = Path(names.CREDENTIALS_DIR)
    metrics_port: int = names.METRICS_PORT

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> Settings:
        def said(name: str) -> str:
            if not env.get(name):
                raise BadEnvironment(f"{name}: missing or empty, expected the operator to set it in the Pod")
            return env[name]

        def number[N: (int, float)](name: str, kind: type[N], text: str) -> N:
            try:
                return kind(text)
            except ValueError as e:
                raise BadEnvironment(f"{name}: found {text!r}, expected a number") from e

        return cls(
            run=said(names.ENV_RUN),
            run_uid=said(names.ENV_RUN_UID),
            namespace=said(names.ENV_NAMESPACE),
            member=number(names.ENV_MEMBER, int, said(names.ENV_MEMBER)),
            incarnation=number(names.ENV_INCARNATION, int, said(names.ENV_INCARNATION)),
            pod=said(names.ENV_POD),
            pod_ip=said(names.ENV_POD_IP),
            node=said(names.ENV_NODE),
            grace_seconds=number(
                names.ENV_GRACE_SECONDS, float, env.get(names.ENV_GRACE_SECONDS) or str(GRACE_SECONDS)
            ),
            rhythm=Rhythm(
                number(names.ENV_HEARTBEAT_SECONDS, float, env.get(names.ENV_HEARTBEAT_SECONDS) or str(Rhythm.seconds)),
                number(names.ENV_HEARTBEATS_MISSED, int, env.get(names.ENV_HEARTBEATS_MISSED) or str(Rhythm.missed)),
            ),
        )


def build_version() -> str:
    try:
        return version("starcoder-operator")
    except PackageNotFoundError:
        return "unknown"


async def serve(settings: Settings, api_client: client.ApiClient, check_data: CheckData, stop: asyncio.Event) -> None:
    """Until `stop` is set, and the workers have left and their checkpoint is safe or the grace period over."""
    me = Identity(
        run_uid=settings.run_uid,
        boot_id=uuid.uuid4().hex[:16],
        pod=settings.pod,
        incarnation=settings.incarnation,
        node=settings.node,
        address=settings.pod_ip,
        scratch=settings.scratch,
        grace_seconds=settings.grace_seconds,
        stamps=str(settings.worker_socket.parent / "stamps"),
    )
    context: dict[str, object] = {"run": settings.run, "member": settings.member, "attempt": 0, "iteration": 0}
    log_json(context)
    metrics = Metrics(settings.run, build_version())
    lease = LeaseName(settings.namespace, names.lease_name(settings.run, settings.member))
    said, rhythm = Standing(), settings.rhythm

    def publish(_: object = None) -> None:
        report = supervisor.report
        context.update(attempt=report.attempt, iteration=report.progress.iteration if report.progress else 0)
        writer.report(said.told(report, listens))

    def stand(standing: Standing) -> None:
        nonlocal said
        said = standing
        publish()

    def assign(assignment: Assignment, config: dict[str, Any]) -> None:
        if assignment.run_uid == settings.run_uid:
            heartbeats.assigned(assignment)
        supervisor.assign(assignment, config)

    def supersede() -> None:
        heartbeats.cease()
        supervisor.supersede()

    def open_here(uri: str, storage: StorageConfig) -> ObjectStore:
        return open_store(uri, storage, settings.credentials_dir)

    hearing = Heartbeats(
        member=settings.member, incarnation=me.incarnation, boot_id=me.boot_id, rhythm=rhythm, now=time.monotonic()
    )
    heartbeats = HeartbeatService(hearing, address=me.address, rhythm=rhythm, changed=stand, metrics=metrics)
    listens = await heartbeats.listen()
    supervisor = Supervisor(
        me,
        Surroundings(
            open_store=open_here,
            check_data=check_data,
            worker_socket=settings.worker_socket,
            member=settings.member,
            report=publish,
            metrics=metrics,
        ),
    )
    writer = LeaseWriter(
        client.CoordinationV1Api(api_client), lease, rhythm.renewal, renewed=heartbeats.renewed, superseded=supersede
    )
    stop_metrics = metrics.serve(settings.metrics_port)
    log.info("agent of Pod %s on node %s, boot id %s", settings.pod, settings.node, me.boot_id)
    try:
        # Any of them failing ends the process: the kubelet starts a new agent rather than leave half of one.
        async with asyncio.TaskGroup() as tasks:
            supervising = tasks.create_task(supervisor.run())
            await asyncio.sleep(0)  # its loop takes events from here on
            core = client.CoreV1Api(api_client)
            others = [
                tasks.create_task(watch_assignment(core, settings.namespace, settings.run, assign)),
                tasks.create_task(writer.run()),
                tasks.create_task(heartbeats.run()),
                tasks.create_task(_terminate_at(stop, supervisor)),
            ]
            await asyncio.wait({supervising})
            for task in others:
                task.cancel()
        if not supervisor.silent:
            await _say_goodbye(writer, Standing().told(supervisor.report, listens))
    finally:
        stop_metrics()


async def _terminate_at(stop: asyncio.Event, supervisor: Supervisor) -> None:
    await stop.wait()
    supervisor.terminate()


async def _say_goodbye(writer: LeaseWriter, report: Report) -> None:
    """The last state, so that the operator need not wait for silence."""
    try:
        await asyncio.wait_for(writer.write(report), GOODBYE_SECONDS)
    except Exception as e:
        log.warning("last report not delivered: %s", e)


async def _in_cluster() -> None:
    from starcoder_trainer.data import preflight as data

    settings = Settings.from_environment(os.environ)
    kubernetes_config.load_incluster_config()
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with connection.api_client() as api:
        await serve(settings, api, data.check, stop)


def main() -> int:
    try:
        asyncio.run(_in_cluster())
    except (BadEnvironment, kubernetes_config.ConfigException) as e:
        print(f"starcoder-trainer agent: {e}", file=sys.stderr)
        return 1
    sys.stderr.flush()
    # A thread may be in the middle of an upload that nobody waits for; ordinary exit would join it.
    os._exit(0)
