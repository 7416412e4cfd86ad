"""A real API server takes the definition, completes specs as the models do, and refuses what the rules refuse."""

from __future__ import annotations

import copy
import json
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from kubernetes import client, config

from starcoder_operator.api import crdgen
from starcoder_operator.api.v1alpha1 import (
    GROUP,
    PLURAL,
    VERSION,
    CheckpointStatus,
    Restarts,
    StarCoderRun,
    StarCoderRunStatus,
    WorkersStatus,
    loss_text,
)
from starcoder_operator.api.v1alpha1.goodput import Goodput
from starcoder_operator.domain.validation import problems
from tests.support.examples import EXAMPLES, LOCAL
from tests.support.random_runs import documents
from tests.support.runs import BAD, BAD_ITEMS, GOOD, OUT_OF_RANGE, changed, run

pytestmark = pytest.mark.integration

NAMESPACE = f"crd-rules-{uuid.uuid4().hex[:8]}"
"""New each time: without a controller manager a deleted namespace never quite goes."""
CRD = yaml.safe_load((crdgen.REPOSITORY / crdgen.CRD_PATH).read_text())
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"


def until(condition: Any, what: str, seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


class Server:
    """StarCoderRuns of one namespace, as kubectl sees them."""

    def __init__(self, api: client.ApiClient) -> None:
        self.api = api
        self.extensions = client.ApiextensionsV1Api(api)
        self.runs = client.CustomObjectsApi(api)

    def install(self) -> dict[str, str]:
        """Applies the definition; headers of the answer."""
        name = CRD["metadata"]["name"]
        _, _, headers = self.extensions.patch_custom_resource_definition_with_http_info(
            name, CRD, field_manager="test", force=True, field_validation="Strict", _content_type=APPLY
        )
        until(lambda: self._established(name), f"{name} is established")
        until(self._served, "StarCoderRuns are served")
        return {key.lower(): value for key, value in headers.items()}

    def _established(self, name: str) -> bool:
        conditions = self.extensions.read_custom_resource_definition(name).status.conditions or []
        return any(c.type == "Established" and c.status == "True" for c in conditions)

    def _served(self) -> bool:
        try:
            self.runs.list_namespaced_custom_object(GROUP, VERSION, NAMESPACE, PLURAL)
        except client.ApiException as e:
            if e.status == 404:
                return False
            raise
        return True

    def create(self, document: dict[str, Any], *, dry: bool = True) -> dict[str, Any]:
        document = copy.deepcopy(document)
        document["metadata"]["namespace"] = NAMESPACE
        more = {"dry_run": "All"} if dry else {}
        return self.runs.create_namespaced_custom_object(
            GROUP, VERSION, NAMESPACE, PLURAL, document, field_validation="Strict", **more
        )

    def refusal(self, document: dict[str, Any]) -> str:
        with pytest.raises(client.ApiException) as refused:
            self.create(document)
        return message_of(refused.value)

    def change(self, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        return self.runs.patch_namespaced_custom_object(
            GROUP, VERSION, NAMESPACE, PLURAL, name, {"spec": spec}, _content_type=MERGE
        )

    def write_status(self, name: str, status: StarCoderRunStatus) -> dict[str, Any]:
        body = {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": "StarCoderRun",
            "metadata": {"name": name},
            "status": status.to_dict(),
        }
        return self.runs.patch_namespaced_custom_object_status(
            GROUP, VERSION, NAMESPACE, PLURAL, name, body, field_manager="test", force=True, _content_type=APPLY
        )

    def get(self, path: str, accept: str = "application/json") -> dict[str, Any]:
        answer = self.api.call_api(
            "GET", f"{self.api.configuration.host}{path}", header_params={"Accept": accept, **self.token()}
        )
        answer.read()
        return dict(json.loads(answer.data))

    def token(self) -> dict[str, str]:
        headers: dict[str, str] = {}
        self.api.update_params_for_auth(headers, [], ["BearerToken"], "", "GET", None)
        return headers

    def table(self, name: str) -> dict[str, tuple[Any, int]]:
        """Column to (cell, priority), as `kubectl get` gets them."""
        found = self.get(
            f"/apis/{GROUP}/{VERSION}/namespaces/{NAMESPACE}/{PLURAL}/{name}",
            "application/json;as=Table;g=meta.k8s.io;v=v1",
        )
        (row,) = found["rows"]
        columns = found["columnDefinitions"]
        return {c["name"].upper(): (cell, c["priority"]) for c, cell in zip(columns, row["cells"], strict=True)}


def message_of(error: client.ApiException) -> str:
    assert error.status in (400, 422), error
    return str(json.loads(error.body)["message"])


@pytest.fixture(scope="module")
def server(kubeconfig: Path) -> Iterator[Server]:
    with config.new_client_from_config(str(kubeconfig)) as api:
        core = client.CoreV1Api(api)
        core.create_namespace({"metadata": {"name": NAMESPACE}})
        found = Server(api)
        found.install()
        yield found
        found.runs.delete_collection_namespaced_custom_object(GROUP, VERSION, NAMESPACE, PLURAL)
        core.delete_namespace(NAMESPACE)


@pytest.fixture
def stored(server: Server, request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of a good run that the server has."""
    name = "run-" + re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[-30:].strip("-")
    server.create(changed(name=name, model__layers=4), dry=False)
    yield name
    server.runs.delete_namespaced_custom_object(GROUP, VERSION, NAMESPACE, PLURAL, name)


def test_the_definition_is_taken_without_a_warning(server):
    assert "warning" not in server.install()


def test_kubectl_finds_runs_by_their_short_name_and_among_all(server):
    (resource,) = (r for r in server.get(f"/apis/{GROUP}/{VERSION}")["resources"] if r["name"] == PLURAL)
    assert resource["shortNames"] == ["scr"]
    assert resource["categories"] == ["all"]


def test_the_server_completes_a_spec_as_the_models_do(server):
    assert StarCoderRun.model_validate(server.create(GOOD)).spec == run().spec


def test_what_the_models_write_is_taken_as_it_is(server):
    document = {**GOOD, "spec": run().spec.to_dict()}
    assert StarCoderRun.model_validate(server.create(document)).spec == run().spec


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_the_server_says_the_sentence_of_a_broken_rule(server, bad):
    assert bad.sentence in server.refusal(changed(**bad.changes))


@pytest.mark.parametrize("bad", BAD_ITEMS.values(), ids=BAD_ITEMS)
def test_the_server_says_which_item_breaks_a_rule(server, bad):
    said = server.refusal(changed(**bad.changes))
    field, _, rest = bad.sentence.partition(": ")
    assert f"{field}: Invalid value" in said
    assert rest in said


@pytest.mark.parametrize(("changes", "field", "_"), OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_the_server_names_the_field_that_is_out_of_range(server, changes, field, _):
    assert field in server.refusal(changed(**changes))


def test_a_variable_named_twice_is_refused(server):
    env = [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]
    assert "spec.workers.env[1]: Duplicate value" in server.refusal(changed(workers__env=env))


def test_a_misspelt_field_is_refused_by_name(server):
    assert 'unknown field "spec.workers.gpuPerWorker"' in server.refusal(changed(workers__gpuPerWorker=2))


def test_a_run_without_a_spec_is_refused(server):
    assert "spec: Required value" in server.refusal({k: v for k, v in GOOD.items() if k != "spec"})


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=documents)
def test_the_server_refuses_exactly_what_python_refuses(server, document):
    found = problems(StarCoderRun.model_validate(document).spec)
    if not found:
        server.create(document)
        return
    said = server.refusal(document)
    for problem in found:
        assert str(problem) in said


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"model": {"preset": "starcoder-1b"}}, "spec.model.preset: was starcoder-tiny, found starcoder-1b"),
        ({"model": {"layers": 8}}, "spec.model.layers: was 4, found 8"),
        ({"model": {"layers": None}}, "spec.model.layers: was 4, found not set"),
        ({"model": {"dropout": 0.2}}, "spec.model.dropout: was not set, found 0.2"),
        ({"data": {"tokenizer": "s3://x/y"}}, "spec.data.tokenizer: was s3://corpus/tokenizer.json, found s3://x/y"),
        (
            {"data": {"sources": [{"uri": "s3://corpus/c"}]}},
            'spec.data.sources: was ["s3://corpus/a x 0.3", "s3://corpus/b x 0.7"], found ["s3://corpus/c x 1"]',
        ),
        ({"data": {"fim": {"rate": 0.1}}}, "spec.data.fim: was rate 0.5, spmRate 0.5, found rate 0.1, spmRate 0.5"),
        ({"data": {"seed": 7}}, "spec.data.seed: was 42, found 7"),
        ({"data": {"sequenceLength": 128}}, "spec.data.sequenceLength: was 256, found 128"),
        ({"checkpoint": {"uri": "s3://x/y"}}, "spec.checkpoint.uri: was s3://checkpoints/good, found s3://x/y"),
        ({"workers": {"gpusPerWorker": 4}}, "spec.workers.gpusPerWorker: was 2, found 4"),
    ],
    ids=lambda v: v.split(": ")[0] if isinstance(v, str) else "",
)
def test_what_defines_a_run_cannot_be_changed(server, stored, spec, sentence):
    with pytest.raises(client.ApiException) as refused:
        server.change(stored, spec)
    assert f"{sentence}; it can't be changed, create another run" in message_of(refused.value)


@pytest.mark.parametrize(
    "spec",
    [
        {"suspend": True},
        {"training": {"iterations": 500}},
        {"checkpoint": {"everyIterations": 10, "keepLast": 5, "resume": "Adopt"}},
        {"workers": {"image": "registry.example.com/trainer:2", "podPatch": {"spec": {"hostIPC": True}}}},
        {"storage": {"endpoint": "https://s3.example.com", "credentialsSecret": "other"}},
        {"failurePolicy": {"maxRestartsWithoutProgress": 10}},
        {"workers": {"replicas": 4}},
        {"parallelism": {"tensor": 1, "pipeline": 2}},
        {"elasticity": {"minReplicas": 1, "spares": 1, "patience": "1m", "growBack": {"interval": "0s"}}},
    ],
    ids=lambda spec: (
        "-".join([*spec, *next(iter(spec.values()))]) if isinstance(next(iter(spec.values())), dict) else "suspend"
    ),
)
def test_the_rest_can_be_changed_while_it_runs(server, stored, spec):
    assert server.change(stored, spec)["metadata"]["generation"] == 2


def test_a_pod_patch_is_stored_as_it_was_said(server):
    patch = {"spec": {"containers": [{"name": "worker", "resources": {"limits": {"rdma/hca": 8}}}]}}
    assert server.create(changed(workers__podPatch=patch))["spec"]["workers"]["podPatch"] == patch


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_an_example_is_taken(server, path):
    server.create(yaml.safe_load(path.read_text()))


def test_files_are_refused_on_a_cluster(server):
    said = server.refusal(yaml.safe_load(LOCAL.read_text()))
    assert 'spec.checkpoint.uri: "file:///tmp/checkpoints" is no URI of the form s3://bucket/key' in said


def test_the_columns_answer_is_it_fine(server, stored):
    status = StarCoderRunStatus(
        state="Recovering",
        reason="NodeLost",
        workers=WorkersStatus.of(1, 2),
        iteration=42,
        progress="42%",
        loss=loss_text(float("nan")),
        tokens_per_second=4_190_000,
        restarts=Restarts(total=2, by_cause={"NodeLost": 2}),
        eta="2026-12-24T18:00:00Z",
        goodput=Goodput(since="2026-12-24T16:00:00Z", as_of="2026-12-24T17:00:00Z", ratio=0.9312),
        checkpoint=CheckpointStatus(
            iteration=40, uri="s3://k/a1/step-00000040", digest="sha256:00", committed_at="2026-12-24T17:00:00Z"
        ),
    )
    server.write_status(stored, status)
    table = server.table(stored)
    always = {name: cell for name, (cell, priority) in table.items() if priority == 0}
    assert always.pop("NAME") == stored
    assert always.pop("AGE")
    assert always == {
        "STATE": "Recovering",
        "WORKERS": "1/2",
        "ITERATION": 42,
        "PROGRESS": "42%",
        "LOSS": "nan",
        "TOK/S": 4_190_000,
        "RESTARTS": 2,
    }
    assert {name: cell for name, (cell, priority) in table.items() if priority == 1} == {
        "CKPT": 40,
        "GOODPUT": 0.9312,
        "ETA": "2026-12-24T18:00:00Z",
        "REASON": "NodeLost",
    }


def test_a_status_comes_back_as_it_was_written(server, stored):
    status = StarCoderRunStatus(state="Failed", message="x" * 5000, tokens_per_second_per_gpu=3, incarnations=(-1, 4))
    assert StarCoderRun.model_validate(server.write_status(stored, status)).status == status


def test_a_status_is_no_change_of_the_spec(server, stored):
    assert server.write_status(stored, StarCoderRunStatus(state="Running"))["metadata"]["generation"] == 1
