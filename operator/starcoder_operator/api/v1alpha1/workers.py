"""The Pods of a run. Fields named as in a Pod mean what they mean there."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from .base import ApiModel, Labels, Name, Quantity, Schemaless

PullPolicy = Literal["Always", "IfNotPresent", "Never"]

EnvName = Annotated[str, StringConstraints(pattern=r"^[-._a-zA-Z][-._a-zA-Z0-9]*$", max_length=256)]


class Resources(ApiModel):
    """Of the worker container. GPUs are not named here: gpusPerWorker adds them."""

    requests: Annotated[dict[str, Quantity], Field(max_length=32)] = Field(default={})
    """Resource to quantity."""
    limits: Annotated[dict[str, Quantity], Field(max_length=32)] = Field(default={})
    """Resource to quantity."""


class Toleration(ApiModel):
    key: Annotated[str, StringConstraints(max_length=317)] | None = None
    """Taint key; empty with operator Exists tolerates all."""
    operator: Literal["Exists", "Equal", "Lt", "Gt"] | None = None
    """How value is compared. Default: Equal."""
    value: Annotated[str, StringConstraints(max_length=63)] | None = None
    """Taint value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Taint effect. Default: all."""
    toleration_seconds: Annotated[int, Field(ge=0)] | None = None
    """How long a NoExecute taint is tolerated, seconds. Default: for ever."""


class KeySelector(ApiModel):
    name: Name
    """Object in the run's namespace."""
    key: Annotated[str, StringConstraints(min_length=1, max_length=253)]
    """Key in the object's data."""
    optional: bool | None = None
    """Start without it where it is missing. Default: false."""


class FieldSelector(ApiModel):
    field_path: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    """Field of the Pod, for example status.hostIP."""
    api_version: Annotated[str, StringConstraints(max_length=64)] | None = None
    """Version the path is written for. Default: v1."""


class ResourceSelector(ApiModel):
    resource: Annotated[str, StringConstraints(min_length=1, max_length=253)]
    """For example limits.memory."""
    container_name: Name | None = None
    """Default: the container the variable belongs to."""
    divisor: Quantity | None = None
    """Unit of the value. Default: 1."""


class EnvSource(ApiModel):
    """One of these."""

    secret_key_ref: KeySelector | None = None
    """Key of a Secret."""
    config_map_key_ref: KeySelector | None = None
    """Key of a ConfigMap."""
    field_ref: FieldSelector | None = None
    """Field of the Pod."""
    resource_field_ref: ResourceSelector | None = None
    """Resource of a container."""


class EnvVar(ApiModel):
    name: EnvName
    """Name of the variable; STARCODER_… is the operator's."""
    value: Annotated[str, StringConstraints(max_length=32768)] | None = None
    """Literal value."""
    value_from: EnvSource | None = None
    """Where the value comes from, instead of value."""


class EnvFromRef(ApiModel):
    name: Name
    """Object in the run's namespace."""
    optional: bool | None = None
    """Start without it where it is missing. Default: false."""


class EnvFrom(ApiModel):
    prefix: Annotated[str, StringConstraints(max_length=256)] | None = None
    """Put before each key."""
    config_map_ref: EnvFromRef | None = None
    """All keys of a ConfigMap."""
    secret_ref: EnvFromRef | None = None
    """All keys of a Secret."""


class PullSecret(ApiModel):
    name: Name
    """Secret of type kubernetes.io/dockerconfigjson in the run's namespace."""


class Affinity(ApiModel):
    """As in a Pod; a server-side dry run tells its errors in the condition Accepted."""

    node_affinity: Schemaless | None = None
    """As in a Pod."""
    pod_affinity: Schemaless | None = None
    """As in a Pod."""
    pod_anti_affinity: Schemaless | None = None
    """As in a Pod."""


class EmptyDirScratch(ApiModel):
    size_limit: Quantity | None = None
    """Bytes, for example 500Gi. Default: what the node has."""


class HostPathScratch(ApiModel):
    path: Annotated[str, StringConstraints(pattern=r"^/", max_length=1024)]
    """Directory on every node, for example of a local NVMe; it is created where it is missing. A run's files are in
    NAMESPACE/NAME/UID below it and stay when the run is deleted. The namespace must admit hostPath and an init
    container of root that hands the directory over."""


class EphemeralScratch(ApiModel):
    size: Quantity
    """Bytes of the claim, for example 1Ti."""
    storage_class_name: Name | None = None
    """Default: the cluster's default class."""


class Scratch(ApiModel):
    """Where a Pod keeps local checkpoints and its cache of the data. Exactly one of these. Have room for six
    checkpoints: one that is written, one that is uploaded, two that wait, the one uploaded last, and the one that a
    restart has read. Each is 12 bytes a parameter, divided by workers.replicas."""

    empty_dir: EmptyDirScratch | None = None
    """On the node's own disk; gone with the Pod."""
    host_path: HostPathScratch | None = None
    """A directory of the node; outlives the Pod."""
    ephemeral: EphemeralScratch | None = None
    """A PersistentVolumeClaim that is made and deleted with the Pod."""


class Workers(ApiModel):
    """The Pods, one a member of the gang, and the GPUs in each."""

    replicas: Annotated[int, Field(ge=1, le=10000)]
    """Pods that train. Changed while it runs, the gang takes a checkpoint and forms anew with as many."""
    gpus_per_worker: Annotated[int, Field(ge=1, le=64)]
    """GPUs, and so worker processes, a Pod. Immutable."""
    gpu_resource: Name = "nvidia.com/gpu"
    """Resource that stands for one GPU."""
    image: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = None
    """Trainer image. Default: the operator's setting (chart value trainerImage)."""
    image_pull_policy: PullPolicy | None = None
    """Default: Kubernetes', by the image's tag."""
    image_pull_secrets: Annotated[tuple[PullSecret, ...], Field(max_length=16)] = ()
    """Credentials of the image's registry."""
    resources: Resources = Resources()
    node_selector: Labels = Field(default={})
    """Labels a node must have."""
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=64)] = ()
    """Taints the Pods tolerate, beside those the operator sets for lost nodes."""
    affinity: Affinity | None = None
    env: Annotated[
        tuple[EnvVar, ...], Field(max_length=128, json_schema_extra={"x-kubernetes-list-map-keys": ["name"]})
    ] = ()
    """Variables of the worker container."""
    env_from: Annotated[tuple[EnvFrom, ...], Field(max_length=32)] = ()
    """Sources of variables of the worker container."""
    runtime_class_name: Name | None = None
    """Default: the cluster's."""
    host_network: bool = False
    """Use the node's network, for fabrics that need it."""
    service_account_name: Name | None = None
    """ServiceAccount with cloud identity to use instead of the one the operator makes; the run's Role is bound to
    it."""
    shared_memory: Quantity | None = None
    """Size of /dev/shm, bytes, for example 64Gi; it counts as the container's memory. Default: the runtime's,
    64Mi as a rule."""
    scratch: Scratch = Scratch(empty_dir=EmptyDirScratch())
    termination_grace_period_seconds: Annotated[int, Field(ge=0, le=86400)] = 300
    """Time a Pod has to stop, seconds."""
    pod_patch: Schemaless = Field(default={})
    """Strategic-merge patch of the Pod for all that is not named here: RDMA resources, capabilities, volumes,
    initContainers, resource claims. The containers are named worker and agent. A server-side dry run tells its
    errors in the condition Accepted."""

    @property
    def gpus(self) -> int:
        """GPUs of the whole gang."""
        return self.replicas * self.gpus_per_worker
