"""Kueue's groups of plain Pods: quota for all of a placement at once, by labels and annotations alone.

What its documentation and source (pkg/controller/jobs/pod, 2025 and 2026) say, and what follows here:
- Its webhook gates a Pod with a queue until the whole group is admitted, labels it managed and adds a finalizer. A Pod
  that came without that label is nobody's: integration `pod` is off, or the namespace is not selected.
- All Pods of a group carry the same total count. A replacement joins the group of the Pod it replaces.
- Pods of a group are of one role. By default a hash over the Pod's shape tells roles apart, affinity included, and a
  replacement that avoids a node would be of a role that the Workload does not know; so the role is named here.
- A group goes on waiting for replacements when all its Pods have ended, and holds quota and finalizers meanwhile,
  unless one of its Pods is not retriable. All are: a placement ends with its last Pod, and the next has another group.
- A Terminating Pod counts until its phase is terminal, and a replacement beside it is deleted as one too many. On a
  lost node that takes for ever; `placement` declares such a Pod Failed, as Kubernetes' own Pod GC does.
"""

from __future__ import annotations

from starcoder_operator.adapters.kinds import Manifest
from starcoder_operator.api.v1alpha1 import StarCoderRunSpec
from starcoder_trainer.contract import names

from .protocol import Group

QUEUE = "kueue.x-k8s.io/queue-name"
GROUP_NAME = "kueue.x-k8s.io/pod-group-name"
TOTAL_COUNT = "kueue.x-k8s.io/pod-group-total-count"
RETRIABLE = "kueue.x-k8s.io/retriable-in-group"
ROLE = "kueue.x-k8s.io/role-hash"
INDEX_LABEL = "kueue.x-k8s.io/pod-group-pod-index-label"
"""Names the label that holds a Pod's index in the group, below the total count; for its topology-aware scheduling."""
MANAGED = "kueue.x-k8s.io/managed"


class Kueue:
    @property
    def group(self) -> Group | None:
        return None

    def joined(self, spec: StarCoderRunSpec, name: str, *, size: int, member: int) -> Manifest:
        index = {INDEX_LABEL: names.LABEL_MEMBER} if member < size else {}
        return {
            "metadata": {
                "labels": {QUEUE: spec.scheduling.queue or "", GROUP_NAME: name},
                "annotations": {TOTAL_COUNT: str(size), RETRIABLE: "false", ROLE: names.CONTAINER_WORKER, **index},
            }
        }

    def membership(self, pod: Manifest) -> str:
        labels = pod["metadata"].get("labels") or {}
        return str(labels.get(GROUP_NAME, "")) if labels.get(MANAGED) == "true" else ""

    def size(self, pod: Manifest) -> int:
        count = str((pod["metadata"].get("annotations") or {}).get(TOTAL_COUNT, ""))
        return int(count) if count.isdecimal() else 0
