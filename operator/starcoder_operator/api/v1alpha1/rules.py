"""The CRD's CEL rules: what the API server refuses at apply, each with a sentence that names field, value and rule.

Rules and sentences are templates over named CEL expressions. A rule stands where it can be as narrow as possible; one
that needs two parts of the spec stands at `spec`. Fields that have a default in the schema are always there when CEL
runs, optional ones are asked for with has(). `domain.validation` says the same in Python for runs without a server.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from string import Formatter
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel
from pydantic.alias_generators import to_camel

from .model import PRESETS, Shape
from .run import StarCoderRunSpec

MAX_NAME_LENGTH = 40
"""Characters of a run's name: `<run>-w<member>-<incarnation>` has to fit a DNS label with room to spare."""

S3_URI = r"s3://[a-z0-9][a-z0-9.-]*[a-z0-9]/.+"


@dataclass(frozen=True)
class Rule:
    path: str
    """Where `self` is: empty for the object, `spec.data.sources[]` for items."""
    cel: str
    """True where all is well."""
    message: str
    """CEL expression of the sentence."""
    fallback: str
    """The sentence with names in place of values; shown where `message` can't be evaluated, and in the reference."""


def rule(path: str, condition: str, sentence: str, names: Mapping[str, str] = MappingProxyType({})) -> Rule:
    """A rule from two templates, whose `{name}` stands for `names[name]`, or else for itself as CEL."""
    cel, text, values, fallback = "", "", [], ""
    for literal, name, _, _ in Formatter().parse(condition):
        cel += literal + (names.get(name, name) if name else "")
    for literal, name, _, _ in Formatter().parse(sentence):
        text += literal.replace("\\", "\\\\").replace("'", "\\'").replace("%", "%%")
        fallback += literal
        if name:
            text += "%s"
            values.append(f"string({names.get(name, name)})")
            fallback += f"<{'value' if name == 'self' else name.removeprefix('self.')}>"
    # format() and not +: the server can't bound the length of string(number) and takes + of it for too costly.
    return Rule(path, cel, f"'{text}'.format([{', '.join(values)}])" if values else f"'{text}'", fallback)


def _by_preset(override: str, numbers: Mapping[str, float]) -> str:
    """CEL for a number that the preset gives unless it is set."""
    table = ", ".join(f"'{preset}': {number}" for preset, number in numbers.items())
    preset_number = (
        f"{{{table}}}[self.model.preset]" if len(set(numbers.values())) > 1 else str(next(iter(numbers.values())))
    )
    return f"(has({override}) ? {override} : {preset_number})"


SHAPE = {
    to_camel(f.name): _by_preset(
        f"self.model.{to_camel(f.name)}", {name: getattr(preset.shape, f.name) for name, preset in PRESETS.items()}
    )
    for f in fields(Shape)
}

GPUS = "(self.workers.replicas * self.workers.gpusPerWorker)"
MIN_REPLICAS = "(has(self.elasticity.minReplicas) ? self.elasticity.minReplicas : self.workers.replicas)"
MODEL_PARALLEL = "(self.parallelism.tensor * self.parallelism.pipeline)"
SPEC = SHAPE | {
    "replicas": "self.workers.replicas",
    "gpusPerWorker": "self.workers.gpusPerWorker",
    "gpus": GPUS,
    "tensor": "self.parallelism.tensor",
    "pipeline": "self.parallelism.pipeline",
    "modelParallel": MODEL_PARALLEL,
    "minReplicas": MIN_REPLICAS,
    "minGpus": f"({MIN_REPLICAS} * self.workers.gpusPerWorker)",
    "data": f"({GPUS} / {MODEL_PARALLEL})",
    "sequenceLength": f"(has(self.data.sequenceLength) ? self.data.sequenceLength : {SHAPE['maxSequenceLength']})",
    "batch": "self.training.globalBatchSize",
    "microBatch": "self.training.microBatchSize",
    "needed": f"(self.training.microBatchSize * ({GPUS} / {MODEL_PARALLEL}))",
    "minLr": "self.training.optimizer.minLr",
    "lr": _by_preset("self.training.optimizer.lr", {name: preset.learning_rate for name, preset in PRESETS.items()}),
}
"""Numbers that rules at `spec` speak about."""


