"""The ConfigMap that tells agents who trains what, in which attempt."""

from __future__ import annotations

from starcoder_trainer.contract import names
from starcoder_trainer.contract.assignment import Assignment

from .owner import Manifest, Owner


def config_map(owner: Owner, assignment: Assignment, config_json: str) -> Manifest:
    """Assignment and the configuration it is for, in one object: agents see both or neither."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": owner.metadata(names.assignment_name(owner.name)),
        "data": {names.ASSIGNMENT_KEY: assignment.to_json(), names.CONFIG_KEY: config_json},
    }
