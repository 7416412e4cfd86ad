"""Kinds of objects the operator reads or writes, and what it must be allowed to do with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starcoder_operator.api.v1alpha1 import GROUP, KIND, PLURAL, VERSION

Manifest = dict[str, Any]
"""An object as JSON."""


@dataclass(frozen=True)
class Kind:
    group: str
    """Empty: the core group."""
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """URL path of a collection, an object or its subresource."""
        parts = ["", "apis", self.group, self.version] if self.group else ["", "api", self.version]
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        return "/".join([*parts, self.plural, *([name] if name else []), *([subresource] if subresource else [])])

    def __str__(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


RUNS = Kind(GROUP, VERSION, PLURAL, KIND)
PODS = Kind("", "v1", "pods", "Pod")
CONFIG_MAPS = Kind("", "v1", "configmaps", "ConfigMap")
SERVICE_ACCOUNTS = Kind("", "v1", "serviceaccounts", "ServiceAccount")
NODES = Kind("", "v1", "nodes", "Node", namespaced=False)
LEASES = Kind("coordination.k8s.io", "v1", "leases", "Lease")
ROLES = Kind("rbac.authorization.k8s.io", "v1", "roles", "Role")
ROLE_BINDINGS = Kind("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding")
EVENTS = Kind("events.k8s.io", "v1", "events", "Event")
POD_GROUPS = Kind("scheduling.k8s.io", "v1beta1", "podgroups", "PodGroup")
DISRUPTION_BUDGETS = Kind("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget")
ACCESS_REVIEWS = Kind(
    "authorization.k8s.io", "v1", "selfsubjectaccessreviews", "SelfSubjectAccessReview", namespaced=False
)

_WRITTEN = (
    RUNS,
    PODS,
    CONFIG_MAPS,
    SERVICE_ACCOUNTS,
    LEASES,
    ROLES,
    ROLE_BINDINGS,
    EVENTS,
    POD_GROUPS,
    DISRUPTION_BUDGETS,
)
_BY_NAME = {(k.api_version, k.kind): k for k in _WRITTEN}


def kind_of(manifest: Manifest) -> Kind:
    """Raises KeyError where the operator never writes that kind."""
    return _BY_NAME[manifest["apiVersion"], manifest["kind"]]


@dataclass(frozen=True)
class Permission:
    kind: Kind
    verbs: tuple[str, ...]
    subresource: str = ""
    needed: bool = True
    """False: a run of another gang can be trained without it."""


PERMISSIONS = (
    Permission(RUNS, ("get", "list", "watch")),
    Permission(RUNS, ("patch",), subresource="status"),
    Permission(PODS, ("get", "list", "watch", "create", "delete")),
    Permission(PODS, ("patch",), subresource="status", needed=False),
    Permission(LEASES, ("get", "list", "watch", "create", "update", "patch")),
    Permission(CONFIG_MAPS, ("get", "list", "watch", "create", "update")),
    Permission(SERVICE_ACCOUNTS, ("get", "create")),
    Permission(ROLES, ("get", "create", "update")),
    Permission(ROLE_BINDINGS, ("get", "create", "update", "delete")),
    Permission(POD_GROUPS, ("get", "list", "watch", "create", "patch", "delete"), needed=False),
    Permission(DISRUPTION_BUDGETS, ("get", "create", "patch")),
    Permission(EVENTS, ("get", "create", "patch")),
    Permission(NODES, ("get", "list", "watch")),
)
"""Every right the operator uses, in the namespaces it serves (nodes: in the cluster). The chart grants exactly these.

Leases: update and patch are not used by the operator on a run's Leases, but nobody may grant what they don't hold, and
the run's agents are granted them. The operator's own election Lease needs get, create and update as well."""
