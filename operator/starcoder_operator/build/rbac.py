"""What a run's agents may do: read its assignment, answer in its Leases. Each object by name, none to be created."""

from __future__ import annotations

from starcoder_operator.api.v1alpha1 import StarCoderRunSpec
from starcoder_trainer.contract import names

from .owner import Manifest, Owner

RBAC = "rbac.authorization.k8s.io"


def service_account(run: str, spec: StarCoderRunSpec) -> str:
    """ServiceAccount of the run's Pods: the user's with cloud identity, or one that is the run's own."""
    return spec.workers.service_account_name or names.service_account_name(run)


def access(namespace: str, name: str, uid: str, spec: StarCoderRunSpec, members: int) -> tuple[Manifest, ...]:
    """ServiceAccount (unless the spec names one), Role and RoleBinding, in the order they are created.

    Args:
        members: as many Leases may be written.
    """
    owner, account = Owner(namespace, name, uid), service_account(name, spec)
    own_name = names.service_account_name(name)
    role: Manifest = {
        "apiVersion": f"{RBAC}/v1",
        "kind": "Role",
        "metadata": owner.metadata(own_name),
        "rules": [
            {
                # list and watch by resourceNames are granted to requests with fieldSelector metadata.name=<name> alone
                "apiGroups": [""],
                "resources": ["configmaps"],
                "resourceNames": [names.assignment_name(name)],
                "verbs": ["get", "list", "watch"],
            },
            {
                "apiGroups": ["coordination.k8s.io"],
                "resources": ["leases"],
                "resourceNames": [names.lease_name(name, member) for member in range(members)],
                "verbs": ["get", "update", "patch"],
            },
        ],
    }
    binding: Manifest = {
        "apiVersion": f"{RBAC}/v1",
        "kind": "RoleBinding",
        "metadata": owner.metadata(own_name),
        "roleRef": {"apiGroup": RBAC, "kind": "Role", "name": own_name},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": namespace}],
    }
    if account != own_name:
        return role, binding
    # Its token is mounted by the Pod into the agent alone, whatever the account's own default.
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": owner.metadata(own_name)}, role, binding
