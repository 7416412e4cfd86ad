"""A namespace of a real API server in which an operator acts with the rights it ships with, and no others.

There is no controller manager, scheduler or kubelet: Pods stay Pending and nothing is collected: what is there is
what the operator made.
"""

from __future__ import annotations

import copy
import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client, config

from starcoder_operator.adapters.kinds import PERMISSIONS, RUNS, Kind, Permission
from starcoder_operator.api import crdgen
from starcoder_trainer.contract import names

OPERATOR = "operator"
CRD = yaml.safe_load((crdgen.REPOSITORY / crdgen.CRD_PATH).read_text())
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
PATIENCE = 90.0
"""Seconds; a condition that is not met by then never will be."""

Document = dict[str, Any]


def until[T](found: Callable[[], T], what: str, seconds: float = PATIENCE) -> T:
    """The first truthy answer."""
    end = time.monotonic() + seconds
    while not (answer := found()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.05)
    return answer


def rule_of(permission: Permission) -> Document:
    kind = permission.kind
    resource = f"{kind.plural}/{permission.subresource}" if permission.subresource else kind.plural
    return {"apiGroups": [kind.group], "resources": [resource], "verbs": list(permission.verbs)}


def kubeconfig_with(admins: Path, account: str, token: str, folder: Path) -> Path:
    """The server of the admin's kubeconfig, and that token alone."""
    document = yaml.safe_load(admins.read_text())
    document["users"] = [{"name": account, "user": {"token": token}}]
    cluster = document["contexts"][0]["context"]["cluster"]
    document["contexts"] = [{"name": "it", "context": {"cluster": cluster, "user": account}}]
    document["current-context"] = "it"
    path = folder / f"{account}.conf"
    path.touch(mode=0o600)
    path.write_text(json.dumps(document))
    return path


class Space:
    """What a test sees and changes of the namespace, as the cluster's admin."""

    def __init__(self, api: client.ApiClient, kubeconfig: Path, name: str) -> None:
        self.api = api
        self.name = name
        self._admin = kubeconfig
        self.core = client.CoreV1Api(api)

    def create(self, *, pod_security: str) -> None:
        labels = {"pod-security.kubernetes.io/enforce": pod_security}
        self.core.create_namespace({"metadata": {"name": self.name, "labels": labels}})
        self.core.create_namespaced_service_account(self.name, {"metadata": {"name": "default"}})
        self.core.create_namespaced_service_account(self.name, {"metadata": {"name": OPERATOR}})
        rbac = client.RbacAuthorizationV1Api(self.api)
        subjects = [{"kind": "ServiceAccount", "name": OPERATOR, "namespace": self.name}]
        meta, group = {"name": f"{self.name}-operator"}, "rbac.authorization.k8s.io"
        rbac.create_namespaced_role(
            self.name, {"metadata": meta, "rules": [rule_of(p) for p in PERMISSIONS if p.kind.namespaced]}
        )
        rbac.create_namespaced_role_binding(
            self.name,
            {
                "metadata": meta,
                "roleRef": {"apiGroup": group, "kind": "Role", "name": meta["name"]},
                "subjects": subjects,
            },
        )
        rbac.create_cluster_role(
            {"metadata": meta, "rules": [rule_of(p) for p in PERMISSIONS if not p.kind.namespaced]}
        )
        rbac.create_cluster_role_binding(
            {
                "metadata": meta,
                "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": meta["name"]},
                "subjects": subjects,
            }
        )

    def remove(self) -> None:
        rbac = client.RbacAuthorizationV1Api(self.api)
        rbac.delete_cluster_role_binding(f"{self.name}-operator")
        rbac.delete_cluster_role(f"{self.name}-operator")
        self.core.delete_namespace(self.name)

    def kubeconfig_of(self, account: str, folder: Path) -> Path:
        """A kubeconfig with that ServiceAccount's token alone."""
        token = self.core.create_namespaced_service_account_token(account, self.name, {"spec": {}}).status.token
        return kubeconfig_with(self._admin, account, token, folder)

    def request(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> Document:
        headers = {"Accept": "application/json", "Content-Type": content_type}
        self.api.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        answer = self.api.call_api(method, f"{self.api.configuration.host}{path}", header_params=headers, body=body)
        answer.read()
        found: Document = json.loads(answer.data)
        if answer.status >= 300:
            raise client.ApiException(http_resp=answer)
        return found

    def get(self, kind: Kind, name: str) -> Document:
        """Raises ApiException."""
        return self.request("GET", kind.path(self.name, name))

    def find(self, kind: Kind, name: str) -> Document | None:
        try:
            return self.get(kind, name)
        except client.ApiException as e:
            if e.status == 404:
                return None
            raise

    def owned(self, kind: Kind, run: str) -> list[Document]:
        """Objects under the run's label, by name."""
        items = self.request("GET", kind.path(self.name))["items"]
        found = [i for i in items if (i["metadata"].get("labels") or {}).get(names.LABEL_RUN) == run]
        return sorted(found, key=lambda i: i["metadata"]["name"])

    def create_object(self, kind: Kind, manifest: Document) -> Document:
        return self.request("POST", kind.path(self.name), manifest)

    def patch(self, kind: Kind, name: str, patch: Document, subresource: str = "") -> Document:
        return self.request("PATCH", kind.path(self.name, name, subresource), patch, MERGE)

    def delete(self, kind: Kind, name: str) -> None:
        self.request("DELETE", kind.path(self.name, name), {"gracePeriodSeconds": 0})

    def apply(self, document: Document) -> Document:
        """A StarCoderRun, created here."""
        document = copy.deepcopy(document)
        document["metadata"]["namespace"] = self.name
        return self.create_object(RUNS, document)

    def status(self, run: str) -> Document:
        return dict(self.get(RUNS, run).get("status") or {})

    def condition(self, run: str, kind: str) -> Document:
        return next((c for c in self.status(run).get("conditions", ()) if c["type"] == kind), {})


def install_crd(api: client.ApiClient) -> None:
    """Applies the definition and waits until runs are served."""
    name = CRD["metadata"]["name"]
    extensions = client.ApiextensionsV1Api(api)
    extensions.patch_custom_resource_definition(
        name, CRD, field_manager="test", force=True, field_validation="Strict", _content_type=APPLY
    )

    def established() -> bool:
        conditions = extensions.read_custom_resource_definition(name).status.conditions or []
        return any(c.type == "Established" and c.status == "True" for c in conditions)

    def served() -> bool:
        try:
            client.CustomObjectsApi(api).list_cluster_custom_object(RUNS.group, RUNS.version, RUNS.plural)
        except client.ApiException as e:
            if e.status == 404:
                return False
            raise
        return True

    until(established, f"{name} is established")
    until(served, "StarCoderRuns are served")


@contextmanager
def space(kubeconfig: Path, prefix: str, *, pod_security: str = "restricted") -> Iterator[Space]:
    """New each time: without a controller manager a deleted namespace never quite goes."""
    with config.new_client_from_config(str(kubeconfig)) as api:
        install_crd(api)
        found = Space(api, kubeconfig, f"{prefix}-{uuid.uuid4().hex[:8]}")
        found.create(pod_security=pod_security)
        try:
            yield found
        finally:
            found.remove()
