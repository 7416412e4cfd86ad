"""What else acts in a cluster: gang scheduler, node lifecycle, taint manager, garbage collector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starcoder_operator.adapters.kinds import (
    CONFIG_MAPS,
    DISRUPTION_BUDGETS,
    EVENTS,
    LEASES,
    NODES,
    POD_GROUPS,
    PODS,
    ROLE_BINDINGS,
    ROLES,
    RUNS,
    SERVICE_ACCOUNTS,
    Manifest,
)

from .api_server import ENDED, Change, group_of, owner_uids
from .machines import Machine, node_manifest

if TYPE_CHECKING:
    from .world import Simulation

OWNED = (PODS, POD_GROUPS, DISRUPTION_BUDGETS, CONFIG_MAPS, LEASES, SERVICE_ACCOUNTS, ROLES, ROLE_BINDINGS, EVENTS)
SCHEDULE, COLLECT = 0.1, 0.5
NODE_GRACE = 12.0
"""Seconds without a word of a kubelet until its node is Unknown; 50 by default."""
EVICT = 30.0
"""tolerationSeconds of the operator's Pods."""
UNREACHABLE = {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}


class ControlPlane:
    def __init__(self, sim: Simulation) -> None:
        self.sim, self.api = sim, sim.api
        self._due = False
        self._silence: dict[str, int] = {}
        """Node -> number of the silence that its timers belong to."""
        self.api.watchers.append(self._on_change)

    def _on_change(self, change: Change) -> None:
        if change.kind is PODS:
            node = change.thing["spec"].get("nodeName")
            if node in self.sim.machines:
                self.sim.machines[node].changed()
            self._release_group(change)
        if change.kind in (PODS, POD_GROUPS, NODES) and not self._due:
            self._due = True
            self.sim.loop.call_later(SCHEDULE, self._schedule)
        if change.kind is RUNS and change.type == "DELETED":
            self.sim.loop.call_later(COLLECT, self._collect)
        if change.type == "ADDED" and change.kind in OWNED:
            live = {run["metadata"]["uid"] for run in self.api.list(RUNS)}
            if owner_uids(change.thing) and not owner_uids(change.thing) & live:
                self.sim.loop.call_later(COLLECT, self._collect)

    # Scheduler

    def _schedule(self) -> None:
        """A group's Pods wait until minCount of them exist, then are placed together; later ones join alone."""
        self._due = False
        waiting = [p for p in self.api.list(PODS) if _waits(p)]
        for name in dict.fromkeys(group_of(p) for p in waiting):
            pods = [p for p in waiting if group_of(p) == name]
            needed = 0
            if name:
                group = self.api.find(POD_GROUPS, pods[0]["metadata"]["namespace"], name)
                if group is None or "deletionTimestamp" in group["metadata"]:
                    continue
                needed = group["spec"]["schedulingPolicy"]["gang"]["minCount"]
                members = [p for p in self.api.members(group) if "deletionTimestamp" not in p["metadata"]]
                if len(members) < needed:
                    continue
                needed -= sum(bool(p["spec"].get("nodeName")) for p in members)
            self._place(name, pods, needed)

    def _place(self, group: str, pods: list[Manifest], needed: int) -> None:
        free = self._free()
        chosen: dict[str, str] = {}
        for pod in pods:
            fits = next((n for n in free if n not in _avoided(pod)), None)
            if fits is not None:
                free.remove(fits)
                chosen[pod["metadata"]["name"]] = fits
        if len(chosen) < needed:
            chosen = {}
        for pod in pods:
            node = chosen.get(pod["metadata"]["name"])
            if node is None:
                message = f"0/{len(self.sim.machines)} nodes are available: insufficient nvidia.com/gpu"
                condition = {"type": "PodScheduled", "status": "False", "message": message}
                self.api.set_status(PODS, pod, pod["status"] | {"conditions": [condition]}, "scheduler")
            else:
                condition = {"type": "PodScheduled", "status": "True"}
                status = pod["status"] | {"conditions": [condition]}
                self.api.set_status(PODS, pod, status, "scheduler", nodeName=node)
        if group and chosen:
            there = self.api.find(POD_GROUPS, pods[0]["metadata"]["namespace"], group)
            if there is not None:
                done = {"type": "PodGroupInitiallyScheduled", "status": "True"}
                self.api.set_status(POD_GROUPS, there, {"conditions": [done]}, "scheduler")

    def _free(self) -> list[str]:
        taken = {p["spec"].get("nodeName") for p in self.api.list(PODS) if p["status"]["phase"] not in ENDED}
        return [
            node["metadata"]["name"]
            for node in self.api.list(NODES)
            if node["metadata"]["name"] not in taken
            and not node["spec"].get("taints")
            and not node["spec"].get("unschedulable")
        ]

    def _release_group(self, change: Change) -> None:
        """A finalizer holds a group that was deleted until its Pods have ended."""
        name = group_of(change.thing)
        group = self.api.find(POD_GROUPS, change.thing["metadata"]["namespace"], name) if name else None
        if group and "deletionTimestamp" in group["metadata"] and not any(True for _ in self.api.members(group)):
            self.api.remove(POD_GROUPS, group, "podgroup protection")

    # Nodes

    def silent(self, machine: Machine) -> None:
        """Its kubelet is not heard from now on."""
        number = self._silence[machine.name] = self._silence.get(machine.name, 0) + 1
        self.sim.loop.call_later(NODE_GRACE, self._unknown, machine, number)

    def heard_of(self, machine: Machine) -> None:
        """Its kubelet reports, and registers its node anew where it is gone."""
        if not machine.reaches_api:
            return
        self._silence[machine.name] = self._silence.get(machine.name, 0) + 1
        node = self.api.find(NODES, "", machine.name)
        if node is None:
            self.api.create(node_manifest(machine.name), f"kubelet {machine.name}", kind=NODES)
        else:
            ready = {"conditions": [{"type": "Ready", "status": "True"}]}
            self.api.set_status(NODES, node, ready, f"kubelet {machine.name}", taints=[])
        machine.changed()

    def node_is_deleted(self, machine: Machine) -> None:
        """By an autoscaler: Pod garbage collection forces its Pods out of the API."""
        node = self.api.find(NODES, "", machine.name)
        if node is not None:
            self.api.remove(NODES, node, "autoscaler")
            self.sim.loop.call_later(COLLECT, self._force_out, machine.name)

    def _force_out(self, node: str) -> None:
        if self.api.find(NODES, "", node) is None:
            for pod in self.api.list(PODS):
                if pod["spec"].get("nodeName") == node:
                    self.api.remove(PODS, pod, "pod garbage collection")

    def _unknown(self, machine: Machine, number: int) -> None:
        node = self.api.find(NODES, "", machine.name)
        if self._silence[machine.name] != number or node is None:
            return
        unknown = {"conditions": [{"type": "Ready", "status": "Unknown"}]}
        self.api.set_status(NODES, node, unknown, "node lifecycle", taints=[UNREACHABLE])
        self.sim.loop.call_later(EVICT, self._evict, machine, number)

    def _evict(self, machine: Machine, number: int) -> None:
        if self._silence[machine.name] != number:
            return
        for pod in self.api.list(PODS):
            if pod["spec"].get("nodeName") == machine.name and "deletionTimestamp" not in pod["metadata"]:
                self.disrupt(pod, "DeletionByTaintManager")

    def disrupt(self, pod: Manifest, reason: str) -> None:
        """Evicts it: the condition first, then the deletion."""
        conditions = [*pod["status"].get("conditions", ()),
                      {"type": "DisruptionTarget", "status": "True", "reason": reason}]  # fmt: skip
        self.api.set_status(PODS, pod, pod["status"] | {"conditions": conditions}, "eviction")
        self.api.delete(PODS, pod["metadata"]["namespace"], pod["metadata"]["name"], "eviction")

    # Garbage

    def _collect(self) -> None:
        live = {run["metadata"]["uid"] for run in self.api.list(RUNS)}
        for kind in OWNED:
            for thing in self.api.list(kind):
                owners = owner_uids(thing)
                if owners and not owners & live and "deletionTimestamp" not in thing["metadata"]:
                    self.api.delete(
                        kind, thing["metadata"]["namespace"], thing["metadata"]["name"], "garbage collector"
                    )


def _waits(pod: Manifest) -> bool:
    return (
        not pod["spec"].get("nodeName")
        and pod["status"]["phase"] == "Pending"
        and "deletionTimestamp" not in pod["metadata"]
    )


def _avoided(pod: Manifest) -> set[str]:
    required = ((pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    ) or {}
    return {
        value
        for term in required.get("nodeSelectorTerms", ())
        for field in term.get("matchFields", ())
        if field["operator"] == "NotIn"
        for value in field["values"]
    }