def layout_rules() -> Iterator[Rule]:
    yield rule(
        "spec",
        "{gpus} % {modelParallel} == 0",
        "spec.workers: {replicas} x {gpusPerWorker} GPUs = {gpus} is not divisible by parallelism tensor {tensor} "
        "x pipeline {pipeline} = {modelParallel}",
        SPEC,
    )
    yield rule(
        "spec",
        "{layers} % {pipeline} == 0",
        "spec.parallelism.pipeline: {pipeline} does not divide the model's {layers} layers",
        SPEC,
    )
    yield rule(
        "spec",
        "{attentionHeads} % {tensor} == 0",
        "spec.parallelism.tensor: {tensor} does not divide the model's {attentionHeads} attention heads",
        SPEC,
    )
    yield rule(
        "spec",
        "{ffnHiddenSize} % {tensor} == 0",
        "spec.parallelism.tensor: {tensor} does not divide the model's ffnHiddenSize {ffnHiddenSize}",
        SPEC,
    )
    yield rule(
        "spec",
        "{vocabSize} % {tensor} == 0",
        "spec.parallelism.tensor: {tensor} does not divide the model's vocabSize {vocabSize}",
        SPEC,
    )
    yield rule(
        "spec",
        "{attentionHeads} % {queryGroups} == 0",
        "spec.model.queryGroups: {queryGroups} does not divide the model's {attentionHeads} attention heads",
        SPEC,
    )
    yield rule(
        "spec",
        "{queryGroups} % {tensor} == 0 || {tensor} % {queryGroups} == 0",
        "spec.parallelism.tensor: {tensor} is neither a multiple nor a divisor of the model's {queryGroups} query "
        "groups",
        SPEC,
    )
    yield rule(
        "spec.parallelism",
        "!self.sequence || self.tensor > 1",
        "spec.parallelism.sequence: true needs parallelism tensor above 1, found 1",
    )
    yield rule(
        "spec",
        "!self.parallelism.sequence || {sequenceLength} % {tensor} == 0",
        "spec.data.sequenceLength: {sequenceLength} is not divisible by parallelism tensor {tensor}, "
        "as sequence parallelism needs",
        SPEC,
    )
    yield rule(
        "spec",
        "{sequenceLength} <= {maxSequenceLength}",
        "spec.data.sequenceLength: {sequenceLength} is longer than the model's maxSequenceLength {maxSequenceLength}",
        SPEC,
    )


def elasticity_rules() -> Iterator[Rule]:
    yield rule(
        "spec",
        "{minReplicas} <= {replicas}",
        "spec.elasticity.minReplicas: {minReplicas} is larger than workers.replicas {replicas}",
        SPEC,
    )
    yield rule(
        "spec",
        "!has(self.elasticity.minReplicas) || {minGpus} % {modelParallel} == 0",
        "spec.elasticity.minReplicas: {minReplicas} x {gpusPerWorker} GPUs = {minGpus} is not divisible by parallelism "
        "tensor {tensor} x pipeline {pipeline} = {modelParallel}",
        SPEC,
    )
    yield rule(
        "spec.elasticity.patience",
        "duration(self) > duration('0s')",
        "spec.elasticity.patience: {self} is no time, expected 1s or more",
    )


def hang_rules() -> Iterator[Rule]:
    for field in ("iteration", "firstIteration", "checkpoint"):
        yield rule(
            f"spec.failurePolicy.hang.{field}",
            "duration(self) >= duration('5s')",
            f"spec.failurePolicy.hang.{field}: {{self}} is too short to tell a hang from work, expected 5s or more",
        )


def training_rules() -> Iterator[Rule]:
    yield rule(
        "spec.training",
        "self.globalBatchSize % self.microBatchSize == 0",
        "spec.training.globalBatchSize: {self.globalBatchSize} is not a multiple of microBatchSize "
        "{self.microBatchSize}",
    )
    yield rule(
        "spec",
        "{batch} >= {needed}",
        "spec.training.globalBatchSize: {batch} is smaller than microBatchSize {microBatch} x data parallelism {data} "
        "= {needed}",
        SPEC,
    )
    yield rule(
        "spec",
        "!has(self.training.optimizer.minLr) || {minLr} <= {lr}",
        "spec.training.optimizer.minLr: {minLr} is larger than lr {lr}",
        SPEC,
    )
    yield rule(
        "spec.training",
        "!has(self.optimizer.warmupIterations) || self.optimizer.warmupIterations < self.iterations",
        "spec.training.optimizer.warmupIterations: {warmup} is not smaller than training.iterations {self.iterations}",
        {"warmup": "self.optimizer.warmupIterations"},
    )


def place_rules() -> Iterator[Rule]:
    for path in ("spec.data.tokenizer", "spec.data.sources[].uri", "spec.checkpoint.uri"):
        # An item's place is told by the path that the server puts before the sentence.
        yield rule(path, f"self.matches('^{S3_URI}$')", f'{path}: "{{self}}" is no URI of the form s3://bucket/key')
    yield rule(
        "spec.storage.endpoint",
        "self == '' || self.matches('^https?://[^/]+')",
        'spec.storage.endpoint: "{self}" is no http:// or https:// address',
    )
    yield rule(
        "spec.storage.caBundle",
        "self == '' || self.contains('-----BEGIN CERTIFICATE-----')",
        "spec.storage.caBundle: {length} characters hold no -----BEGIN CERTIFICATE-----; PEM is expected",
        {"length": "size(self)"},
    )


