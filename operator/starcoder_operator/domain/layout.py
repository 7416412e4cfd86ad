"""How the GPUs of a run are divided among tensor, pipeline and data parallelism."""

from __future__ import annotations

from starcoder_operator.api.v1alpha1 import StarCoderRunSpec
from starcoder_trainer.contract.assignment import Layout


def model_parallel(spec: StarCoderRunSpec) -> int:
    """GPUs that hold one copy of the model."""
    return spec.parallelism.tensor * spec.parallelism.pipeline


def data_parallel(spec: StarCoderRunSpec) -> int:
    """Copies of the model; rounded down where the GPUs do not divide, which `validation.problems` refuses."""
    return spec.workers.gpus // model_parallel(spec)


def layout_of(spec: StarCoderRunSpec, members: int | None = None) -> Layout:
    """Layout of a gang of so many members, of all by default.

    Raises:
        ValueError: the GPUs are not divisible by tensor x pipeline.
    """
    parallelism = spec.parallelism
    gpus = (spec.workers.replicas if members is None else members) * spec.workers.gpus_per_worker
    if gpus % model_parallel(spec):
        raise ValueError(
            f"spec.workers: {gpus} GPUs, expected a multiple of tensor {parallelism.tensor} x pipeline "
            f"{parallelism.pipeline}; change spec.workers or spec.parallelism"
        )
    return Layout(
        tensor=parallelism.tensor,
        pipeline=parallelism.pipeline,
        data=gpus // model_parallel(spec),
        sequence=parallelism.sequence,
    )
