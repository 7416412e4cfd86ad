"""The CustomResourceDefinition and the reference are what the models say."""

import re
import shutil

import pytest
import yaml
from pydantic import BaseModel

from starcoder_operator.api import crdgen
from starcoder_operator.api.crd import COLUMNS, schema
from starcoder_operator.api.structural import SchemaError, structural
from starcoder_operator.api.v1alpha1.base import ApiModel
from starcoder_operator.api.v1alpha1.rules import rules


def nodes(node, path=""):
    yield path, node
    for name, field in node.get("properties", {}).items():
        yield from nodes(field, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if key in node:
            yield from nodes(node[key], f"{path}[]")


def test_the_committed_files_are_what_the_models_generate():
    assert crdgen.differing(crdgen.REPOSITORY) == []


def test_check_fails_where_a_file_differs(tmp_path, capsys):
    assert crdgen.main(["--root", str(tmp_path)]) == 0
    assert crdgen.main(["--check", "--root", str(tmp_path)]) == 0
    (tmp_path / crdgen.CRD_PATH).write_text("old")
    assert crdgen.main(["--check", "--root", str(tmp_path)]) == 1
    assert "crds/starcoder.dev_starcoderruns.yaml: differs" in capsys.readouterr().err


def test_check_fails_where_a_file_is_missing(tmp_path):
    crdgen.main(["--root", str(tmp_path)])
    shutil.rmtree(tmp_path / "docs")
    assert crdgen.main(["--check", "--root", str(tmp_path)]) == 1


def test_the_definition_is_under_100_kilobytes():
    assert len(crdgen.generated()[crdgen.CRD_PATH].encode()) < 100_000


def test_the_definition_is_readable_as_yaml():
    crd = yaml.safe_load(crdgen.generated()[crdgen.CRD_PATH])
    assert crd["spec"]["names"]["shortNames"] == ["scr"]
    assert crd["spec"]["names"]["categories"] == ["all"]
    assert crd["spec"]["versions"][0]["subresources"] == {"status": {}}


def test_every_node_of_the_schema_is_structural():
    for path, node in nodes(schema()):
        assert not {"$ref", "const", "oneOf", "allOf"} & node.keys(), path
        assert not isinstance(node.get("exclusiveMinimum"), float), path
        if not node.get("x-kubernetes-int-or-string"):
            assert node["type"] in {"object", "array", "string", "integer", "number", "boolean"}, path
        if "properties" in node:
            assert "additionalProperties" not in node, path


def test_columns_read_fields_that_are_there():
    fields = {path for path, _ in nodes(schema())} | {".metadata.creationTimestamp"}
    for column in COLUMNS:
        assert column["jsonPath"] in fields


def test_columns_are_the_ones_that_answer_is_it_fine():
    names = [column["name"].upper() for column in COLUMNS]
    assert names[:8] == ["STATE", "WORKERS", "ITERATION", "PROGRESS", "LOSS", "TOK/S", "RESTARTS", "AGE"]
    assert names[8:] == ["CKPT", "GOODPUT", "ETA", "REASON"]
    assert all(column.get("priority") == 1 for column in COLUMNS[8:])


def test_every_rule_says_field_and_value_and_has_a_sentence_for_the_reference():
    for rule in rules():
        assert re.match(r"^(spec|metadata)\.[A-Za-z.\[\]]+: ", rule.fallback), rule.fallback
        assert len(rule.fallback) < 2048
        assert "\n" not in rule.fallback


def test_the_reference_names_every_field_of_the_spec():
    text = crdgen.generated()[crdgen.REFERENCE_PATH]
    for path, _ in nodes(schema()["properties"]["spec"]):
        name = path.split(".")[-1].removesuffix("[]")
        assert not name or f"`{name}`" in text, path


class Unbounded(ApiModel):
    words: tuple[str, ...]


class Union(BaseModel):
    either: int | str


class Tuple(BaseModel):
    pair: tuple[int, str]


class Anything(BaseModel):
    thing: dict


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Unbounded, r"\$\.words: no maxItems"),
        (Union, r"\$\.either: a union of 2 types"),
        (Tuple, r"\$\.pair"),
        (Anything, r"\$\.thing: an object of unknown fields"),
    ],
)
def test_what_a_structural_schema_cannot_say_is_refused(model, message):
    with pytest.raises(SchemaError, match=message):
        structural(model.model_json_schema(), written_by_people=True)
