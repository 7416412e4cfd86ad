"""The agent's two dealings with the API server: the assignment ConfigMap, watched, and its member's Lease, written.

Its ServiceAccount may read that one ConfigMap and get, update and patch the Leases of its run, by name; nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import aiohttp
from kubernetes.aio import client, watch
from kubernetes.aio.client.exceptions import ApiException

from starcoder_trainer.agent.heartbeats import is_news, is_relayed
from starcoder_trainer.contract import names
from starcoder_trainer.contract.assignment import Assignment
from starcoder_trainer.contract.codec import ContractError
from starcoder_trainer.contract.config import TrainingConfig
from starcoder_trainer.contract.report import Report

log = logging.getLogger(__name__)

WATCH_SECONDS = 60
"""A watch whose connection died without a word is begun anew after this."""
REQUEST_SECONDS = 5.0
LEASE_SECONDS = 3.0
"""For a Lease. After an outage the operator waits for one renewal that times out, the pause after it and the next one
(`Limits.heard`)."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 10.0
NOT_FOUND, CONFLICT = 404, 409

UNREACHABLE = (ApiException, aiohttp.ClientError, TimeoutError, OSError, ValueError)
"""All that a call of the client can raise when the API server does not do it, or not in a readable way."""

Assign = Callable[[Assignment, dict[str, Any]], None]


async def watch_assignment(api: client.CoreV1Api, namespace: str, run: str, assign: Assign) -> None:
    """Hands over each version of the assignment, until cancelled. Workers train on while the API server is away."""
    name, pause = names.assignment_name(run), FIRST_PAUSE_SECONDS
    chosen = f"metadata.name={name}"
    while True:
        try:
            found = await api.list_namespaced_config_map(
                namespace, field_selector=chosen, _request_timeout=REQUEST_SECONDS
            )
            for item in found.items:
                _hand_over(item.data, assign)
            pause = FIRST_PAUSE_SECONDS
            async with watch.Watch() as stream:
                async for event in stream.stream(
                    api.list_namespaced_config_map,
                    namespace,
                    field_selector=chosen,
                    resource_version=found.metadata.resource_version,
                    timeout_seconds=WATCH_SECONDS,
                    _request_timeout=WATCH_SECONDS + REQUEST_SECONDS,
                ):
                    if event["type"] in ("ADDED", "MODIFIED"):
                        _hand_over(event["object"].data, assign)
        except UNREACHABLE as e:
            log.warning("assignment %s/%s: %s; trying again", namespace, name, _short(e))
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - spreads the gang's retries
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _hand_over(data: dict[str, str] | None, assign: Assign) -> None:
    data = data or {}
    try:
        assignment = Assignment.from_json(data.get(names.ASSIGNMENT_KEY, ""))
        config = TrainingConfig.from_json(data.get(names.CONFIG_KEY, "")).to_dict()
    except ContractError as e:
        log.error("assignment ignored: %s", e)
        return
    assign(assignment, config)


@dataclass(frozen=True)
class LeaseName:
    namespace: str
    name: str


class LaterIncarnation(Exception):
    """The Lease carries the answer of a later Pod of the same member."""


class LeaseWriter:
    """Writes the member's report into its Lease: at once when more than progress changed, and every `seconds` while no
    relay speaks for this agent.

    Args:
        renewed: called when the API server has taken the Lease.
        superseded: called when a later Pod of this member has answered.
    """

    def __init__(
        self,
        api: client.CoordinationV1Api,
        lease: LeaseName,
        seconds: float,
        *,
        renewed: Callable[[], None],
        superseded: Callable[[], None],
    ) -> None:
        self._api = api
        self._lease = lease
        self._seconds = seconds
        self._renewed = renewed
        self._superseded = superseded
        self._report: Report | None = None
        self._written: Report | None = None
        self._version: str | None = None
        """resourceVersion last written or read: writing on top of anything else conflicts, so it is read first."""
        self._urgent = asyncio.Event()

    def report(self, report: Report) -> None:
        before, self._report = self._report, report
        if before is None or is_news(before, report):
            self._urgent.set()

    async def run(self) -> None:
        """Until cancelled, or until a later Pod of this member answers."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._urgent.wait(), None if self._is_quiet() else self._seconds)
            self._urgent.clear()
            if self._report is None:
                continue
            try:
                await self.write(self._report)
            except LaterIncarnation as e:
                log.warning("%s; keeping still", e)
                self._superseded()
                return
            except UNREACHABLE as e:
                self._version = self._written = None
                log.warning("lease %s: %s; trying again", self._lease.name, _short(e))
                # Waits the usual time even where a change is urgent, so that a broken API server is not pressed.
                await asyncio.sleep(self._seconds)
                self._urgent.set()

    def _is_quiet(self) -> bool:
        return self._report is not None and self._written is not None and is_relayed(self._written, self._report)

    async def write(self, report: Report) -> None:
        """Writes the report.

        Raises:
            LaterIncarnation: a later Pod's report is there; nothing was written.
        """
        if self._version is None:
            self._version = await self._read(report)
        try:
            self._version = await self._write(report, self._version)
        except ApiException as e:
            if e.status != CONFLICT:
                raise
            self._version = await self._write(report, await self._read(report))
        self._written = report
        self._renewed()

    async def _read(self, report: Report) -> str:
        lease = await self._api.read_namespaced_lease(
            self._lease.name, self._lease.namespace, _request_timeout=LEASE_SECONDS
        )
        text = (lease.metadata.annotations or {}).get(names.ANNOTATION_REPORT)
        if text:
            try:
                there = Report.from_json(text)
            except ContractError as e:
                log.warning("lease %s: its report is replaced: %s", self._lease.name, e)
            else:
                if there.incarnation > report.incarnation:
                    raise LaterIncarnation(
                        f"lease {self._lease.name}: found the report of Pod {there.pod}, later than {report.pod}"
                    )
        return str(lease.metadata.resource_version)

    async def _write(self, report: Report, version: str) -> str:
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        lease = await self._api.patch_namespaced_lease(
            self._lease.name,
            self._lease.namespace,
            {
                "metadata": {
                    "resourceVersion": version,
                    "annotations": {names.ANNOTATION_REPORT: report.to_json()},
                },
                "spec": {"holderIdentity": report.boot_id, "renewTime": now},
            },
            _content_type="application/merge-patch+json",
            _request_timeout=LEASE_SECONDS,
        )
        return str(lease.metadata.resource_version)


def _short(error: BaseException) -> str:
    if isinstance(error, ApiException):
        hint = "; is it not made yet, or was it deleted?" if error.status == NOT_FOUND else ""
        return f"HTTP {error.status} {error.reason}{hint}"
    return f"{type(error).__name__}: {error}"[:300]
