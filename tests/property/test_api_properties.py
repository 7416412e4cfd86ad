"""A spec without problems has a layout and a configuration that the trainer reads."""

from hypothesis import given

from starcoder_operator.api.v1alpha1 import StarCoderRun
from starcoder_operator.domain.layout import layout_of
from starcoder_operator.domain.training_config import training_config
from starcoder_operator.domain.validation import problems
from starcoder_trainer.contract.config import TrainingConfig
from tests.support.random_runs import documents


@given(documents.map(StarCoderRun.model_validate))
def test_an_accepted_spec_fills_every_gpu_and_divides_the_model_evenly(found):
    spec, shape = found.spec, found.spec.model.shape()
    if problems(spec):
        return
    layout = layout_of(spec)
    assert layout.world_size == spec.workers.gpus
    assert shape.layers % layout.pipeline == shape.attention_heads % layout.tensor == 0
    micro_batches = spec.training.global_batch_size / spec.training.micro_batch_size
    assert micro_batches == int(micro_batches) >= layout.data


@given(documents.map(StarCoderRun.model_validate))
def test_a_refused_spec_is_told_with_field_and_value(found):
    for problem in problems(found.spec):
        assert problem.field.startswith("spec.")
        assert problem.value
        assert problem.rule


@given(documents.map(StarCoderRun.model_validate))
def test_the_configuration_survives_the_wire(found):
    config = training_config("r", "n", "u", found.spec)
    assert TrainingConfig.from_json(config.to_json()) == config


@given(documents.map(StarCoderRun.model_validate))
def test_a_run_survives_the_server(found):
    assert StarCoderRun.model_validate(found.to_dict()) == found
