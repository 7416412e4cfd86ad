"""What a Pod was built from, kept on the Pod, so that one that waits in vain is built anew when the spec is mended."""

from __future__ import annotations

import hashlib
import json

from starcoder_operator.api.v1alpha1 import StarCoderRunSpec
from starcoder_trainer.contract.names import GROUP

ANNOTATION_TEMPLATE = f"{GROUP}/pod-template"
"""On Pods: `template_digest` of the spec they were built from."""
ANNOTATION_AVOIDS = f"{GROUP}/avoids-nodes"
"""On Pods: nodes they must not be placed on, comma-separated: lost, broken, or avoided by
the run when the Pod was created."""


def template_digest(spec: StarCoderRunSpec) -> str:
    """16 hex digits over all of the spec that the Pod manifest depends on; another suspend, iteration count or number
    of Pods does not change it."""
    parts = [
        spec.workers.model_copy(update={"replicas": 1}).to_dict(),
        spec.scheduling.to_dict(),
        spec.storage.credentials_secret,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
