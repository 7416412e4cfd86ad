"""GPUs are divided among tensor, pipeline and data parallelism."""

import pytest

from starcoder_operator.domain.layout import data_parallel, layout_of, model_parallel
from starcoder_trainer.contract.assignment import Layout
from tests.support.runs import run


def test_what_tensor_and_pipeline_leave_is_data_parallel():
    spec = run(workers__replicas=64, workers__gpusPerWorker=8, parallelism={"tensor": 4, "pipeline": 4}).spec
    assert layout_of(spec) == Layout(tensor=4, pipeline=4, data=32)
    assert (model_parallel(spec), data_parallel(spec)) == (16, 32)


def test_the_world_is_all_gpus():
    spec = run().spec
    assert layout_of(spec).world_size == spec.workers.gpus == 4


def test_sequence_parallelism_is_carried():
    assert layout_of(run(parallelism={"tensor": 2, "sequence": True}).spec).sequence


def test_gpus_that_do_not_divide_have_no_layout():
    with pytest.raises(ValueError, match="6 GPUs, expected a multiple of tensor 2 x pipeline 2"):
        layout_of(run(workers__gpusPerWorker=3, parallelism__pipeline=2).spec)
