"""Whose an object is: a run's label, and the ownerReference by which it goes when the run goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from starcoder_operator.api.v1alpha1 import GROUP, KIND, VERSION
from starcoder_trainer.contract import names

Manifest = dict[str, Any]
"""An object as JSON."""

MANAGED_BY = {"app.kubernetes.io/managed-by": "starcoder-operator"}


@dataclass(frozen=True)
class Owner:
    """The run that an object is made for."""

    namespace: str
    name: str
    uid: str

    def metadata(self, name: str, labels: Mapping[str, str] = MappingProxyType({})) -> Manifest:
        """Metadata of an object of this run.

        No finalizer, and `blockOwnerDeletion` false: what a run leaves is collected while the operator is down, and
        nobody needs a right to the run's finalizers.
        """
        return {
            "name": name,
            "namespace": self.namespace,
            "labels": {**MANAGED_BY, names.LABEL_RUN: self.name, **labels},
            "ownerReferences": [
                {
                    "apiVersion": f"{GROUP}/{VERSION}",
                    "kind": KIND,
                    "name": self.name,
                    "uid": self.uid,
                    "controller": True,
                    "blockOwnerDeletion": False,
                }
            ],
        }
