"""starcoder.dev/v1alpha1: the models here are the only source of the schema (crds/) and of docs/reference/."""

from .base import Duration
from .model import PRESETS, Preset, PresetName, Shape
from .run import GROUP, KIND, PLURAL, SHORT_NAME, VERSION, InvalidRun, StarCoderRun, StarCoderRunSpec, read_run
from .status import (
    CheckpointStatus,
    Condition,
    ConditionType,
    Draining,
    LastFailure,
    LayoutStatus,
    Restarts,
    StarCoderRunStatus,
    State,
    WorkersStatus,
    loss_text,
    progress_text,
)

__all__ = [
    "GROUP",
    "KIND",
    "PLURAL",
    "PRESETS",
    "SHORT_NAME",
    "VERSION",
    "CheckpointStatus",
    "Condition",
    "ConditionType",
    "Draining",
    "Duration",
    "InvalidRun",
    "LastFailure",
    "LayoutStatus",
    "Preset",
    "PresetName",
    "Restarts",
    "Shape",
    "StarCoderRun",
    "StarCoderRunSpec",
    "StarCoderRunStatus",
    "State",
    "WorkersStatus",
    "loss_text",
    "progress_text",
    "read_run",
]
