"""The object itself."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError

from .base import ApiModel
from .data import Data
from .elasticity import Elasticity
from .failure_policy import FailurePolicy
from .model import Model
from .status import StarCoderRunStatus
from .storage import Checkpoint, Scheduling, Storage
from .training import Parallelism, Training
from .workers import Workers

GROUP = "starcoder.dev"
VERSION = "v1alpha1"
KIND = "StarCoderRun"
PLURAL = "starcoderruns"
SHORT_NAME = "scr"


class StarCoderRunSpec(ApiModel):
    """What to train, on what, with how many GPUs."""

    model: Model
    data: Data
    training: Training
    parallelism: Parallelism = Parallelism()
    workers: Workers
    elasticity: Elasticity = Elasticity()
    scheduling: Scheduling = Scheduling()
    checkpoint: Checkpoint
    storage: Storage = Storage()
    failure_policy: FailurePolicy = FailurePolicy()
    suspend: bool = False
    """Stop the workers and give the GPUs back; false again resumes at the newest verified checkpoint."""


class ObjectMeta(ApiModel):
    """The part of metadata that is read."""

    name: str
    namespace: str = "default"
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    creation_timestamp: str = ""
    deletion_timestamp: str | None = None
    labels: dict[str, str] = Field(default={})
    annotations: dict[str, str] = Field(default={})


class StarCoderRun(ApiModel):
    """Trains one StarCoder-like code model to its last iteration."""

    api_version: Literal["starcoder.dev/v1alpha1"] = "starcoder.dev/v1alpha1"
    kind: Literal["StarCoderRun"] = "StarCoderRun"
    metadata: ObjectMeta
    spec: StarCoderRunSpec
    status: StarCoderRunStatus = Field(default_factory=StarCoderRunStatus)


class InvalidRun(ValueError):
    """A document is no StarCoderRun; `problems` are sentences that name field, value and rule."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def read_run(document: Any) -> StarCoderRun:
    """A run from a document that a person wrote, parsed from YAML or JSON; unknown fields are refused.

    Raises:
        InvalidRun: a field is unknown, missing, of another type or out of its range.
    """
    try:
        return StarCoderRun.model_validate(document, extra="forbid", by_alias=True, by_name=False)
    except ValidationError as e:
        errors = [dict(error) for error in e.errors(include_url=False)]
        raise InvalidRun(
            tuple(_sentence(error) for error in errors if not _follows_from_another(error, errors))
        ) from None


def _follows_from_another(error: dict[str, Any], errors: list[dict[str, Any]]) -> bool:
    """A list is reported as too short when its only item is invalid; the item's own error says it better."""
    loc = error["loc"]
    return error["type"] == "too_short" and any(o["loc"][: len(loc)] == loc and o["loc"] != loc for o in errors)


def _sentence(error: dict[str, Any]) -> str:
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error["loc"]).lstrip(".") or "document"
    match error["type"]:
        case "extra_forbidden":
            return f"{where}: unknown field"
        case "missing":
            return f"{where}: missing"
        case _:
            return f"{where}: found {error['input']!r}: {error['msg']}"
