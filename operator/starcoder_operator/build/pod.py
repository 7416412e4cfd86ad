"""One member's Pod."""

from __future__ import annotations

from starcoder_operator.api.v1alpha1 import StarCoderRunSpec
from starcoder_operator.api.v1alpha1.storage import Scheduling
from starcoder_operator.domain.members import OWN_TOLERATIONS
from starcoder_operator.domain.pod_template import ANNOTATION_AVOIDS, ANNOTATION_TEMPLATE, template_digest
from starcoder_trainer.contract import names
from starcoder_trainer.contract.heartbeat import USUAL, Rhythm

from . import containers
from .containers import Image
from .owner import Manifest, Owner
from .patch import PatchError, strategic_merge
from .rbac import service_account
from .volumes import volumes

TOLERATION_SECONDS = 30
"""Seconds until Kubernetes itself gives up a Pod on a node that is not ready or unreachable. The operator watches nodes
and replaces the Pod at once; this is for the time when no operator runs."""

DEFAULT_GRACE_SECONDS = 30
"""Kubernetes', where a patch takes the run's away."""

LET_ALONE = {
    "karpenter.sh/do-not-disrupt": "true",
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "sidecar.istio.io/inject": "false",
    "linkerd.io/inject": "disabled",
}
"""Annotations against consolidation under a running gang, and against proxies between its collectives."""


def pod(
    owner: Owner,
    spec: StarCoderRunSpec,
    image: Image,
    *,
    member: int,
    incarnation: int,
    avoid_nodes: tuple[str, ...] = (),
    shun_nodes: tuple[str, ...] = (),
    gang: Manifest | None = None,
    rhythm: Rhythm = USUAL,
) -> Manifest:
    """The Pod as it is to be created.

    Args:
        avoid_nodes: it is never placed on these.
        shun_nodes: it is rather not placed on these; what else is preferred may outweigh that.
        gang: what makes it a member of its gang, as a part of a Pod (`Gang.joined`).
        rhythm: of its agent's heartbeats.

    Raises:
        PatchError: `spec.workers.podPatch` can't be applied.
    """
    manifest: Manifest = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": owner.metadata(names.pod_name(owner.name, member, incarnation)),
        "spec": _spec(owner, spec, image, member=member, incarnation=incarnation, rhythm=rhythm),
    }
    manifest["metadata"]["annotations"] = {
        "kubectl.kubernetes.io/default-container": names.CONTAINER_WORKER,
        **LET_ALONE,
    }
    patched = strategic_merge(manifest, spec.workers.pod_patch)
    _check_containers(patched)
    # What the operator finds its Pods by, and what places them, stands above the patch.
    _avoid(patched, avoid_nodes)
    _shun(patched, shun_nodes)
    _attract(patched, owner.name, spec.scheduling)
    avoids = {ANNOTATION_AVOIDS: ",".join(avoid_nodes)} if avoid_nodes else {}
    grace = patched["spec"].get("terminationGracePeriodSeconds", DEFAULT_GRACE_SECONDS)
    own = {
        "spec": {
            "initContainers": [
                {"name": names.CONTAINER_AGENT, "env": [{"name": names.ENV_GRACE_SECONDS, "value": str(grace)}]}
            ]
        },
        "metadata": {
            "labels": {names.LABEL_MEMBER: str(member), names.LABEL_INCARNATION: str(incarnation)},
            "annotations": {ANNOTATION_TEMPLATE: template_digest(spec), **avoids},
        },
    }
    return strategic_merge(strategic_merge(patched, own), gang or {})


def _spec(
    owner: Owner, spec: StarCoderRunSpec, image: Image, *, member: int, incarnation: int, rhythm: Rhythm
) -> Manifest:
    workers = spec.workers
    init = [containers.agent(owner, spec, image, member=member, incarnation=incarnation, rhythm=rhythm)]
    if workers.scratch.host_path is not None:
        init.insert(0, containers.scratch_owner(image))
    found: Manifest = {
        # A container that fails is started again in its place; only a node makes a Pod of these Failed.
        "restartPolicy": "OnFailure",
        "terminationGracePeriodSeconds": workers.termination_grace_period_seconds,
        "serviceAccountName": service_account(owner.name, spec),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": containers.POD_SECURITY,
        "tolerations": [*_own_tolerations(spec), *(t.to_dict() for t in workers.tolerations)],
        "initContainers": init,
        "containers": [containers.worker(owner, spec, image, member=member, incarnation=incarnation)],
        "volumes": volumes(owner, spec),
    }
    if workers.host_network:
        found |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    said = {
        "nodeSelector": workers.node_selector,
        "affinity": workers.affinity.to_dict() if workers.affinity else None,
        "imagePullSecrets": [secret.to_dict() for secret in workers.image_pull_secrets],
        "runtimeClassName": workers.runtime_class_name,
        "priorityClassName": spec.scheduling.priority_class_name,
    }
    return found | {field: value for field, value in said.items() if value}


