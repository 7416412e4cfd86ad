"""Rules of a spec that types and ranges can't say, one small function each.

The CRD's CEL rules (api/v1alpha1/rules.py) say the same sentences at `kubectl apply`; here they hold for local runs and
for objects that were stored under an older CRD. What CEL can't look into (podPatch) is checked only here. Immutable
fields are a matter of two versions and so of the API server alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from starcoder_operator.api.v1alpha1 import StarCoderRunSpec
from starcoder_operator.api.v1alpha1.rules import MAX_NAME_LENGTH, S3_URI

from .layout import data_parallel, model_parallel
from .training_config import learning_rates, sequence_length

LEAST_HANG_SECONDS = 5
"""Agents look at their workers each second and take two to have them say what they wait for."""


@dataclass(frozen=True)
class Violation:
    """A sentence in three parts: `field`: `value` `rule`."""

    field: str
    value: str
    rule: str

    def __str__(self) -> str:
        return f"{self.field}: {self.value} {self.rule}"


Violations = Iterator[Violation]


def gpus_divide(spec: StarCoderRunSpec) -> Violations:
    workers, parallelism = spec.workers, spec.parallelism
    if workers.gpus % model_parallel(spec):
        yield Violation(
            "spec.workers",
            f"{workers.replicas} x {workers.gpus_per_worker} GPUs = {workers.gpus}",
            f"is not divisible by parallelism tensor {parallelism.tensor} x pipeline {parallelism.pipeline} = "
            f"{model_parallel(spec)}",
        )


def pipeline_divides_layers(spec: StarCoderRunSpec) -> Violations:
    layers, pipeline = spec.model.shape().layers, spec.parallelism.pipeline
    if layers % pipeline:
        yield Violation("spec.parallelism.pipeline", str(pipeline), f"does not divide the model's {layers} layers")


def tensor_divides_heads(spec: StarCoderRunSpec) -> Violations:
    heads, tensor = spec.model.shape().attention_heads, spec.parallelism.tensor
    if heads % tensor:
        yield Violation("spec.parallelism.tensor", str(tensor), f"does not divide the model's {heads} attention heads")


def tensor_divides_ffn(spec: StarCoderRunSpec) -> Violations:
    width, tensor = spec.model.shape().ffn_hidden_size, spec.parallelism.tensor
    if width % tensor:
        yield Violation("spec.parallelism.tensor", str(tensor), f"does not divide the model's ffnHiddenSize {width}")


def tensor_divides_vocabulary(spec: StarCoderRunSpec) -> Violations:
    size, tensor = spec.model.shape().vocab_size, spec.parallelism.tensor
    if size % tensor:
        yield Violation("spec.parallelism.tensor", str(tensor), f"does not divide the model's vocabSize {size}")


def query_groups_divide_heads(spec: StarCoderRunSpec) -> Violations:
    shape = spec.model.shape()
    if shape.attention_heads % shape.query_groups:
        yield Violation(
            "spec.model.queryGroups",
            str(shape.query_groups),
            f"does not divide the model's {shape.attention_heads} attention heads",
        )


def query_groups_fit_tensor(spec: StarCoderRunSpec) -> Violations:
    groups, tensor = spec.model.shape().query_groups, spec.parallelism.tensor
    if groups % tensor and tensor % groups:
        yield Violation(
            "spec.parallelism.tensor",
            str(tensor),
            f"is neither a multiple nor a divisor of the model's {groups} query groups",
        )


def sequence_parallelism_has_tensor(spec: StarCoderRunSpec) -> Violations:
    if spec.parallelism.sequence and spec.parallelism.tensor == 1:
        yield Violation("spec.parallelism.sequence", "true", "needs parallelism tensor above 1, found 1")


def sequence_parallelism_divides_samples(spec: StarCoderRunSpec) -> Violations:
    tensor, length = spec.parallelism.tensor, sequence_length(spec)
    if spec.parallelism.sequence and length % tensor:
        yield Violation(
            "spec.data.sequenceLength",
            str(length),
            f"is not divisible by parallelism tensor {tensor}, as sequence parallelism needs",
        )


def samples_fit_positions(spec: StarCoderRunSpec) -> Violations:
    longest, length = spec.model.shape().max_sequence_length, sequence_length(spec)
    if length > longest:
        yield Violation(
            "spec.data.sequenceLength", str(length), f"is longer than the model's maxSequenceLength {longest}"
        )


def batch_is_whole_micro_batches(spec: StarCoderRunSpec) -> Violations:
    training = spec.training
    if training.global_batch_size % training.micro_batch_size:
        yield Violation(
            "spec.training.globalBatchSize",
            str(training.global_batch_size),
            f"is not a multiple of microBatchSize {training.micro_batch_size}",
        )


def batch_feeds_every_replica(spec: StarCoderRunSpec) -> Violations:
    batch, micro, data = spec.training.global_batch_size, spec.training.micro_batch_size, data_parallel(spec)
    if batch < micro * data:
        yield Violation(
            "spec.training.globalBatchSize",
            str(batch),
            f"is smaller than microBatchSize {micro} x data parallelism {data} = {micro * data}",
        )


def min_replicas_is_within(spec: StarCoderRunSpec) -> Violations:
    least, replicas = spec.elasticity.min_replicas, spec.workers.replicas
    if least is not None and least > replicas:
        yield Violation("spec.elasticity.minReplicas", str(least), f"is larger than workers.replicas {replicas}")


def min_replicas_have_a_layout(spec: StarCoderRunSpec) -> Violations:
    least, gpus = spec.elasticity.min_replicas, spec.workers.gpus_per_worker
    if least is not None and least * gpus % model_parallel(spec):
        yield Violation(
            "spec.elasticity.minReplicas",
            f"{least} x {gpus} GPUs = {least * gpus}",
            f"is not divisible by parallelism tensor {spec.parallelism.tensor} x pipeline {spec.parallelism.pipeline} "
            f"= {model_parallel(spec)}",
        )


def patience_is_some_time(spec: StarCoderRunSpec) -> Violations:
    patience = spec.elasticity.patience
    if patience.seconds == 0:
        yield Violation("spec.elasticity.patience", patience, "is no time, expected 1s or more")


def hangs_are_told_from_work(spec: StarCoderRunSpec) -> Violations:
    hang = spec.failure_policy.hang
    said = {"iteration": hang.iteration, "firstIteration": hang.first_iteration, "checkpoint": hang.checkpoint}
    for field, limit in said.items():
        if limit.seconds < LEAST_HANG_SECONDS:
            yield Violation(
                f"spec.failurePolicy.hang.{field}", limit, "is too short to tell a hang from work, expected 5s or more"
            )


def queue_is_kueues(spec: StarCoderRunSpec) -> Violations:
    gang, queue = spec.scheduling.gang, spec.scheduling.queue
    if gang == "Kueue" and queue is None:
        yield Violation("spec.scheduling.queue", "gang Kueue", "needs the name of a LocalQueue, found none")
    if gang != "Kueue" and queue is not None:
        yield Violation("spec.scheduling.queue", queue, f"is for gang Kueue, found gang {gang}")


def backoff_grows(spec: StarCoderRunSpec) -> Violations:
    backoff = spec.failure_policy.backoff
    if backoff.max.seconds < backoff.initial.seconds:
        yield Violation("spec.failurePolicy.backoff.max", backoff.max, f"is shorter than initial {backoff.initial}")


def learning_rate_falls(spec: StarCoderRunSpec) -> Violations:
    peak, last = learning_rates(spec)
    if last > peak:
        yield Violation("spec.training.optimizer.minLr", f"{last}", f"is larger than lr {peak}")


def warmup_ends(spec: StarCoderRunSpec) -> Violations:
    warmup, iterations = spec.training.optimizer.warmup_iterations, spec.training.iterations
    if warmup is not None and warmup >= iterations:
        yield Violation(
            "spec.training.optimizer.warmupIterations",
            str(warmup),
            f"is not smaller than training.iterations {iterations}",
        )


def endpoint_is_http(spec: StarCoderRunSpec) -> Violations:
    endpoint = spec.storage.endpoint
    if endpoint and not re.match(r"^https?://[^/]+", endpoint):
        yield Violation("spec.storage.endpoint", f'"{endpoint}"', "is no http:// or https:// address")


def ca_bundle_is_pem(spec: StarCoderRunSpec) -> Violations:
    bundle = spec.storage.ca_bundle
    if bundle and "-----BEGIN CERTIFICATE-----" not in bundle:
        yield Violation(
            "spec.storage.caBundle", f"{len(bundle)} characters", "hold no -----BEGIN CERTIFICATE-----; PEM is expected"
        )


def gpus_are_counted_once(spec: StarCoderRunSpec) -> Violations:
    for kind, resources in (("requests", spec.workers.resources.requests), ("limits", spec.workers.resources.limits)):
        if spec.workers.gpu_resource in resources:
            yield Violation(
                f"spec.workers.resources.{kind}",
                spec.workers.gpu_resource,
                "is set from gpusPerWorker and must not be named here",
            )


def one_kind_of_scratch(spec: StarCoderRunSpec) -> Violations:
    scratch = spec.workers.scratch
    found = sum(kind is not None for kind in (scratch.empty_dir, scratch.host_path, scratch.ephemeral))
    if found != 1:
        rule = "kinds named, expected one of emptyDir, hostPath, ephemeral"
        yield Violation("spec.workers.scratch", str(found), rule)


def variables_are_well_said(spec: StarCoderRunSpec) -> Violations:
    seen: set[str] = set()
    for i, variable in enumerate(spec.workers.env):
        where = f"spec.workers.env[{i}]"
        if variable.name.startswith("STARCODER_"):
            yield Violation(where, variable.name, "is reserved: STARCODER_ variables are the operator's")
        if variable.name in seen:
            yield Violation(where, variable.name, "is named twice")
        seen.add(variable.name)
        if variable.value is not None and variable.value_from is not None:
            yield Violation(where, variable.name, "has value and valueFrom, expected one of them")
        if variable.value_from is not None and len(variable.value_from.to_dict()) != 1:
            yield Violation(
                f"{where}.valueFrom", str(len(variable.value_from.to_dict())), "sources named, expected exactly one"
            )


POD_PATCH_KEYS = frozenset({"metadata", "spec"})
OPERATORS_METADATA = frozenset({"name", "generateName", "namespace", "uid", "ownerReferences", "finalizers"})
OPERATORS_SPEC = frozenset({"schedulingGroup", "nodeName"})


def pod_patch_leaves_identity(spec: StarCoderRunSpec) -> Violations:
    """The operator finds its Pods by name, owner and labels; a patch must not change them."""
    patch, where = spec.workers.pod_patch, "spec.workers.podPatch"
    for key in sorted(patch.keys() - POD_PATCH_KEYS):
        yield Violation(where, key, "is no part of a Pod that can be patched, expected metadata or spec")
    for part, owned in (("metadata", OPERATORS_METADATA), ("spec", OPERATORS_SPEC)):
        value = patch.get(part, {})
        if not isinstance(value, dict):
            yield Violation(f"{where}.{part}", type(value).__name__, "found, expected an object")
            continue
        for key in sorted(value.keys() & owned):
            yield Violation(f"{where}.{part}", key, "is the operator's and can't be patched")
    metadata = patch.get("metadata")
    labels = metadata.get("labels") if isinstance(metadata, dict) else None
    for key in sorted(labels) if isinstance(labels, dict) else ():
        if key.startswith("starcoder.dev/"):
            yield Violation(f"{where}.metadata.labels", key, "is the operator's and can't be patched")


RULES: tuple[Callable[[StarCoderRunSpec], Violations], ...] = (
    gpus_divide,
    pipeline_divides_layers,
    tensor_divides_heads,
    tensor_divides_ffn,
    tensor_divides_vocabulary,
    query_groups_divide_heads,
    query_groups_fit_tensor,
    sequence_parallelism_has_tensor,
    sequence_parallelism_divides_samples,
    samples_fit_positions,
    batch_is_whole_micro_batches,
    batch_feeds_every_replica,
    min_replicas_is_within,
    min_replicas_have_a_layout,
    patience_is_some_time,
    hangs_are_told_from_work,
    queue_is_kueues,
    backoff_grows,
    learning_rate_falls,
    warmup_ends,
    endpoint_is_http,
    ca_bundle_is_pem,
    gpus_are_counted_once,
    one_kind_of_scratch,
    variables_are_well_said,
    pod_patch_leaves_identity,
)


def uris_are(spec: StarCoderRunSpec, allow_files: bool) -> Violations:
    places = [("spec.data.tokenizer", spec.data.tokenizer)]
    places += [(f"spec.data.sources[{i}].uri", source.uri) for i, source in enumerate(spec.data.sources)]
    places += [("spec.checkpoint.uri", spec.checkpoint.uri)]
    for field, uri in places:
        if re.fullmatch(S3_URI, uri) or (allow_files and re.fullmatch(r"file:///.+", uri)):
            continue
        expected = "s3://bucket/key" + (" or file:///path" if allow_files else "")
        yield Violation(field, f'"{uri}"', f"is no URI of the form {expected}")


def name_problems(name: str) -> tuple[Violation, ...]:
    """Why a run can't be called that: names of Pods and Leases derive from its name."""
    out = []
    if len(name) > MAX_NAME_LENGTH:
        out.append(
            Violation("metadata.name", f'"{name}"', f"has {len(name)} characters, expected at most {MAX_NAME_LENGTH}")
        )
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name):
        out.append(
            Violation("metadata.name", f'"{name}"', "is no DNS label, expected lower-case letters, digits and hyphens")
        )
    return tuple(out)


def problems(spec: StarCoderRunSpec, *, allow_files: bool = False) -> tuple[Violation, ...]:
    """All that is wrong with a spec, in the order of the rules; empty where it can be trained.

    Args:
        spec: types and ranges are already right, or pydantic had refused it.
        allow_files: local runs may read and write `file:///path`.
    """
    return tuple(_all(spec, allow_files))


def _all(spec: StarCoderRunSpec, allow_files: bool) -> Iterable[Violation]:
    yield from uris_are(spec, allow_files)
    for rule in RULES:
        yield from rule(spec)
