"""The Lease in which a member's agent answers; made empty, since agents may create nothing."""

from __future__ import annotations

from starcoder_trainer.contract import names

from .owner import Manifest, Owner


def lease(owner: Owner, member: int) -> Manifest:
    """One a member, whatever its incarnation."""
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": owner.metadata(names.lease_name(owner.name, member), {names.LABEL_MEMBER: str(member)}),
    }
