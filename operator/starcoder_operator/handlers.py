"""The edge: kopf's events in, keys of the work queue out. Nothing else knows kopf.

Only `on.event` is used: kopf writes nothing to any object then, neither finalizers nor annotations. An event says that
something changed, never what is so now: that is read by the pass it causes. Handlers only decide whether a change is
worth a pass.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import aiohttp
import kopf

from starcoder_trainer.contract.names import ANNOTATION_REPORT, LABEL_RUN

from .adapters.kinds import CONFIG_MAPS, LEASES, NODES, POD_GROUPS, PODS, RUNS, Kind, Manifest
from .adapters.nodes import NodeCache, RunKey
from .adapters.sightings import Sightings, agents_of, lease_sighting, renewed

log = logging.getLogger(__name__)

STATE_PART = ("attempt", "state", "bootId", "problem", "failure", "offer", "fencedBy", "verified", "suspects")
"""Fields of a report of which a change wants a pass at once; the rest (progress) is read at the next one."""

SERVER_TIMEOUT = 300
CLIENT_TIMEOUT = 310


class _Endless:
    """Delays between tries of kopf's requests, without an end: an outage of the API server is waited out."""

    def __iter__(self) -> Iterator[float]:
        return itertools.chain((1, 1, 2, 3, 5, 8), itertools.repeat(10.0))


def report_of(lease: Manifest) -> Any:
    """The report as parsed JSON, None where there is none; the text where it is no JSON."""
    text: str = (lease["metadata"].get("annotations") or {}).get(ANNOTATION_REPORT, "")
    try:
        return json.loads(text) if text else None
    except json.JSONDecodeError:
        return text


def state_part(report: Any) -> str:
    """What of a report wants a pass at once where it changes."""
    if not isinstance(report, dict):
        return str(report)
    return json.dumps({k: report.get(k) for k in STATE_PART}, sort_keys=True)


def intent(run: Manifest) -> str:
    """What of a run people change; not its status, which is our own."""
    meta = run["metadata"]
    return json.dumps(
        [
            meta.get("uid"),
            meta.get("generation"),
            meta.get("deletionTimestamp"),
            meta.get("labels"),
            meta.get("annotations"),
        ],
        sort_keys=True,
    )


def run_of(thing: Manifest) -> RunKey | None:
    """The run that an object of ours belongs to, by its label."""
    meta = thing["metadata"]
    name = (meta.get("labels") or {}).get(LABEL_RUN)
    return (meta.get("namespace", ""), name) if name else None


class Changes:
    """Remembers of each object what of it matters."""

    def __init__(self) -> None:
        self._last: dict[str, str] = {}

    def changed(self, thing: Manifest, matters: str) -> bool:
        uid = thing["metadata"]["uid"]
        if self._last.get(uid) == matters:
            return False
        self._last[uid] = matters
        return True

    def forget(self, thing: Manifest) -> None:
        self._last.pop(thing["metadata"]["uid"], None)


class Edge:
    """What kopf's handlers do.

    Args:
        enqueue: asks for a pass over a run.
        note: told that the watches live.
    """

    def __init__(
        self,
        *,
        enqueue: Callable[[RunKey], None],
        note: Callable[[], None],
        sightings: Sightings,
        nodes: NodeCache,
    ) -> None:
        self._enqueue = enqueue
        self._note = note
        self._sightings = sightings
        self._nodes = nodes
        self._changes = Changes()

    def on_run(self, kind: str | None, run: Manifest) -> None:
        self._note()
        if kind == "DELETED":
            self._changes.forget(run)
        elif not self._changes.changed(run, intent(run)):
            return
        self._enqueue((run["metadata"]["namespace"], run["metadata"]["name"]))

    def on_pod(self, kind: str | None, pod: Manifest) -> None:
        self._note()
        run = run_of(pod)
        if run is None:
            return
        if kind == "DELETED":
            self._nodes.pod_gone(pod["metadata"]["uid"])
        else:
            self._nodes.pod_seen(pod["metadata"]["uid"], (pod.get("spec") or {}).get("nodeName", ""), run)
        self._enqueue(run)

    def on_lease(self, kind: str | None, lease: Manifest) -> None:
        self._note()
        run = run_of(lease)
        if run is None:
            return
        self._sightings.speaks(agents_of(*run), *lease_sighting(lease))
        report = report_of(lease)
        if isinstance(report, dict):
            self._sightings.relay(str(report.get("bootId")), renewed(lease), tuple(report.get("suspects") or ()))
        if kind == "DELETED":
            self._changes.forget(lease)
        elif not self._changes.changed(lease, state_part(report)):
            return
        self._enqueue(run)

    def on_owned(self, kind: str | None, thing: Manifest) -> None:
        """Of kinds that change seldom."""
        self._note()
        run = run_of(thing)
        if run is not None:
            self._enqueue(run)

    def on_node(self, kind: str | None, node: Manifest) -> None:
        self._note()
        name = node["metadata"]["name"]
        if kind == "DELETED":
            self._nodes.node_gone(name)
        elif not self._nodes.node_seen(node):
            return
        for run in self._nodes.runs_on(name):
            self._enqueue(run)


