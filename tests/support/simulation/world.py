"""One simulated cluster with one run in it, from its start until the run is over or something does not hold."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import logging
import random
import shutil
import tempfile
from collections import deque
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from starcoder_operator import leader as election
from starcoder_operator.adapters.kinds import CONFIG_MAPS, LEASES, NODES, POD_GROUPS, PODS, RUNS, Kind, Manifest
from starcoder_trainer.contract.names import LABEL_INCARNATION, LABEL_MEMBER, LABEL_RUN
from tests.support import runs

from .agents import AgentProcess, shipped_agents
from .api_server import GRACE, ApiServer, Change, owner_uids
from .checks import Checks
from .control_plane import OWNED, ControlPlane
from .faults import Schedule
from .machines import Machine, Sandbox, node_manifest
from .memo import remembering
from .network import Network
from .operators import OperatorProcess
from .store import URI, Bucket
from .virtual_time import Stalled, VirtualLoop
from .workers import Groups

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
ITERATIONS, SAVE_EVERY = 16, 4
SHRINKS: Manifest = {"minReplicas": 1, "patience": "8s", "growBack": {"interval": "5s"}}
RESTART = 1.0
"""Seconds until an operator that ended is started again."""
ENOUGH = 400.0
"""Seconds in which a run comes to its end once nothing fails any more; the longest waits are 60 s."""
PASSES, PASSES_A_SECOND = 300, 10
"""So many passes in a row are never faster than that: each is for something that has changed."""
AFTERWARDS = 110.0
"""Seconds after which nothing of a run that is over still runs: Pods may linger for 60, and one whose agent
waits for an upload takes its grace period."""

Cut = Literal["before", "after"]


@functools.lru_cache(4096)
def _rfc3339(seconds: int) -> str:
    return (EPOCH + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


class Violation(AssertionError):
    """Something that must always hold does not; tells how it came to it."""


@functools.cache
def _spec(members: int, spares: int, gang: str, shrinks: bool) -> Manifest:
    return runs.changed(
        name="a",
        workers__replicas=members,
        workers__gpusPerWorker=1,
        workers__terminationGracePeriodSeconds=int(GRACE),
        parallelism__tensor=1,
        training__globalBatchSize=4 * members,
        training__iterations=ITERATIONS,
        checkpoint__everyIterations=SAVE_EVERY,
        checkpoint__uri=URI,
        scheduling__gang=gang,
        elasticity={"spares": spares} | (SHRINKS if shrinks else {}),
    )


class Simulation:
    """
    Args:
        schedule: what befalls the run.
        limit: `failurePolicy.maxRestartsWithoutProgress`; None: as many as the schedule may be charged with.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.story: list[tuple[float, str]] = []
        self.violation: str | None = None
        self.chargeable = 0
        """Failures that are the run's own, or look exactly like it."""
        self.passes = 0
        self.recent_passes: deque[float] = deque(maxlen=PASSES)
        self.iterations = ITERATIONS
        self.wall_clock_off = 0.0
        self.assignment_lag = 0.02
        self.run_uids: set[str] = set()
        self.network = Network(random.Random(schedule.jitter), schedule.jitter > 0, told=self.tell)
        self.network.upload_seconds = schedule.upload_seconds
        self.loop = VirtualLoop(self.network.store_answers_at_once)
        self.loop.set_exception_handler(self._on_loop_error)
        self.api = ApiServer(self.loop.time, self.timestamp)
        self.bucket = Bucket()
        self.checks = Checks(self)
        self.groups = Groups(self)
        self.machines = {m.name: m for m in (Machine(self, i) for i in range(schedule.nodes))}
        self.control_plane = ControlPlane(self)
        self.operators: list[OperatorProcess] = []
        self._boots = 0
        self._replicas = 0
        self._cuts: dict[int, Cut] = {}
        self._pauses: dict[int, float] = {}
        self.calls: list[str] = []
        """All that leaders asked of the API server, in order; they are cut before or after one by its number from 1."""
        self.api.watchers.append(self._tell_agents)
        self.disk = Path()

    # What happens

    def run(self) -> Simulation:
        """All of it.

        Raises:
            Violation: with the story.
        """
        memory = Path("/dev/shm")
        self.disk = Path(tempfile.mkdtemp(prefix="simulation-", dir=memory if memory.is_dir() else None))
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            with shipped_agents(self.loop), remembering(), mock.patch.object(election, "random", self.network.rng):
                self._complete(self._main())
                self._end()
        finally:
            logging.disable(before)
            self.loop.close()
            shutil.rmtree(self.disk, ignore_errors=True)
        if self.violation is not None:
            raise Violation(self.told)
        return self

    def counts_pass(self) -> None:
        self.passes += 1
        self.recent_passes.append(self.loop.time())
        first = self.recent_passes[0]
        if len(self.recent_passes) == PASSES and self.loop.time() - first < PASSES / PASSES_A_SECOND:
            self.fails(f"{PASSES} passes in {self.loop.time() - first:.0f} s, and they go on")

    def _complete(self, main: Any) -> None:
        task = self.loop.create_task(main)
        try:
            self.loop.run_until_complete(task)
        except Stalled as e:
            self.fails(str(e))
        except RuntimeError:
            # `fails` has stopped the loop
            if self.violation is None:
                raise

    def _end(self) -> None:
        """No process is left, whatever it was at."""
        for operator in self.operators:
            operator.dies()
        for machine in self.machines.values():
            for box in list(machine.sandboxes.values()):
                box.stop_processes()
        left = asyncio.all_tasks(self.loop)
        for task in left:
            task.cancel()
        if left:
            with contextlib.suppress(RuntimeError):
                self.loop.run_until_complete(asyncio.wait(left))

    async def _main(self) -> None:
        self.begin()
        for seconds, fault in self.schedule.steps:
            await asyncio.sleep(seconds)
            self.tell(f"{fault}")
            fault.happen(self)
        await self.converges()

    def begin(self) -> None:
        """Nodes are there, operators start, the run is applied."""
        for machine in self.machines.values():
            self.api.create(node_manifest(machine.name), "cluster", kind=NODES)
        for _ in range(self.schedule.operators):
            self.start_operator()
        self.apply_run()
        self._add_strangers()

    async def converges(self) -> None:
        """All faults end: the run comes to its end, in bounded time and with a bounded number of passes."""
        self.all_is_well()
        until = self.loop.time() + ENOUGH
        if self.api.find(RUNS, "default", "a") is None:
            await asyncio.sleep(AFTERWARDS)
            left = [f"{k.kind} {t['metadata']['name']}" for k in OWNED for t in self.owned(k)]
            self.checks.require(not left, f"the run is deleted, and it has left {left}")
            return
        while self.status.get("state") != "Succeeded":
            await asyncio.sleep(1.0)
            if self.loop.time() > until:
                said = f"{self.status.get('state')}: {self.status.get('reason')}: {self.status.get('message')}"
                self.fails(f"not over {ENOUGH:.0f} s after the last fault; the run is {said}")
                return
        self.checks.budget(self.status)
        await asyncio.sleep(AFTERWARDS)
        running = [
            p["metadata"]["name"] for p in self.api.list(PODS) if p["status"]["phase"] not in ("Succeeded", "Failed")
        ]
        self.checks.require(not running, f"the run is over, and Pods still run: {running}")

    def all_is_well(self) -> None:
        self.tell("all faults end")
        self.network.calm()
        self.assignment_lag = 0.02
        for machine in self.machines.values():
            if not machine.up:
                machine.returns()
            self.reached_again(machine)
        for operator in [o for o in self.operators if o.process.alive]:
            for watch in operator.watches.values():
                watch.losing = watch.doubling = 0
                watch.lag = 0.01
                watch.breaks(0.5)
        self.user_changes({"suspend": False})

    # The operator

    def start_operator(self) -> None:
        self._replicas += 1
        self.operators.append(OperatorProcess(self, f"operator-{self._replicas}", election=self.schedule.operators > 1))

    @property
    def leader(self) -> OperatorProcess | None:
        return next((o for o in self.operators if o.process.alive and o.leads), None)

    def is_overtaken(self, name: str) -> bool:
        """Whether another operator has begun to lead after it: what it still creates was under way by then."""
        last = max((o for o in self.operators if o.led_from), key=lambda o: o.led_from, default=None)
        return last is not None and last.name != name

    def operator_dies(self, why: str) -> None:
        if (operator := self.leader) is not None:
            self.operator_ends(operator, why)

    def operator_ends(self, operator: OperatorProcess, why: str) -> None:
        """Its kubelet starts it again."""
        self.tell(f"{operator.name} ends: {why}")
        operator.dies()
        self.loop.call_later(RESTART, self.start_operator)

    def order_cut(self, calls_from_now: int, when: Cut) -> None:
        self._cuts[len(self.calls) + calls_from_now] = when

    def cut_of(self, operator: OperatorProcess, what: str) -> Cut | None:
        if not operator.leads:
            return None
        self.calls.append(what)
        return self._cuts.pop(len(self.calls), None) if self._cuts else None

    def order_pause(self, calls_from_now: int, seconds: float) -> None:
        self._pauses[len(self.calls) + calls_from_now] = seconds

    def pause_before_call(self, operator: OperatorProcess) -> float | None:
        """Seconds that it stands still before it sends the call that `cut_of` has just counted."""
        return self._pauses.pop(len(self.calls), None) if self._pauses and operator.leads else None

    def operator_is_cut(self, operator: OperatorProcess, where: str) -> None:
        if operator.process.alive:
            self.operator_ends(operator, f"killed {where}")

    # Users

    def apply_run(self) -> None:
        manifest = copy.deepcopy(
            _spec(self.schedule.members, self.schedule.spares, self.schedule.gang, self.schedule.shrinks)
        )
        most = 5 * len(self.schedule.steps) + len(self.machines)
        manifest["spec"]["failurePolicy"] = {"maxRestartsWithoutProgress": most}
        made = self.api.create(manifest, "user", kind=RUNS)
        self.run_uids.add(made["metadata"]["uid"])

    def _add_strangers(self) -> None:
        """Objects that look like the run's and are somebody else's."""
        labels = {LABEL_RUN: "a", LABEL_MEMBER: "0", LABEL_INCARNATION: "7"}
        for kind in (PODS, LEASES, POD_GROUPS):
            manifest: Manifest = {
                "apiVersion": kind.api_version,
                "kind": kind.kind,
                "metadata": {"name": "stranger", "namespace": "default", "labels": labels},
                "spec": {"schedulingPolicy": {"gang": {"minCount": 1}}} if kind is POD_GROUPS else {},
            }
            made = self.api.create(manifest, "somebody else")
            if kind is PODS:
                self.api.set_status(PODS, made, {"phase": "Failed"}, "somebody else")

    def user_changes(self, spec: Manifest) -> None:
        run = self.api.find(RUNS, "default", "a")
        if run is not None and any(run["spec"].get(k) != v for k, v in spec.items()):
            self.api.merge_patch(RUNS, "default", "a", {"spec": spec}, "user")

    def user_deletes(self, kind: Kind) -> None:
        things = self.owned(kind) if kind is not RUNS else self.api.list(RUNS)
        for thing in things:
            self.api.delete(kind, "default", thing["metadata"]["name"], "user")

    def delete_pod(self, number: int, *, evicted: bool) -> None:
        pods = self.owned(PODS)
        if not pods:
            return
        pod = pods[number % len(pods)]
        self.tell(f"Pod {pod['metadata']['name']} is {'evicted' if evicted else 'deleted'}")
        if evicted:
            self.control_plane.disrupt(pod, "EvictionByEvictionAPI")
        else:
            self.api.delete(PODS, "default", pod["metadata"]["name"], "user")

    # Network

    def reached_again(self, machine: Machine) -> None:
        machine.cut_off.clear()
        self.control_plane.heard_of(machine)
        for box in machine.sandboxes.values():
            if box.agent is not None:
                self.loop.call_later(1.0, box.agent.list_assignment)

    def api_server_down(self, seconds: float) -> None:
        self.network.api_down = True
        for operator in self.operators:
            for watch in operator.watches.values():
                watch.breaks(1.0)
        self.loop.call_later(seconds, self._api_server_is_back)

    def _api_server_is_back(self) -> None:
        self.network.api_down = False
        for machine in self.machines.values():
            self.control_plane.heard_of(machine)
            for box in machine.sandboxes.values():
                if box.agent is not None:
                    self.loop.call_later(1.0, box.agent.list_assignment)

    def store_is_back(self) -> None:
        self.network.store_down = False

    def _tell_agents(self, change: Change) -> None:
        if change.kind is not CONFIG_MAPS or change.type == "DELETED":
            return
        for agent in self._agents():
            self.loop.call_later(self.assignment_lag, self._agent_hears, agent, change.thing)

    def _agent_hears(self, agent: AgentProcess, thing: Manifest) -> None:
        if agent.machine.reaches_api and not self.network.api_down:
            agent.assignment_changed(thing)

    def _agents(self) -> list[AgentProcess]:
        return [b.agent for m in self.machines.values() for b in m.sandboxes.values() if b.agent is not None]

    def agent(self, boot_id: str) -> AgentProcess | None:
        """That runs."""
        return next((a for a in self._agents() if a.boot_id == boot_id), None)

    # What is so

    @property
    def status(self) -> Manifest:
        run = self.api.find(RUNS, "default", "a")
        return (run or {}).get("status") or {}

    @property
    def end(self) -> Manifest:
        """What a run has come to, as far as it must be the same however it came to it."""
        status = self.status
        return {
            "state": status.get("state"),
            "conditions": [(c["type"], c["status"], c["reason"]) for c in status.get("conditions", ())],
            "iteration": status.get("iteration"),
            "checkpoint": (status.get("checkpoint") or {}).get("iteration"),
            "charged": status.get("restartsWithoutProgress", 0),
            "failures": (status.get("restarts") or {}).get("total", 0),
            "objects": {kind.kind: len(self.owned(kind)) for kind in OWNED if kind is not PODS},
        }

    def owned(self, kind: Kind) -> list[Manifest]:
        """Objects of the run."""
        return [t for t in self.api.list(kind, "default", f"{LABEL_RUN}=a") if owner_uids(t) & self.run_uids]

    def run_of(self, thing: Manifest) -> Manifest | None:
        owners = owner_uids(thing)
        return next((r for r in self.api.list(RUNS) if r["metadata"]["uid"] in owners), None)

    def machine(self, number: int) -> Machine:
        return list(self.machines.values())[number % len(self.machines)]

    def sandbox(self, number: int) -> Sandbox | None:
        boxes = [b for m in self.machines.values() for b in m.sandboxes.values() if b.running]
        return boxes[number % len(boxes)] if boxes else None

    def next_boot_id(self) -> str:
        self._boots += 1
        return f"boot-{self._boots}"

    def timestamp(self, off: float = 0.0) -> str:
        return _rfc3339(int(self.loop.time() + off))

    # The story

    def tell(self, text: str) -> None:
        self.story.append((self.loop.time(), text))

    @property
    def told(self) -> str:
        lines = [f"t={at:<8.2f}{text}" for at, text in self.story]
        return "\n".join([self.violation or "all is well", "", f"{self.schedule}", *lines])

    def fails(self, sentence: str) -> None:
        if self.violation is None:
            self.violation = sentence
            self.tell(f"VIOLATION: {sentence}")
            self.loop.stop()

    def crashed(self, who: str, error: BaseException) -> None:
        self.fails(f"{who} came to an exception that nobody expected: {_flat(error)}")

    def _on_loop_error(self, loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is not None and self.violation is None:
            self.fails(f"{context.get('message')}: {_flat(error)}")


def _flat(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error))[-3000:]
