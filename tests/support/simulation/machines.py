"""Machines, their kubelets, and the Pods on them as containers of an agent and a fork server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from starcoder_operator.adapters.kinds import PODS, Manifest
from starcoder_trainer.contract import names

from .agents import AgentProcess
from .api_server import ENDED, GRACE
from .workers import ForkServer

if TYPE_CHECKING:
    from .world import Simulation

SYNC, START, RESTART, STOP = 0.1, 0.3, 0.5, 0.2
GONE_WITH_THE_NODE = "Unknown", 255
"""What a kubelet says of containers whose end nobody saw, once containerd is back."""


class Sandbox:
    """A Pod as its machine has it, whatever the API server knows of it."""

    def __init__(self, sim: Simulation, machine: Machine, pod: Manifest) -> None:
        meta, labels = pod["metadata"], pod["metadata"]["labels"]
        self.sim, self.machine = sim, machine
        self.uid, self.name, self.namespace = meta["uid"], meta["name"], meta["namespace"]
        self.run = labels[names.LABEL_RUN]
        self.run_uid = meta["ownerReferences"][0]["uid"]
        self.member = int(labels[names.LABEL_MEMBER])
        self.incarnation = int(labels[names.LABEL_INCARNATION])
        self.scratch: Path = sim.disk / self.uid
        self.agent: AgentProcess | None = None
        self.server: ForkServer | None = None
        self.restarts = {names.CONTAINER_AGENT: 0, names.CONTAINER_WORKER: 0}
        self.last_exit: dict[str, tuple[str, int]] = {}
        """Reason and code, as the kubelet tells them."""
        self.terminating = self.finished = self.gone = self.running = False

    def start(self) -> None:
        if self.gone or not self.machine.up or self.running:
            return
        self.running = True
        self._start_agent()
        self._start_worker()

    def _start_agent(self) -> None:
        if self.running and self.agent is None and not self.gone:
            self.agent = AgentProcess(self.sim, self, self.sim.next_boot_id())
            self.machine.changed()

    def _start_worker(self) -> None:
        if self.running and self.server is None and not self.gone and not self.terminating:
            self.server = ForkServer(self.sim, self)
            self.machine.changed()

    def agent_ended(self) -> None:
        """By itself, with code 0: a sidecar is started again unless its Pod ends."""
        self.agent = None
        if self.terminating or self.finished:
            self._ended()
        else:
            self._again(names.CONTAINER_AGENT, 0, self._start_agent)

    def worker_container_ended(self, code: int) -> None:
        self.server = None
        if self.terminating or code == 0:
            self.finished = self.finished or code == 0
            # the kubelet ends sidecars after all others
            self.sim.loop.call_later(STOP, self._terminate_agent)
        else:
            self._again(names.CONTAINER_WORKER, code, self._start_worker)

    def kill_agent(self) -> bool:
        """SIGKILL to the agent's container."""
        if self.agent is None:
            return False
        self.agent.process.kill()
        self.agent = None
        if self.server is not None:
            self.server.agent_gone()
        if self.terminating or self.finished:
            self._ended()
        else:
            self._again(names.CONTAINER_AGENT, 137, self._start_agent)
        return True

    def _again(self, container: str, code: int, start: Callable[[], None]) -> None:
        self.restarts[container] += 1
        self.last_exit[container] = ("Error", code) if code else ("Completed", 0)
        self.sim.loop.call_later(RESTART, start)
        self.machine.changed()

    def terminate(self) -> None:
        if self.terminating:
            return
        self.terminating = True
        if self.server is not None:
            self.server.terminate()
        else:
            self._terminate_agent()
        self.sim.loop.call_later(GRACE, self.vanish)

    def _terminate_agent(self) -> None:
        if self.agent is not None:
            self.agent.terminate()
        else:
            self._ended()

    def _ended(self) -> None:
        self.running = False
        if self.terminating:
            self.vanish()
        self.machine.changed()

    def vanish(self) -> None:
        """Nothing of it is left on the machine."""
        self.stop_processes()
        self.gone = True
        self.machine.sandboxes.pop(self.uid, None)
        self.machine.changed()

    def stop_processes(self) -> None:
        """At once, as by a power cut."""
        self.running = False
        if self.agent is not None:
            self.agent.process.kill()
            self.agent = None
        if self.server is not None:
            self.server.vanish()
            self.server = None

    def status(self) -> Manifest:
        phase = "Succeeded" if self.finished and not self.running else "Running"
        ready = "True" if self.running and not self.finished else "False"
        return {
            "phase": phase,
            "podIP": self.machine.address,
            "conditions": [
                {"type": "PodScheduled", "status": "True"},
                {"type": "Ready", "status": ready},
            ],
            "initContainerStatuses": [self._container(names.CONTAINER_AGENT, self.agent is not None, False)],
            "containerStatuses": [self._container(names.CONTAINER_WORKER, self.server is not None, self.finished)],
        }

    def _container(self, name: str, up: bool, finished: bool) -> Manifest:
        found: Manifest = {"name": name, "ready": up, "restartCount": self.restarts[name]}
        if up:
            found["state"] = {"running": {}}
        elif finished:
            found["state"] = {"terminated": {"reason": "Completed", "exitCode": 0}}
        else:
            found["state"] = {"waiting": {"reason": "PodInitializing"}}
        if name in self.last_exit:
            reason, code = self.last_exit[name]
            found["lastState"] = {"terminated": {"reason": reason, "exitCode": code}}
        return found


