"""What every part of the API has in common: camelCase on the wire, snake_case in Python, immutable."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema
from pydantic.alias_generators import to_camel

QUANTITY = (
    r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$"
)


class ApiModel(BaseModel):
    """Part of a StarCoderRun.

    Unknown fields are ignored, because what the API server stores may be of a newer version; files that people
    write are read by `read_run`, which refuses them.
    """

    model_config = ConfigDict(
        frozen=True,
        alias_generator=to_camel,
        populate_by_name=True,
        extra="ignore",
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    def to_dict(self) -> dict[str, Any]:
        """As the API server takes it: camelCase keys, JSON types, nothing where the value is None."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


Name = Annotated[str, StringConstraints(min_length=1, max_length=253)]
"""Name of a Kubernetes object."""

Uri = Annotated[str, StringConstraints(min_length=1, max_length=1024)]

Quantity = Annotated[
    str,
    BeforeValidator(lambda v: str(v) if isinstance(v, int) and not isinstance(v, bool) else v),
    StringConstraints(pattern=QUANTITY, max_length=64),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "pattern": QUANTITY, "maxLength": 64}),
]
"""Kubernetes quantity such as `64Gi`, `500m` or `32`."""

Schemaless = Annotated[dict[str, Any], WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True})]
"""Any object; the API server checks it where it is used, not here."""

Labels = Annotated[dict[str, Annotated[str, StringConstraints(max_length=63)]], Field(max_length=64)]

Precision = Literal["bf16", "fp32"]
