"""How many members a run has: all that are wanted, those that stand by, and those that were ever there."""

from __future__ import annotations

from starcoder_operator.api.v1alpha1 import StarCoderRunSpec, StarCoderRunStatus


def pool_size(spec: StarCoderRunSpec) -> int:
    """Members that have a Pod, by index 0 to this: those that train and the spares. Which is which says the
    assignment."""
    return spec.workers.replicas + spec.elasticity.spares


def members_ever(spec: StarCoderRunSpec, status: StarCoderRunStatus) -> int:
    """Members that have or had a Pod: a run that was made smaller may still train with those it is to give up."""
    return max(pool_size(spec), len(status.incarnations))