def _own_tolerations(spec: StarCoderRunSpec) -> list[Manifest]:
    """Short ones for lost nodes, where the user has not said their own."""
    users = {t.key for t in spec.workers.tolerations if t.effect in (None, "NoExecute")}
    return [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": TOLERATION_SECONDS}
        for key in OWN_TOLERATIONS
        if key not in users
    ]


def _check_containers(pod: Manifest) -> None:
    """The patch may change the operator's containers, not take them away."""
    for field, name in (("initContainers", names.CONTAINER_AGENT), ("containers", names.CONTAINER_WORKER)):
        found = [c.get("name") for c in pod["spec"].get(field) or []]
        if name not in found:
            raise PatchError(f"spec.{field}", ", ".join(map(str, found)) or "none", f"{name} among them")
    if any(c.get("name") == names.CONTAINER_AGENT for c in pod["spec"]["containers"]):
        raise PatchError(
            "spec.containers", names.CONTAINER_AGENT, "it under initContainers, where the agent is, a native sidecar"
        )


def _attract(pod: Manifest, run: str, scheduling: Scheduling) -> None:
    """Adds that the run's Pods are to be in one topology domain. The first Pod attracts the others: one that is to be
    near itself may be placed anywhere."""
    if scheduling.topology_key is None:
        return
    near: Manifest = {
        "labelSelector": {"matchLabels": {names.LABEL_RUN: run}},
        "topologyKey": scheduling.topology_key,
    }
    field, term = "requiredDuringSchedulingIgnoredDuringExecution", near
    if scheduling.topology_policy == "Preferred":
        field, term = "preferredDuringSchedulingIgnoredDuringExecution", {"weight": 100, "podAffinityTerm": near}
    affinity = _part(pod["spec"], "spec", "affinity")
    attraction = _part(affinity, "spec.affinity", "podAffinity")
    attraction[field] = [*(attraction.get(field) or []), term]


def _part(parent: Manifest, path: str, field: str) -> Manifest:
    """The object in that field, made where there is none."""
    found = parent[field] = parent.get(field) or {}
    if not isinstance(found, dict):
        raise PatchError(f"{path}.{field}", type(found).__name__, "an object")
    return found


def _shun(pod: Manifest, nodes: tuple[str, ...]) -> None:
    """Adds that other nodes than these are preferred, with the greatest weight there is."""
    if not nodes:
        return
    affinity = _part(_part(pod["spec"], "spec", "affinity"), "spec.affinity", "nodeAffinity")
    field = "preferredDuringSchedulingIgnoredDuringExecution"
    others: Manifest = {"weight": 100, "preference": {"matchFields": _other_than(nodes)}}
    affinity[field] = [*(affinity.get(field) or []), others]


def _other_than(nodes: tuple[str, ...]) -> list[Manifest]:
    """A field selector takes one value, so each node is a requirement of its own."""
    return [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]


def _avoid(pod: Manifest, nodes: tuple[str, ...]) -> None:
    """Adds to each way of being placed that none of `nodes` will do. Terms are alternatives, each is to be added to."""
    if not nodes:
        return
    place, path = pod["spec"], "spec"
    for field in ("affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution"):
        place, path = _part(place, path, field), f"{path}.{field}"
    forbidden = _other_than(nodes)
    # An empty term of the user's matches no node; with a requirement it would match nearly all.
    terms = place.get("nodeSelectorTerms")
    place["nodeSelectorTerms"] = (
        [term | {"matchFields": [*(term.get("matchFields") or []), *forbidden]} if term else term for term in terms]
        if terms
        else [{"matchFields": forbidden}]
    )
