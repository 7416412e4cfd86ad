"""Facts equal on all ranks of a checkpoint, as JSON text by name, and the check that a run can load it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from starcoder_trainer.contract.assignment import Layout
from starcoder_trainer.contract.config import ModelConfig, TrainingConfig
from starcoder_trainer.failures import ConfigurationError

FORMAT = "starcoder-flat-1"

_SHAPE_FIELDS = (
    "layers",
    "hidden_size",
    "ffn_hidden_size",
    "attention_heads",
    "query_groups",
    "head_dim",
    "vocab_size",
    "max_sequence_length",
)


@dataclass(frozen=True)
class Position:
    """Where training stood."""

    iteration: int
    consumed_samples: int
    optimizer_step: int


def describe(config: TrainingConfig, layout: Layout, position: Position) -> dict[str, str]:
    return {
        "format": json.dumps(FORMAT),
        "iteration": json.dumps(position.iteration),
        "consumedSamples": json.dumps(position.consumed_samples),
        "optimizerStep": json.dumps(position.optimizer_step),
        "layout": json.dumps([layout.tensor, layout.pipeline, layout.data]),
        "model": json.dumps(_shape(config.model), sort_keys=True),
    }


def position_of(common: dict[str, str], config: TrainingConfig) -> Position:
    """Where the checkpoint stands.

    Raises:
        ConfigurationError: it is of another format or of a model of another shape; the message names the fields.
    """
    try:
        found = {
            key: json.loads(common[key]) for key in ("format", "iteration", "consumedSamples", "optimizerStep", "model")
        }
    except (KeyError, json.JSONDecodeError) as e:
        raise ConfigurationError(
            f"checkpoint manifest: {e!r} in its common facts; it was written by another program"
        ) from e
    if found["format"] != FORMAT:
        raise ConfigurationError(f"checkpoint format: found {found['format']}, this trainer reads {FORMAT}")
    expected = _shape(config.model)
    different = [
        f"{k} {found['model'].get(k)} (this run: {v})" for k, v in expected.items() if found["model"].get(k) != v
    ]
    if different:
        raise ConfigurationError(
            f"the checkpoint is of another model: {', '.join(different)}; "
            "use another checkpoint.uri or restore spec.model"
        )
    return Position(found["iteration"], found["consumedSamples"], found["optimizerStep"])


def layout_of(common: dict[str, str]) -> Layout:
    """The degrees of parallelism that wrote the checkpoint. Sequence parallelism writes the same and is not told."""
    return Layout(*json.loads(common["layout"]))


def _shape(model: ModelConfig) -> dict[str, Any]:
    return {name: getattr(model, name) for name in _SHAPE_FIELDS}
