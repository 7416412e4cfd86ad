"""Bad specs are refused with a sentence that names field, value and rule."""

import pytest

from starcoder_operator.api.v1alpha1 import InvalidRun, read_run
from starcoder_operator.domain.validation import name_problems, problems
from tests.support.runs import BAD, BAD_ITEMS, GOOD, OUT_OF_RANGE, changed, run


def said(changes):
    found = run(**changes)
    return [str(v) for v in (*name_problems(found.metadata.name), *problems(found.spec))]


def test_a_good_run_has_no_problems():
    assert said({}) == []


@pytest.mark.parametrize("bad", [*BAD.values(), *BAD_ITEMS.values()], ids=[*BAD, *BAD_ITEMS])
def test_a_bad_run_is_told_why(bad):
    assert bad.sentence in said(bad.changes)


@pytest.mark.parametrize(("changes", "field", "part"), OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_what_is_out_of_range_is_refused_on_reading_with_its_field(changes, field, part):
    with pytest.raises(InvalidRun) as refused:
        read_run(changed(**changes))
    (sentence,) = refused.value.problems
    assert sentence.startswith(f"{field}: ")
    assert part in sentence


def test_a_misspelt_field_is_refused_by_name():
    with pytest.raises(InvalidRun, match=r"spec\.workers\.gpuPerWorker: unknown field"):
        read_run(changed(workers__gpuPerWorker=2))


def test_a_missing_field_is_refused_by_name():
    document = changed()
    del document["spec"]["training"]["iterations"]
    with pytest.raises(InvalidRun, match=r"spec\.training\.iterations: missing"):
        read_run(document)


def test_what_is_no_object_is_refused():
    with pytest.raises(InvalidRun):
        read_run("just text")


def test_files_are_allowed_in_local_runs_alone():
    spec = run(
        data__tokenizer="file:///c/tokenizer.json", data__sources=[{"uri": "file:///c"}], checkpoint__uri="file:///k"
    ).spec
    assert len(problems(spec)) == 3
    assert problems(spec, allow_files=True) == ()


def test_a_relative_file_is_refused_in_local_runs_too():
    (problem,) = problems(run(checkpoint__uri="file:k").spec, allow_files=True)
    assert str(problem) == 'spec.checkpoint.uri: "file:k" is no URI of the form s3://bucket/key or file:///path'


@pytest.mark.parametrize(
    ("patch", "sentence"),
    [
        (
            {"kind": "Pod"},
            "spec.workers.podPatch: kind is no part of a Pod that can be patched, expected metadata or spec",
        ),
        ({"metadata": {"name": "x"}}, "spec.workers.podPatch.metadata: name is the operator's and can't be patched"),
        ({"spec": {"nodeName": "n1"}}, "spec.workers.podPatch.spec: nodeName is the operator's and can't be patched"),
        ({"spec": []}, "spec.workers.podPatch.spec: list found, expected an object"),
        (
            {"metadata": {"labels": {"starcoder.dev/run": "other"}}},
            "spec.workers.podPatch.metadata.labels: starcoder.dev/run is the operator's and can't be patched",
        ),
    ],
)
def test_a_pod_patch_must_not_touch_what_the_operator_finds_pods_by(patch, sentence):
    assert said({"workers__podPatch": patch}) == [sentence]


def test_a_pod_patch_for_rdma_is_welcome():
    patch = {
        "metadata": {"annotations": {"k8s.v1.cni.cncf.io/networks": "rdma"}},
        "spec": {"containers": [{"name": "worker", "resources": {"limits": {"rdma/hca": 8}}}]},
    }
    assert said({"workers__podPatch": patch}) == []


def test_a_variable_named_twice_is_told_once():
    env = [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]
    assert said({"workers__env": env}) == ["spec.workers.env[1]: A is named twice"]


def test_every_problem_is_told_at_once():
    assert len(said({"training__globalBatchSize": 9, "data__sequenceLength": 2048, "checkpoint__uri": "x"})) == 3


def test_the_table_of_bad_runs_starts_from_a_good_one():
    assert changed() == GOOD