class Machine:
    """A node with its kubelet and one GPU."""

    def __init__(self, sim: Simulation, index: int) -> None:
        self.sim = sim
        self.name, self.address = f"node-{index}", f"10.0.{index}.1"
        self.up = True
        self.cut_off: set[str] = set()
        """What it can't reach: `api`, `peers`."""
        self.sandboxes: dict[str, Sandbox] = {}
        self._due = False

    @property
    def reaches_api(self) -> bool:
        return self.up and "api" not in self.cut_off

    def hears(self, other: Machine) -> bool:
        """Packets come through between processes here and there."""
        if other is self:
            return self.up
        return self.up and other.up and not (self.cut_off | other.cut_off) & {"peers"}

    def changed(self) -> None:
        """Something may have to be done or told."""
        if not self._due:
            self._due = True
            self.sim.loop.call_later(SYNC, self._sync)

    def dies(self) -> None:
        """Power is cut."""
        self.up = False
        for box in self.sandboxes.values():
            box.stop_processes()

    def returns(self) -> None:
        """It boots, and finds its Pods' files where they were."""
        self.up = True
        for box in list(self.sandboxes.values()):
            if not box.finished:
                for container in box.restarts:
                    box.restarts[container] += 1
                    box.last_exit[container] = GONE_WITH_THE_NODE
            if box.terminating:
                box.vanish()
        self.sim.control_plane.heard_of(self)
        self.changed()

    def _sync(self) -> None:
        """The kubelet's loop, as far as it reaches the API server."""
        self._due = False
        if not self.reaches_api:
            return
        if self.sim.network.api_down:
            self.changed()
            return
        api = self.sim.api
        pods = {p["metadata"]["uid"]: p for p in api.list(PODS) if p["spec"].get("nodeName") == self.name}
        for uid, box in list(self.sandboxes.items()):
            if uid not in pods or "deletionTimestamp" in pods[uid]["metadata"]:
                box.terminate()
        for uid, pod in pods.items():
            known = self.sandboxes.get(uid)
            if known is None:
                self._new(pod)
            elif not known.running and not known.finished and not known.terminating:
                self.sim.loop.call_later(START, known.start)
            elif not known.terminating:
                self._tell(pod, known)

    def _new(self, pod: Manifest) -> None:
        if "deletionTimestamp" in pod["metadata"] or pod["status"]["phase"] in ENDED:
            if "deletionTimestamp" in pod["metadata"]:
                self.sim.api.remove(PODS, pod, f"kubelet {self.name}")
        elif any(not box.finished or box.running for box in self.sandboxes.values()):
            pass  # the GPU is still taken by a Pod that ends
        else:
            box = self.sandboxes[pod["metadata"]["uid"]] = Sandbox(self.sim, self, pod)
            self.sim.loop.call_later(START, box.start)

    def _tell(self, pod: Manifest, box: Sandbox) -> None:
        status = box.status()
        kept = [c for c in pod["status"].get("conditions", ()) if c["type"] == "DisruptionTarget"]
        status["conditions"] += kept
        self.sim.api.set_status(PODS, pod, pod["status"] | status, f"kubelet {self.name}")


def node_manifest(name: str) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name},
        "spec": {},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }
