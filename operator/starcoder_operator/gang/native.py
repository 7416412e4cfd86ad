"""Kubernetes' own gangs: PodGroup, scheduling.k8s.io/v1beta1 (1.37, feature gate GenericWorkload).

`minCount` is enforced while the group is scheduled for the first time; a replacement joins the group alone.
"""

from __future__ import annotations

from starcoder_operator.adapters.kinds import POD_GROUPS, Kind, Manifest
from starcoder_operator.api.v1alpha1 import StarCoderRunSpec
from starcoder_operator.build.owner import Owner
from starcoder_operator.domain.elasticity import least, pool_size
from starcoder_operator.domain.snapshot import GangView

from .protocol import Group


class PodGroup:
    @property
    def kind(self) -> Kind:
        return POD_GROUPS

    def manifest(self, owner: Owner, spec: StarCoderRunSpec, name: str, min_count: int) -> Manifest:
        more: Manifest = {}
        if pool_size(spec) == least(spec):
            # A gang without one of its members does not train: whoever preempts one may have all.
            more["disruptionMode"] = {"all": {}}
        if spec.scheduling.priority_class_name:
            # Nothing is scheduled where it differs from the Pods'.
            more["priorityClassName"] = spec.scheduling.priority_class_name
        return {
            "apiVersion": POD_GROUPS.api_version,
            "kind": POD_GROUPS.kind,
            "metadata": owner.metadata(name),
            "spec": self.resized(min_count)["spec"] | more,
        }

    def resized(self, min_count: int) -> Manifest:
        return {"spec": {"schedulingPolicy": {"gang": {"minCount": min_count}}}}

    def view(self, there: Manifest) -> GangView:
        conditions = (there.get("status") or {}).get("conditions") or []
        scheduled: Manifest = next((c for c in conditions if c.get("type") == "PodGroupInitiallyScheduled"), {})
        policy = (there.get("spec") or {}).get("schedulingPolicy") or {}
        return GangView(
            name=there["metadata"]["name"],
            uid=there["metadata"]["uid"],
            resource_version=there["metadata"]["resourceVersion"],
            min_count=int((policy.get("gang") or {}).get("minCount") or 0),
            scheduled={"True": True, "False": False}.get(scheduled.get("status", "")),
            message=scheduled.get("message", ""),
        )


class Native:
    @property
    def group(self) -> Group | None:
        return PodGroup()

    def joined(self, spec: StarCoderRunSpec, name: str, *, size: int, member: int) -> Manifest:
        return {"spec": {"schedulingGroup": {"podGroupName": name}}}

    def membership(self, pod: Manifest) -> str:
        # A server whose gate is off drops the field without a word: what was written is no proof.
        group = (pod.get("spec") or {}).get("schedulingGroup") or {}
        return str(group.get("podGroupName") or "")

    def size(self, pod: Manifest) -> int:
        return 0
