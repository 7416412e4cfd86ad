"""The CustomResourceDefinition of StarCoderRun, as plain objects."""

from __future__ import annotations

from typing import Any

from .structural import Schema, SchemaError, structural
from .v1alpha1 import GROUP, KIND, PLURAL, SHORT_NAME, VERSION, StarCoderRun, StarCoderRunSpec, StarCoderRunStatus
from .v1alpha1.rules import Rule, rules

COLUMNS: tuple[dict[str, Any], ...] = (
    {"name": "State", "type": "string", "jsonPath": ".status.state"},
    {"name": "Workers", "type": "string", "jsonPath": ".status.workers.summary"},
    {"name": "Iteration", "type": "integer", "jsonPath": ".status.iteration"},
    {"name": "Progress", "type": "string", "jsonPath": ".status.progress"},
    {"name": "Loss", "type": "string", "jsonPath": ".status.loss"},
    {"name": "Tok/s", "type": "integer", "jsonPath": ".status.tokensPerSecond"},
    {"name": "Restarts", "type": "integer", "jsonPath": ".status.restarts.total"},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
    {"name": "Ckpt", "type": "integer", "jsonPath": ".status.checkpoint.iteration", "priority": 1},
    {"name": "Goodput", "type": "number", "jsonPath": ".status.goodput.ratio", "priority": 1},
    {"name": "ETA", "type": "string", "jsonPath": ".status.eta", "priority": 1},
    {"name": "Reason", "type": "string", "jsonPath": ".status.reason", "priority": 1},
)
"""What `kubectl get scr` shows; priority 1 is shown by `-o wide` alone."""


def schema() -> Schema:
    """openAPIV3Schema of the version."""
    spec = structural(StarCoderRunSpec.model_json_schema(), written_by_people=True)
    status = structural(StarCoderRunStatus.model_json_schema(), written_by_people=False)
    root: Schema = {
        "description": StarCoderRun.__doc__,
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
    }
    for rule in rules():
        _attach(root, rule)
    return _ordered(root)


def _attach(root: Schema, rule: Rule) -> None:
    node = root
    for step in rule.path.split(".") if rule.path else ():
        name = step.removesuffix("[]")
        if name not in node.get("properties", {}):
            raise SchemaError(f"rule at {rule.path}: no field {name}")
        node = node["properties"][name]
        if step.endswith("[]"):
            node = node["items"]
    node.setdefault("x-kubernetes-validations", []).append(
        {"rule": rule.cel, "message": rule.fallback, "messageExpression": rule.message}
    )


FIRST = ("description", "type", "format", "default", "enum")
LAST = ("x-kubernetes-validations", "items", "properties", "additionalProperties")


def _ordered(node: Schema) -> Schema:
    """Description and type first, children last, so that the file reads from the top."""
    middle = [key for key in node if key not in (*FIRST, *LAST)]
    out = {key: node[key] for key in (*FIRST, *middle, *LAST) if key in node}
    if "properties" in node:
        out["properties"] = {name: _ordered(field) for name, field in node["properties"].items()}
    for key in ("items", "additionalProperties"):
        if key in node:
            out[key] = _ordered(node[key])
    return out


def custom_resource_definition() -> dict[str, Any]:
    """The whole manifest."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": [SHORT_NAME],
                "categories": ["all"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [dict(column) for column in COLUMNS],
                    "schema": {"openAPIV3Schema": schema()},
                }
            ],
        },
    }