def registry(edge: Edge, session: Callable[[], Awaitable[tuple[str, aiohttp.ClientSession]]]) -> kopf.OperatorRegistry:
    """kopf's handlers.

    Args:
        session: makes (server URL, HTTP session with fresh credentials) whenever kopf has to log in.
    """
    handlers = kopf.OperatorRegistry()

    async def login(**_: Any) -> kopf.AiohttpSession:
        server, http = await session()
        return kopf.AiohttpSession(server=server, aiohttp_session=http)

    kopf.on.login(registry=handlers, errors=kopf.ErrorsMode.TEMPORARY, backoff=5)(login)

    def on_event(kind: Kind, tell: Callable[[str | None, Manifest], None]) -> None:
        async def handler(event: Any, **_: Any) -> None:
            tell(event["type"], event["object"])

        kopf.on.event(kind.group, kind.version, kind.plural, id=kind.plural, registry=handlers)(handler)

    on_event(RUNS, edge.on_run)
    on_event(PODS, edge.on_pod)
    on_event(LEASES, edge.on_lease)
    on_event(CONFIG_MAPS, edge.on_owned)
    on_event(POD_GROUPS, edge.on_owned)
    on_event(NODES, edge.on_node)
    return handlers


def settings() -> kopf.OperatorSettings:
    """kopf does nothing but watch."""
    s = kopf.OperatorSettings()
    s.posting.enabled = False
    s.peering.standalone = True
    # CRDs and Namespaces stay unread: start-up waits for our CRD, namespaces are named exactly
    s.scanning.disabled = True
    s.watching.server_timeout = SERVER_TIMEOUT
    s.watching.client_timeout = CLIENT_TIMEOUT
    s.watching.chunk_size = 500
    for kind in (PODS, LEASES, CONFIG_MAPS, POD_GROUPS):
        s.watching.label_selectors[kind.group, kind.version, kind.plural] = LABEL_RUN
    s.queueing.worker_limit = None
    s.networking.error_backoffs = _Endless()
    # never written: nothing here makes kopf add them, and if ever, then under our name
    s.persistence.finalizer = "starcoder.dev/operator"
    s.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix="starcoder.dev")
    s.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix="starcoder.dev", key="last-handled")
    return s


def traces(
    *,
    note: Callable[[], None],
    count: Callable[[str, int], None],
    on_outage: Callable[[], None],
    on_list: Callable[[str], None],
    on_listed: Callable[[str], None],
) -> aiohttp.TraceConfig:
    """Makes kopf's requests visible.

    Args:
        note: told of connections made again, a sign of life of the watches.
        count: told verb and HTTP code of each request.
        on_outage: told of requests that failed, a blind spot.
        on_list: told the plural of a kind that is about to be listed anew. What was deleted since the watch broke
            will never be told by an event.
        on_listed: told the plural of a kind whose list has come to its end, so that the watch begins.
    """
    trace = aiohttp.TraceConfig()

    def verb(params: Any) -> str:
        return "watch" if params.url.query.get("watch") == "true" else "list"

    async def begins(_session: Any, _context: Any, params: aiohttp.TraceRequestStartParams) -> None:
        if verb(params) == "list" and "continue" not in params.url.query:
            on_list(params.url.name)
        if verb(params) == "watch":
            on_listed(params.url.name)

    async def ended(_session: Any, _context: Any, params: aiohttp.TraceRequestEndParams) -> None:
        count(verb(params), params.response.status)
        if params.response.ok:
            note()
        else:
            on_outage()

    async def failed(_session: Any, _context: Any, params: aiohttp.TraceRequestExceptionParams) -> None:
        if not isinstance(params.exception, asyncio.CancelledError):
            count(verb(params), 0)
            on_outage()

    trace.on_request_start.append(begins)
    trace.on_request_end.append(ended)
    trace.on_request_exception.append(failed)
    return trace


async def watch(handlers: kopf.OperatorRegistry, *, namespaces: tuple[str, ...], stop: asyncio.Event) -> None:
    """Watch until `stop` is set or the process is told to end by a signal; kopf takes over SIGTERM and SIGINT.

    Not `kopf.operator`: at its end that one waits 5 s for each task of the event loop that is younger than itself, then
    cancels it. Those are our passes, and the connections of whoever scrapes us.
    """
    tasks = await kopf.spawn_tasks(
        registry=handlers,
        settings=settings(),
        standalone=True,
        clusterwide=not namespaces,
        namespaces=list(namespaces),
        stop_flag=stop,
    )
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in ended:
        task.result()