def policy_rules() -> Iterator[Rule]:
    yield rule(
        "spec.scheduling",
        "self.gang != 'Kueue' || has(self.queue)",
        "spec.scheduling.queue: gang Kueue needs the name of a LocalQueue, found none",
    )
    yield rule(
        "spec.scheduling",
        "self.gang == 'Kueue' || !has(self.queue)",
        "spec.scheduling.queue: {self.queue} is for gang Kueue, found gang {self.gang}",
    )
    yield rule(
        "spec.failurePolicy.backoff",
        "duration(self.max) >= duration(self.initial)",
        "spec.failurePolicy.backoff.max: {self.max} is shorter than initial {self.initial}",
    )


def pod_rules() -> Iterator[Rule]:
    for kind in ("requests", "limits"):
        yield rule(
            "spec.workers",
            f"!has(self.resources.{kind}) || !(self.gpuResource in self.resources.{kind})",
            f"spec.workers.resources.{kind}: {{self.gpuResource}} is set from gpusPerWorker and must not be named here",
        )
    yield rule(
        "spec.workers.scratch",
        "{found} == 1",
        "spec.workers.scratch: {found} kinds named, expected one of emptyDir, hostPath, ephemeral",
        {"found": _count("emptyDir", "hostPath", "ephemeral")},
    )
    yield rule(
        "spec.workers.env[]",
        "!self.name.startsWith('STARCODER_')",
        "spec.workers.env[]: {self.name} is reserved: STARCODER_ variables are the operator's",
    )
    yield rule(
        "spec.workers.env[]",
        "!has(self.value) || !has(self.valueFrom)",
        "spec.workers.env[]: {self.name} has value and valueFrom, expected one of them",
    )
    yield rule(
        "spec.workers.env[].valueFrom",
        "{found} == 1",
        "spec.workers.env[].valueFrom: {found} sources named, expected exactly one",
        {"found": _count("secretKeyRef", "configMapKeyRef", "fieldRef", "resourceFieldRef")},
    )


def _count(*optional: str) -> str:
    """CEL for how many of the optional fields are set."""
    return f"[{', '.join(f'has(self.{field})' for field in optional)}].filter(x, x).size()"


def name_rules() -> Iterator[Rule]:
    yield rule(
        "",
        f"size(self.metadata.name) <= {MAX_NAME_LENGTH}",
        f'metadata.name: "{{name}}" has {{length}} characters, expected at most {MAX_NAME_LENGTH}',
        {"name": "self.metadata.name", "length": "size(self.metadata.name)"},
    )
    yield rule(
        "",
        "!self.metadata.name.contains('.')",
        'metadata.name: "{name}" is no DNS label, expected lower-case letters, digits and hyphens',
        {"name": "self.metadata.name"},
    )


IMMUTABLE = ("model", "data", "checkpoint.uri", "workers.gpusPerWorker")
"""Parts of the spec, all their fields or one, that stay as they were when the run was created."""


def immutable_rules() -> Iterator[Rule]:
    """A rule for each field, so that the sentence can name the one that was changed, with its old and new value."""
    for entry in IMMUTABLE:
        part, _, only = entry.partition(".")
        model: Any = StarCoderRunSpec.model_fields[part].annotation
        assert issubclass(model, BaseModel)
        for field in model.model_fields.values():
            if only in ("", field.alias):
                always_there = field.is_required() or field.default is not None
                yield _immutable(f"spec.{part}", str(field.alias), always_there)


AS_TEXT = {
    "sources": "'%s'.format([{field}.map(s, '%s x %s'.format([s.uri, string(s.weight)]))])",
    "fim": "'rate %s, spmRate %s'.format([string({field}.rate), string({field}.spmRate)])",
}
"""How fields are said that CEL's string() can't."""


def _immutable(path: str, field: str, always_there: bool) -> Rule:
    new, old = f"self.{field}", f"oldSelf.{field}"
    condition = f"{new} == {old}"
    if not always_there:
        condition = f"has({new}) == has({old}) && (!has({new}) || {condition})"
        new, old = (f"(has({f}) ? string({f}) : 'not set')" for f in (new, old))
    elif field in AS_TEXT:
        new, old = (AS_TEXT[field].replace("{field}", f) for f in (new, old))
    sentence = f"{path}.{field}: was {{old}}, found {{new}}; it can't be changed, create another run"
    return rule(path, condition, sentence, {"new": new, "old": old})


def rules() -> tuple[Rule, ...]:
    """All rules, in the order the CRD lists them."""
    return (
        *name_rules(),
        *layout_rules(),
        *hang_rules(),
        *elasticity_rules(),
        *training_rules(),
        *place_rules(),
        *policy_rules(),
        *pod_rules(),
        *immutable_rules(),
    )
