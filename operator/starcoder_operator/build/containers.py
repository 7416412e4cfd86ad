"""The containers of a Pod: the agent, a native sidecar that alone holds the API token, and the worker with the GPUs.

None has a probe. The agent renews a Lease, which says more than a port that answers, and the operator replaces the Pods
of silent agents; the worker's fork server is watched by the agent over its socket. A container that runs is ready.
"""

from __future__ import annotations

from dataclasses import dataclass

from starcoder_operator.api.v1alpha1 import StarCoderRunSpec
from starcoder_trainer.contract import names
from starcoder_trainer.contract.heartbeat import Rhythm

from .owner import Manifest, Owner
from .volumes import SCRATCH, mounts

USER = 10001
"""uid and gid of agent and workers, those of the trainer image. The fork server's socket is open to the group, which is
the Pod's fsGroup as well."""

UNPRIVILEGED: Manifest = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}
"""With `POD_SECURITY`, what Pod Security Standard *restricted* asks for."""
POD_SECURITY: Manifest = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    # scratch may hold hundreds of GB; changing the group of each file at every start would take minutes
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}

AGENT_RESOURCES: Manifest = {
    "requests": {"cpu": "100m", "memory": "256Mi"},
    # of its own, so that it outlives workers that run out of theirs; 8 parts of 16 MiB are under way a file
    "limits": {"memory": "2Gi"},
}


@dataclass(frozen=True)
class Image:
    name: str
    pull_policy: str = ""
    """Empty: Kubernetes' default, by the image's tag."""

    def to_dict(self) -> Manifest:
        return {"image": self.name} | ({"imagePullPolicy": self.pull_policy} if self.pull_policy else {})


def agent(
    owner: Owner, spec: StarCoderRunSpec, image: Image, *, member: int, incarnation: int, rhythm: Rhythm
) -> Manifest:
    """For `initContainers`: there with restartPolicy Always it starts before the worker and ends after it."""
    return {
        "name": names.CONTAINER_AGENT,
        **image.to_dict(),
        "command": ["starcoder-trainer", "agent"],
        "restartPolicy": "Always",
        "env": [
            *_identity(owner, member, incarnation),
            {"name": names.ENV_HEARTBEAT_SECONDS, "value": f"{rhythm.seconds:g}"},
            {"name": names.ENV_HEARTBEATS_MISSED, "value": str(rhythm.missed)},
            # An image made for GPUs asks the container runtime for all of the node's; the agent wants none.
            {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"},
        ],
        "ports": [{"name": "metrics", "containerPort": names.METRICS_PORT, "protocol": "TCP"}],
        "resources": AGENT_RESOURCES,
        "securityContext": UNPRIVILEGED,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts(spec, names.CONTAINER_AGENT),
    }


def worker(owner: Owner, spec: StarCoderRunSpec, image: Image, *, member: int, incarnation: int) -> Manifest:
    """The fork server, one worker a GPU under it."""
    workers = spec.workers
    users = {variable.name for variable in workers.env}
    env = [v for v in _identity(owner, member, incarnation) if v["name"] not in users]
    container: Manifest = {
        "name": names.CONTAINER_WORKER,
        **image.to_dict(),
        "command": ["starcoder-trainer", "worker"],
        "env": [*env, *(variable.to_dict() for variable in workers.env)],
        "resources": _worker_resources(spec),
        "securityContext": UNPRIVILEGED,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts(spec, names.CONTAINER_WORKER),
    }
    if workers.env_from:
        container["envFrom"] = [source.to_dict() for source in workers.env_from]
    return container


def scratch_owner(image: Image) -> Manifest:
    """Gives a directory of the node that kubelet made as root to the user of agent and workers; needs a namespace that
    admits hostPath and so root as well."""
    return {
        "name": "scratch",
        **image.to_dict(),
        "command": ["chown", f"{USER}:{USER}", names.SCRATCH_DIR],
        "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"memory": "64Mi"}},
        "securityContext": {
            "runAsUser": 0,
            "runAsNonRoot": False,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"], "add": ["CHOWN"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [{"name": SCRATCH, "mountPath": names.SCRATCH_DIR}],
    }


def _worker_resources(spec: StarCoderRunSpec) -> Manifest:
    gpus = {spec.workers.gpu_resource: str(spec.workers.gpus_per_worker)}
    wanted = spec.workers.resources
    return {"requests": {**wanted.requests, **gpus}, "limits": {**wanted.limits, **gpus}}


def _identity(owner: Owner, member: int, incarnation: int) -> list[Manifest]:
    """Who a Pod is, for the processes in it."""
    said = {
        names.ENV_RUN: owner.name,
        names.ENV_RUN_UID: owner.uid,
        names.ENV_MEMBER: str(member),
        names.ENV_INCARNATION: str(incarnation),
        "HOME": "/tmp",  # noqa: S108 - of the container; the root file system is read-only
    }
    fields = {
        names.ENV_NAMESPACE: "metadata.namespace",
        names.ENV_POD: "metadata.name",
        names.ENV_POD_IP: "status.podIP",
        names.ENV_NODE: "spec.nodeName",
    }
    return [
        *({"name": name, "value": value} for name, value in said.items()),
        *({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()),
    ]
