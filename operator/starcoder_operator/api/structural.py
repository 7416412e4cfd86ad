"""pydantic's JSON schema to the structural schema that a CustomResourceDefinition takes.

References are inlined and every keyword is mapped or refused: a keyword that is passed over would be a check that
people believe in and nobody makes.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

KEPT = frozenset({
    "description", "enum", "maxItems", "maxLength", "maximum", "minItems", "minLength", "minimum", "pattern",
    "required", "x-kubernetes-int-or-string", "x-kubernetes-list-map-keys", "x-kubernetes-preserve-unknown-fields",
})  # fmt: skip
"""Keywords that mean the same on both sides."""

DROPPED = frozenset({"title", "$defs"})
"""Names of Python classes."""


class SchemaError(ValueError):
    """A model says something that a structural schema can't, or leaves a size open that CEL's cost limit needs."""


def structural(schema: Schema, *, written_by_people: bool) -> Schema:
    """The structural schema of `schema`.

    Args:
        schema: output of `BaseModel.model_json_schema`.
        written_by_people: true for a spec: defaults are kept, and maxLength of every string and maxItems of every list
            are demanded, because the API server estimates the cost of CEL rules from them and refuses a CRD whose
            estimate is too high. False for a status: what a program writes is neither completed nor cut.

    Raises:
        SchemaError: a keyword or a shape has no counterpart, or a bound is missing.
    """
    return _Converter(schema.get("$defs", {}), written_by_people).convert(schema, "$")


def _nothing(value: Any, source: Schema) -> bool:
    """Empty texts, lists and maps as defaults only fill stored objects; rules about such fields ask has()."""
    return value in (None, "", []) or (value == {} and "properties" not in source)


def _without_nulls(value: Any) -> Any:
    """An optional field that is not set is absent in a default too."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


class _Converter:
    def __init__(self, definitions: dict[str, Schema], written_by_people: bool) -> None:
        self.definitions = definitions
        self.written_by_people = written_by_people

    def convert(self, source: Schema, where: str) -> Schema:
        source = self._resolved(source, where)
        out: Schema = {}
        for key, value in source.items():
            match key, value:
                case (("type" | "const" | "items" | "properties" | "additionalProperties" | "maxProperties"), _):
                    pass
                case ("default", _):
                    if self.written_by_people and not _nothing(value, source):
                        out["default"] = _without_nulls(value)
                case ("exclusiveMinimum", _):
                    out |= {"minimum": value, "exclusiveMinimum": True}
                case ("exclusiveMaximum", _):
                    out |= {"maximum": value, "exclusiveMaximum": True}
                case _ if key in KEPT:
                    out[key] = " ".join(value.split()) if key == "description" else value
                case _ if key not in DROPPED:
                    raise SchemaError(f"{where}: keyword {key} has no counterpart in a structural schema")
        out |= self._typed(source, where)
        if "x-kubernetes-list-map-keys" in out:
            out["x-kubernetes-list-type"] = "map"
        return out

    def _resolved(self, source: Schema, where: str) -> Schema:
        """Without $ref and without the null of optional fields, which the API server drops before it validates."""
        if "anyOf" in source:
            options = [option for option in source["anyOf"] if option != {"type": "null"}]
            if len(options) != 1:
                raise SchemaError(f"{where}: a union of {len(options)} types; expected one type or null")
            source = {**options[0], **{k: v for k, v in source.items() if k != "anyOf"}}
        if "$ref" in source:
            name = source["$ref"].removeprefix("#/$defs/")
            return self._resolved({**self.definitions[name], **{k: v for k, v in source.items() if k != "$ref"}}, where)
        return source

    def _typed(self, source: Schema, where: str) -> Schema:
        if source.get("x-kubernetes-int-or-string"):
            return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
        match source.get("type"):
            case "object":
                return self._object(source, where)
            case "array":
                self._must_bound(source, "maxItems", where)
                return {"type": "array", "items": self.convert(source["items"], f"{where}[]")}
            case "string":
                if "const" in source:
                    return {"type": "string", "enum": [source["const"]]}
                if "enum" not in source:
                    self._must_bound(source, "maxLength", where)
                return {"type": "string"}
            case "integer":
                return {"type": "integer", "format": "int64"}
            case "number":
                return {"type": "number"}
            case "boolean":
                return {"type": "boolean"}
            case other:
                raise SchemaError(f"{where}: type {other} has no counterpart in a structural schema")

    def _object(self, source: Schema, where: str) -> Schema:
        if source.get("x-kubernetes-preserve-unknown-fields"):
            return {"type": "object"}
        if "properties" in source:
            properties = {
                name: self.convert(schema, f"{where}.{name}") for name, schema in source["properties"].items()
            }
            return {"type": "object", "properties": properties}
        if "additionalProperties" in source and source["additionalProperties"] is not True:
            self._must_bound(source, "maxProperties", where)
            bound = {"maxProperties": source["maxProperties"]} if "maxProperties" in source else {}
            values = self.convert(source["additionalProperties"], f"{where}.*")
            return {"type": "object", "additionalProperties": values, **bound}
        raise SchemaError(f"{where}: an object of unknown fields; say so with Schemaless")

    def _must_bound(self, source: Schema, keyword: str, where: str) -> None:
        if self.written_by_people and keyword not in source:
            raise SchemaError(f"{where}: no {keyword}; the cost of CEL rules is estimated from it")
