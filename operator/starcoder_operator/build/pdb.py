"""The PodDisruptionBudget of a run: evictions take one of its Pods at a time."""

from __future__ import annotations

from starcoder_trainer.contract import names

from .owner import Manifest, Owner


def disruption_budget(owner: Owner, min_available: int) -> Manifest:
    """`minAvailable` is a number: shares and `maxUnavailable` need a controller with a scale subresource, and bare Pods
    have none."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": owner.metadata(owner.name),
        "spec": {
            "minAvailable": min_available,
            "selector": {"matchLabels": {names.LABEL_RUN: owner.name}},
            # A Pod that does not run trains nothing: a drain need not wait for it.
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }
