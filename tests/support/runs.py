"""StarCoderRuns to test with: a good one, and what makes it bad with the sentence that has to be said about it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from starcoder_operator.api.v1alpha1 import StarCoderRun, read_run

GOOD: dict[str, Any] = {
    "apiVersion": "starcoder.dev/v1alpha1",
    "kind": "StarCoderRun",
    "metadata": {"name": "good", "namespace": "default"},
    "spec": {
        "model": {"preset": "starcoder-tiny"},
        "data": {
            "tokenizer": "s3://corpus/tokenizer.json",
            "sources": [{"uri": "s3://corpus/a", "weight": 0.3}, {"uri": "s3://corpus/b", "weight": 0.7}],
            "sequenceLength": 256,
        },
        "training": {"iterations": 100, "globalBatchSize": 8, "microBatchSize": 2, "optimizer": {"lr": 0.001}},
        "parallelism": {"tensor": 2, "pipeline": 1},
        "workers": {"replicas": 2, "gpusPerWorker": 2},
        "checkpoint": {"uri": "s3://checkpoints/good"},
    },
}


def changed(**changes: Any) -> dict[str, Any]:
    """GOOD with fields set: `changed(workers__replicas=3, data__sources__0__uri="x")`; `name` is the metadata's."""
    document = copy.deepcopy(GOOD)
    if "name" in changes:
        document["metadata"]["name"] = changes.pop("name")
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = document["spec"]
        for step in parents:
            node = node[int(step)] if isinstance(node, list) else node.setdefault(step, {})
        if isinstance(node, list):
            node[int(last)] = value
        else:
            node[last] = value
    return document


def run(**changes: Any) -> StarCoderRun:
    return read_run(changed(**changes))


@dataclass(frozen=True)
class Bad:
    """Changes that break a rule of several fields, and the sentence that Python and the API server both say."""

    changes: dict[str, Any]
    sentence: str


BAD: dict[str, Bad] = {
    "gpus-not-divisible": Bad(
        {"workers__gpusPerWorker": 3, "parallelism__pipeline": 2},
        "spec.workers: 2 x 3 GPUs = 6 is not divisible by parallelism tensor 2 x pipeline 2 = 4",
    ),
    "layers-by-pipeline": Bad(
        {"workers__replicas": 3, "parallelism__pipeline": 3},
        "spec.parallelism.pipeline: 3 does not divide the model's 4 layers",
    ),
    "overridden-layers-by-pipeline": Bad(
        {"model__layers": 7, "parallelism__pipeline": 2},
        "spec.parallelism.pipeline: 2 does not divide the model's 7 layers",
    ),
    "heads-by-tensor": Bad(
        {"parallelism__tensor": 8, "workers__gpusPerWorker": 8},
        "spec.parallelism.tensor: 8 does not divide the model's 4 attention heads",
    ),
    "ffn-by-tensor": Bad(
        {"model__ffnHiddenSize": 511}, "spec.parallelism.tensor: 2 does not divide the model's ffnHiddenSize 511"
    ),
    "vocabulary-by-tensor": Bad(
        {"model__vocabSize": 2047}, "spec.parallelism.tensor: 2 does not divide the model's vocabSize 2047"
    ),
    "query-groups-by-heads": Bad(
        {"model__queryGroups": 8}, "spec.model.queryGroups: 8 does not divide the model's 4 attention heads"
    ),
    "query-groups-by-tensor": Bad(
        {"model__queryGroups": 3, "model__attentionHeads": 12},
        "spec.parallelism.tensor: 2 is neither a multiple nor a divisor of the model's 3 query groups",
    ),
    "sequence-parallel-alone": Bad(
        {"parallelism__tensor": 1, "parallelism__sequence": True},
        "spec.parallelism.sequence: true needs parallelism tensor above 1, found 1",
    ),
    "sequence-parallel-length": Bad(
        {"parallelism__sequence": True, "data__sequenceLength": 255},
        "spec.data.sequenceLength: 255 is not divisible by parallelism tensor 2, as sequence parallelism needs",
    ),
    "sequence-too-long": Bad(
        {"data__sequenceLength": 2048},
        "spec.data.sequenceLength: 2048 is longer than the model's maxSequenceLength 1024",
    ),
    "batch-not-a-multiple": Bad(
        {"training__globalBatchSize": 9}, "spec.training.globalBatchSize: 9 is not a multiple of microBatchSize 2"
    ),
    "batch-too-small": Bad(
        {"training__globalBatchSize": 2},
        "spec.training.globalBatchSize: 2 is smaller than microBatchSize 2 x data parallelism 2 = 4",
    ),
    "min-replicas-above-replicas": Bad(
        {"elasticity__minReplicas": 3}, "spec.elasticity.minReplicas: 3 is larger than workers.replicas 2"
    ),
    "min-replicas-without-a-layout": Bad(
        {"elasticity__minReplicas": 1, "parallelism__pipeline": 2},
        "spec.elasticity.minReplicas: 1 x 2 GPUs = 2 is not divisible by parallelism tensor 2 x pipeline 2 = 4",
    ),
    "hang-too-soon": Bad(
        {"failurePolicy__hang__iteration": "4s"},
        "spec.failurePolicy.hang.iteration: 4s is too short to tell a hang from work, expected 5s or more",
    ),
    "patience-zero": Bad(
        {"elasticity__patience": "0m0s"}, "spec.elasticity.patience: 0m0s is no time, expected 1s or more"
    ),
    "min-lr-above-lr": Bad(
        {"training__optimizer__minLr": 0.5}, "spec.training.optimizer.minLr: 0.5 is larger than lr 0.001"
    ),
    "min-lr-above-the-preset's": Bad(
        {"training__optimizer": {"minLr": 0.01}}, "spec.training.optimizer.minLr: 0.01 is larger than lr 0.002"
    ),
    "warmup-too-long": Bad(
        {"training__optimizer__warmupIterations": 100},
        "spec.training.optimizer.warmupIterations: 100 is not smaller than training.iterations 100",
    ),
    "tokenizer-not-s3": Bad(
        {"data__tokenizer": "https://x/tokenizer.json"},
        'spec.data.tokenizer: "https://x/tokenizer.json" is no URI of the form s3://bucket/key',
    ),
    "checkpoint-file": Bad(
        {"checkpoint__uri": "file:///tmp/x"},
        'spec.checkpoint.uri: "file:///tmp/x" is no URI of the form s3://bucket/key',
    ),
    "checkpoint-bucket-only": Bad(
        {"checkpoint__uri": "s3://bucket"}, 'spec.checkpoint.uri: "s3://bucket" is no URI of the form s3://bucket/key'
    ),
    "endpoint": Bad(
        {"storage__endpoint": "s3.example.com"},
        'spec.storage.endpoint: "s3.example.com" is no http:// or https:// address',
    ),
    "ca-bundle": Bad(
        {"storage__caBundle": "junk"},
        "spec.storage.caBundle: 4 characters hold no -----BEGIN CERTIFICATE-----; PEM is expected",
    ),
    "gpus-twice": Bad(
        {"workers__resources__limits": {"nvidia.com/gpu": 2}},
        "spec.workers.resources.limits: nvidia.com/gpu is set from gpusPerWorker and must not be named here",
    ),
    "scratch-twice": Bad(
        {"workers__scratch": {"emptyDir": {}, "hostPath": {"path": "/x"}}},
        "spec.workers.scratch: 2 kinds named, expected one of emptyDir, hostPath, ephemeral",
    ),
    "kueue-without-queue": Bad(
        {"scheduling__gang": "Kueue"}, "spec.scheduling.queue: gang Kueue needs the name of a LocalQueue, found none"
    ),
    "queue-without-kueue": Bad(
        {"scheduling__queue": "team"}, "spec.scheduling.queue: team is for gang Kueue, found gang Native"
    ),
    "backoff-shrinks": Bad(
        {"failurePolicy__backoff": {"initial": "10m", "max": "5m"}},
        "spec.failurePolicy.backoff.max: 5m is shorter than initial 10m",
    ),
    "name-too-long": Bad({"name": "a" * 41}, f'metadata.name: "{"a" * 41}" has 41 characters, expected at most 40'),
    "name-with-dot": Bad(
        {"name": "a.b"}, 'metadata.name: "a.b" is no DNS label, expected lower-case letters, digits and hyphens'
    ),
}

BAD_ITEMS: dict[str, Bad] = {
    "source-not-s3": Bad(
        {"data__sources__1__uri": "/data"}, 'spec.data.sources[1].uri: "/data" is no URI of the form s3://bucket/key'
    ),
    "reserved-variable": Bad(
        {"workers__env": [{"name": "A"}, {"name": "STARCODER_RUN", "value": "x"}]},
        "spec.workers.env[1]: STARCODER_RUN is reserved: STARCODER_ variables are the operator's",
    ),
    "variable-said-twice": Bad(
        {"workers__env": [{"name": "A", "value": "x", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}}]},
        "spec.workers.env[0]: A has value and valueFrom, expected one of them",
    ),
    "variable-without-source": Bad(
        {"workers__env": [{"name": "A", "valueFrom": {}}]},
        "spec.workers.env[0].valueFrom: 0 sources named, expected exactly one",
    ),
}
"""Items of lists: the API server names the index before the sentence, which can't."""

OUT_OF_RANGE: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown-preset": ({"model__preset": "starcoder-99b"}, "spec.model.preset", "starcoder-99b"),
    "no-sources": ({"data__sources": []}, "spec.data.sources", "at least 1"),
    "weight-zero": ({"data__sources__0__weight": 0}, "spec.data.sources[0].weight", "greater than 0"),
    "checkpoint-never": ({"checkpoint__everyIterations": 0}, "spec.checkpoint.everyIterations", "greater than 0"),
    "keep-none": ({"checkpoint__keepLast": 0}, "spec.checkpoint.keepLast", "greater than or equal to 1"),
    "no-gpus": ({"workers__gpusPerWorker": 0}, "spec.workers.gpusPerWorker", "greater than or equal to 1"),
    "no-replicas": ({"workers__replicas": 0}, "spec.workers.replicas", "greater than or equal to 1"),
    "min-replicas-none": ({"elasticity__minReplicas": 0}, "spec.elasticity.minReplicas", "greater than or equal to 1"),
    "spares-negative": ({"elasticity__spares": -1}, "spec.elasticity.spares", "greater than or equal to 0"),
    "restarts-negative": (
        {"failurePolicy__maxRestartsWithoutProgress": -1},
        "spec.failurePolicy.maxRestartsWithoutProgress",
        "greater than or equal to 0",
    ),
    "patience-without-unit": ({"elasticity__patience": "60"}, "spec.elasticity.patience", "60"),
    "interval-of-days": ({"elasticity__growBack__interval": "2d"}, "spec.elasticity.growBack.interval", "2d"),
    "no-duration": ({"elasticity__patience": ""}, "spec.elasticity.patience", "at least 2 char"),
    "precision": ({"training__precision": "fp16"}, "spec.training.precision", "fp16"),
    "gang": ({"scheduling__gang": "Magic"}, "spec.scheduling.gang", "Magic"),
    "quantity": ({"workers__sharedMemory": "64 apples"}, "spec.workers.sharedMemory", "64 apples"),
}
"""What types and ranges refuse: changes, the field that is named, and a part of what both sides say."""
