"""What every part of the API has in common: camelCase on the wire, snake_case in Python, immutable."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    StringConstraints,
    WithJsonSchema,
)
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema, core_schema

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

DURATION = r"^([0-9]{1,6}h)?([0-9]{1,6}m)?([0-9]{1,6}s)?$"


class Duration(str):
    """Length of time in whole hours, minutes and seconds, such as `30s`, `5m` or `1h30m`; CEL's duration() reads it."""

    __slots__ = ()

    @property
    def seconds(self) -> int:
        found = re.fullmatch(DURATION, self)
        assert found, f"{self!r} was never validated"
        hours, minutes, seconds = (int(part[:-1]) if part else 0 for part in found.groups())
        return 3600 * hours + 60 * minutes + seconds

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        text = core_schema.str_schema(pattern=DURATION, min_length=2, max_length=21)
        plain = core_schema.plain_serializer_function_ser_schema(str.__str__, return_schema=core_schema.str_schema())
        return core_schema.no_info_after_validator_function(cls, text, serialization=plain)


Schemaless = Annotated[dict[str, Any], WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True})]
"""Any object; the API server checks it where it is used, not here."""

Labels = Annotated[dict[str, Annotated[str, StringConstraints(max_length=63)]], Field(max_length=64)]

Precision = Literal["bf16", "fp32"]
