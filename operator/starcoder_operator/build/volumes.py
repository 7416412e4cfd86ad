"""What a Pod of a run mounts, and where. Each volume is a value that knows its mount in a container."""

from __future__ import annotations

from starcoder_operator.api.v1alpha1 import StarCoderRunSpec
from starcoder_operator.api.v1alpha1.workers import Scratch
from starcoder_trainer.contract import names

from .owner import Manifest, Owner

TOKEN_DIR = "/var/run/secrets/kubernetes.io/serviceaccount"  # noqa: S105 - a path, not a token
TOKEN_SECONDS = 3607
"""Life of the agent's API token, as for tokens that Kubernetes mounts by itself; kubelet renews it in time."""

API_TOKEN, RUNTIME, SCRATCH, CREDENTIALS, SHARED_MEMORY = (
    "api-token", "runtime", "scratch", "s3-credentials", "shared-memory",
)  # fmt: skip


def tmp_of(container: str) -> str:
    """Name of the volume on /tmp: one a container, so that none finds another's files there."""
    return f"tmp-{container}"


def volumes(owner: Owner, spec: StarCoderRunSpec) -> list[Manifest]:
    """All of the Pod."""
    found = [
        _api_token(),
        {"name": RUNTIME, "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        {"name": tmp_of(names.CONTAINER_AGENT), "emptyDir": {}},
        {"name": tmp_of(names.CONTAINER_WORKER), "emptyDir": {}},
        {"name": SCRATCH, **_scratch(owner, spec.workers.scratch)},
    ]
    if spec.storage.credentials_secret is not None:
        # Optional: the agent tells of a Secret that is missing, and once made it appears in the Pod that waits.
        secret = {"secretName": spec.storage.credentials_secret, "optional": True, "defaultMode": 0o440}
        found.append({"name": CREDENTIALS, "secret": secret})
    if spec.workers.shared_memory is not None:
        memory = {"medium": "Memory", "sizeLimit": spec.workers.shared_memory}
        found.append({"name": SHARED_MEMORY, "emptyDir": memory})
    return found


def mounts(spec: StarCoderRunSpec, container: str) -> list[Manifest]:
    """Of the agent or the worker container. The API token is the agent's alone, /dev/shm the worker's."""
    found: list[Manifest] = [
        {"name": RUNTIME, "mountPath": names.RUNTIME_DIR},
        {"name": SCRATCH, "mountPath": names.SCRATCH_DIR},
        {"name": tmp_of(container), "mountPath": "/tmp"},  # noqa: S108 - of the container
    ]
    if spec.storage.credentials_secret is not None:
        found.append({"name": CREDENTIALS, "mountPath": names.CREDENTIALS_DIR, "readOnly": True})
    if container == names.CONTAINER_AGENT:
        found.append({"name": API_TOKEN, "mountPath": TOKEN_DIR, "readOnly": True})
    elif spec.workers.shared_memory is not None:
        found.append({"name": SHARED_MEMORY, "mountPath": "/dev/shm"})  # noqa: S108 - of the container
    return found


def _api_token() -> Manifest:
    """What `automountServiceAccountToken` would mount into every container."""
    namespace = {"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}
    return {
        "name": API_TOKEN,
        "projected": {
            "defaultMode": 0o440,
            "sources": [
                {"serviceAccountToken": {"path": "token", "expirationSeconds": TOKEN_SECONDS}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                {"downwardAPI": {"items": [namespace]}},
            ],
        },
    }


def _scratch(owner: Owner, scratch: Scratch) -> Manifest:
    if scratch.host_path is not None:
        # Runs share the node's directory; two of one name, or one made anew, must not find each other's checkpoints.
        path = "/".join([scratch.host_path.path.rstrip("/"), owner.namespace, owner.name, owner.uid])
        return {"hostPath": {"path": path, "type": "DirectoryOrCreate"}}
    if scratch.ephemeral is not None:
        claim: Manifest = {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": scratch.ephemeral.size}},
        }
        if scratch.ephemeral.storage_class_name is not None:
            claim["storageClassName"] = scratch.ephemeral.storage_class_name
        labels = {names.LABEL_RUN: owner.name}
        return {"ephemeral": {"volumeClaimTemplate": {"metadata": {"labels": labels}, "spec": claim}}}
    return {"emptyDir": scratch.empty_dir.to_dict() if scratch.empty_dir is not None else {}}
