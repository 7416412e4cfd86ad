"""Where checkpoints go, how S3 is reached, and how Pods are placed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from .base import ApiModel, Name, Uri


class Checkpoint(ApiModel):
    """Verified checkpoints in S3."""

    uri: Uri
    """Prefix that belongs to this run alone: s3://bucket/key. Immutable."""
    every_iterations: Annotated[int, Field(gt=0, le=10**9)] = 250
    """Iterations between two checkpoints."""
    keep_last: Annotated[int, Field(ge=1, le=1000)] = 3
    """Newest verified checkpoints that are kept."""
    resume: Literal["Own", "Adopt"] = "Own"
    """Own: refuse a prefix that another run (by uid) has written to. Adopt: take it over and go on from its newest
    verified checkpoint, as after delete and re-apply or a restored backup."""


class Storage(ApiModel):
    """The S3 service of tokenizer, data and checkpoints."""

    endpoint: Annotated[str, StringConstraints(max_length=1024)] = ""
    """http:// or https:// address. Default: empty, AWS."""
    region: Annotated[str, StringConstraints(min_length=1, max_length=63)] = "us-east-1"
    """Region that requests are signed for."""
    credentials_secret: Name | None = None
    """Secret in the run's namespace with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where needed, AWS_SESSION_TOKEN.
    Default: none, the cloud identity of the ServiceAccount."""
    path_style: bool = False
    """Bucket in the path instead of the host name, as most servers other than AWS want it."""
    ca_bundle: Annotated[str, StringConstraints(max_length=65536)] = ""
    """PEM certificates that the endpoint's certificate is checked against. Default: empty, the system's."""


class Scheduling(ApiModel):
    """How the Pods are placed."""

    gang: Literal["Native", "Kueue", "None"] = "Native"
    """Native: all Pods or none, by Kubernetes' PodGroup (scheduling.k8s.io/v1beta1). Kueue: quota for all Pods or none,
    as a group of plain Pods of a LocalQueue. None: Pod by Pod, for clusters without either."""
    queue: Annotated[str, StringConstraints(min_length=1, max_length=63)] | None = None
    """LocalQueue in the run's namespace. Needed with Kueue, refused without."""
    topology_key: Annotated[str, StringConstraints(min_length=1, max_length=317)] | None = None
    """Label of nodes whose values are domains of fast network, such as topology.kubernetes.io/zone or that of a rack or
    NVLink domain: Pods are kept in one domain, and ranks are ordered by domain, then node."""
    topology_policy: Literal["Preferred", "Required"] = "Preferred"
    """Preferred: as far as there is room. Required: all Pods in one domain, or they wait."""
    priority_class_name: Name | None = None
    """Of the Pods and the PodGroup. Default: the cluster's."""
