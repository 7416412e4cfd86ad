"""How many members train, for every number that is left of a small gang."""

from __future__ import annotations

import functools
import itertools

import pytest

from starcoder_operator.api.v1alpha1 import StarCoderRunSpec, StarCoderRunStatus
from starcoder_operator.domain.elasticity import largest, members_ever, pool_size, settled, whole_copies
from starcoder_operator.domain.layout import layout_of, model_parallel
from starcoder_operator.domain.validation import problems
from tests.support.runs import run


@functools.cache
def specs() -> list[StarCoderRunSpec]:
    """All that are valid of gangs of up to 5 Pods."""
    found = []
    for replicas, gpus, tensor, pipeline in itertools.product(range(1, 6), (1, 2), (1, 2), (1, 2, 4)):
        for least in (None, *range(1, replicas + 1)):
            spec = run(
                workers__replicas=replicas,
                workers__gpusPerWorker=gpus,
                parallelism={"tensor": tensor, "pipeline": pipeline},
                training__globalBatchSize=96,
                elasticity={"minReplicas": least} if least else {},
            ).spec
            found += [] if problems(spec) else [spec]
    return found


def test_what_is_left_trains_in_whole_copies_of_the_model_as_many_as_there_are_and_no_fewer_than_the_least() -> None:
    for spec in specs():
        replicas = spec.workers.replicas
        least = spec.elasticity.min_replicas or replicas
        fits = [n for n in range(least, replicas + 1) if n * spec.workers.gpus_per_worker % model_parallel(spec) == 0]
        for live in range(replicas + 3):
            expected = max((n for n in fits if n <= live), default=0)
            assert largest(spec, live) == expected, (spec.workers, spec.parallelism, spec.elasticity, live)
            if expected:
                assert layout_of(spec, expected).world_size == expected * spec.workers.gpus_per_worker


def test_an_attempt_after_another_takes_as_many_again_or_all_where_that_is_no_number_to_train_with() -> None:
    for spec in specs():
        for before in range(spec.workers.replicas + 3):
            assert settled(spec, before) == (before if before and largest(spec, before) == before else
                                             spec.workers.replicas)  # fmt: skip


@pytest.mark.parametrize(
    ("gpus", "tensor", "pipeline", "pods"), [(8, 4, 4, 2), (8, 4, 1, 1), (1, 2, 2, 4), (4, 2, 4, 2), (2, 1, 1, 1)]
)
def test_pods_that_hold_a_whole_copy_between_them(gpus: int, tensor: int, pipeline: int, pods: int) -> None:
    spec = run(workers__gpusPerWorker=gpus, parallelism={"tensor": tensor, "pipeline": pipeline}).spec
    assert whole_copies(spec) == pods


def test_members_that_were_given_up_are_still_known() -> None:
    spec = run(elasticity__spares=1).spec
    assert pool_size(spec) == 3
    assert members_ever(spec, StarCoderRunStatus()) == 3
    assert members_ever(spec, StarCoderRunStatus(incarnations=(0, 0, 0, 0, 1))) == 5
