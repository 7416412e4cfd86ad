"""The models read what the API server stores and write what it takes."""

import math

import pytest
import yaml
from pydantic import ValidationError

from starcoder_operator.api.v1alpha1 import (
    PRESETS,
    Condition,
    LayoutStatus,
    StarCoderRun,
    StarCoderRunSpec,
    StarCoderRunStatus,
    WorkersStatus,
    loss_text,
    progress_text,
    read_run,
)
from starcoder_operator.domain.validation import name_problems, problems
from tests.support.examples import EXAMPLES, LOCAL
from tests.support.runs import GOOD, changed, run


def test_what_is_written_is_read_again():
    found = run()
    assert StarCoderRun.model_validate(found.to_dict()) == found


def test_keys_are_camel_case_and_what_is_not_set_is_absent():
    workers = run().to_dict()["spec"]["workers"]
    assert workers["gpusPerWorker"] == 2
    assert "runtimeClassName" not in workers


def test_fields_of_a_newer_version_are_ignored_when_read_from_the_server():
    document = changed(workers__sparkle=True)
    assert StarCoderRun.model_validate(document).spec == run().spec


def test_a_run_without_status_is_pending():
    assert StarCoderRun.model_validate(GOOD).status == StarCoderRunStatus()


def test_a_spec_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        run().spec.suspend = True  # type: ignore[misc]


def test_quantities_may_be_numbers():
    resources = run(workers__resources={"requests": {"cpu": 32, "memory": "400Gi"}}).spec.workers.resources
    assert resources.requests == {"cpu": "32", "memory": "400Gi"}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("5m", 300), ("1h30m", 5400), ("2h0m1s", 7201), ("0s", 0), ("999999h", 3599996400)],
)
def test_a_duration_says_its_seconds_and_is_written_as_it_was_said(text, seconds):
    patience = run(elasticity__patience=text).spec.elasticity.patience
    assert patience.seconds == seconds
    assert run(elasticity__patience=text).to_dict()["spec"]["elasticity"]["patience"] == text


def test_a_run_does_not_shrink_unless_it_is_told_how_far():
    elasticity = run().spec.elasticity
    assert (elasticity.min_replicas, elasticity.spares) == (None, 0)
    assert (elasticity.patience.seconds, elasticity.grow_back.interval.seconds) == (60, 1800)


def test_defaults_are_the_documented_ones():
    spec = run().spec
    assert spec.checkpoint.every_iterations == 250
    assert (spec.checkpoint.keep_last, spec.checkpoint.resume) == (3, "Own")
    assert spec.workers.termination_grace_period_seconds == 300
    assert spec.workers.scratch.empty_dir is not None
    assert spec.workers.gpu_resource == "nvidia.com/gpu"
    assert spec.scheduling.gang == "Native"
    assert spec.failure_policy.max_restarts_without_progress == 3
    assert not spec.suspend


def parameters(shape):
    """Weights and biases: tied embeddings, learned positions, multi-query attention, two norms a layer, a last one."""
    h, ffn, kv = shape.hidden_size, shape.ffn_hidden_size, 2 * shape.query_groups * shape.head_dim
    q = shape.attention_heads * shape.head_dim
    attention = h * (q + kv) + (q + kv) + q * h + h
    feed_forward = 2 * h * ffn + ffn + h
    layer = attention + feed_forward + 4 * h
    return (shape.vocab_size + shape.max_sequence_length) * h + shape.layers * layer + 2 * h


@pytest.mark.parametrize(
    ("preset", "billions"),
    [("starcoder-15b", 15.517), ("starcoder-7b", 7.327), ("starcoder-3b", 3.043), ("starcoder-1b", 1.137)],
)
def test_a_preset_has_as_many_parameters_as_the_published_model(preset, billions):
    assert round(parameters(PRESETS[preset].shape) / 1e9, 3) == billions


def test_the_tiny_preset_has_about_a_million_parameters():
    assert 0.9e6 < parameters(PRESETS["starcoder-tiny"].shape) < 1.5e6


@pytest.mark.parametrize(
    ("loss", "text"), [(1.23456, "1.2346"), (12.0, "12.0000"), (math.nan, "nan"), (math.inf, "inf")]
)
def test_a_loss_is_shown_with_every_digit_or_by_name(loss, text):
    assert loss_text(loss) == text


@pytest.mark.parametrize(("iteration", "text"), [(0, "0%"), (99, "41%"), (239, "99%"), (240, "100%")])
def test_progress_is_whole_only_when_the_run_is(iteration, text):
    assert progress_text(iteration, 240) == text


def test_summaries_say_the_numbers_beside_them():
    assert WorkersStatus.of(1, 2).summary == "1/2"
    assert LayoutStatus.of(4, 4, 32).summary == "TP4 x PP4 x DP32"


def test_a_status_survives_the_server():
    condition = Condition(type="Accepted", status="True", reason="Valid", last_transition_time="2026-01-01T00:00:00Z")
    status = StarCoderRunStatus(
        state="Running",
        conditions=(condition,),
        tokens_per_second_per_gpu=9,
        layout=LayoutStatus.of(1, 1, 1),
        loss=loss_text(math.nan),
    )
    document = status.to_dict()
    assert document["tokensPerSecondPerGPU"] == 9
    assert StarCoderRunStatus.model_validate(document) == status
    assert status.condition("Accepted") == condition
    assert status.condition("Complete") is None


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_an_example_is_a_run_that_can_be_trained(path):
    example = read_run(yaml.safe_load(path.read_text()))
    assert name_problems(example.metadata.name) == ()
    assert problems(example.spec) == ()


def test_the_local_example_can_be_trained_here_and_nowhere_else():
    example = read_run(yaml.safe_load(LOCAL.read_text()))
    assert problems(example.spec, allow_files=True) == ()
    assert problems(example.spec)


def test_every_field_is_described():
    def undescribed(model, where):
        for name, field in model.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                assert inner.__doc__ or field.description, f"{where}.{name}"
                yield from undescribed(inner, f"{where}.{name}")
            elif not field.description:
                yield f"{where}.{name}"

    without = [*undescribed(StarCoderRunSpec, "spec"), *undescribed(StarCoderRunStatus, "status")]
    assert [
        field for field in without if field.split(".")[-1] not in ("affinity", "layout", "checkpoint", "last_failure")
    ] == []
