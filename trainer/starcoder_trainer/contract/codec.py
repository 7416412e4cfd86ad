"""Frozen dataclasses to JSON objects and back: camelCase keys, unknown keys ignored, wrong types refused.

Reading is strict about types because what is read comes from outside (a ConfigMap, an object in S3).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Hashable
from typing import Any, Self, get_args, get_origin


class ContractError(ValueError):
    """A document of the contract could not be read; the message names the field, what was found and expected."""


def camel(name: str) -> str:
    """`consumed_samples` -> `consumedSamples`."""
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


@functools.cache
def _fields(cls: Hashable) -> tuple[tuple[str, str, Any, bool], ...]:
    """(python name, JSON key, type, required) of each field."""
    assert isinstance(cls, type)
    assert dataclasses.is_dataclass(cls)
    hints = typing.get_type_hints(cls)
    return tuple(
        (
            f.name,
            camel(f.name),
            hints[f.name],
            f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING,
        )
        for f in dataclasses.fields(cls)
    )


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key: _encode(getattr(value, name)) for name, key, _, _ in _fields(type(value))}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _encode(v) for k, v in value.items()}
    return value


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        (only,) = (o for o in options if o is not type(None))
        return _decode(only, value, where)
    if origin is tuple:
        item, _ = get_args(hint)
        if not isinstance(value, list):
            raise ContractError(f"{where}: found {type(value).__name__}, expected a list")
        return tuple(_decode(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        _, item = get_args(hint)
        if not isinstance(value, dict):
            raise ContractError(f"{where}: found {type(value).__name__}, expected an object")
        return {k: _decode(item, v, f"{where}.{k}") for k, v in value.items()}
    if origin is typing.Literal:
        if value not in get_args(hint):
            raise ContractError(f"{where}: found {value!r}, expected one of {', '.join(map(str, get_args(hint)))}")
        return value
    if dataclasses.is_dataclass(hint):
        return decode(typing.cast(type[Any], hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    raise ContractError(f"{where}: found {value!r}, expected {hint.__name__}")


def decode[T](cls: type[T], value: Any, where: str = "$") -> T:
    """A dataclass from a parsed JSON object.

    Raises:
        ContractError: a required field is missing or a value has another type.
    """
    if not isinstance(value, dict):
        raise ContractError(f"{where}: found {type(value).__name__}, expected an object ({cls.__name__})")
    out = {}
    for name, key, hint, required in _fields(typing.cast(Hashable, cls)):
        if key in value:
            out[name] = _decode(hint, value[key], f"{where}.{key}")
        elif required:
            raise ContractError(f"{where}.{key}: missing, expected by {cls.__name__}")
    return cls(**out)


class Document:
    """Mixin of the contract's dataclasses."""

    def to_dict(self) -> dict[str, Any]:
        return typing.cast(dict[str, Any], _encode(self))

    def to_json(self) -> str:
        """Canonical: sorted keys, no spaces, so that equal documents are equal bytes."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_dict(cls, value: Any) -> Self:
        return decode(cls, value)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Raises ContractError where `text` is no JSON or not this document."""
        try:
            return cls.from_dict(json.loads(text))
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise ContractError(f"{cls.__name__}: not JSON ({e})") from e
