"""Numbers of members: all that a run has, those that train at most and at least, and what can be made of those left."""

from __future__ import annotations

from math import gcd

from starcoder_operator.api.v1alpha1 import StarCoderRunSpec, StarCoderRunStatus

from .layout import model_parallel


def pool_size(spec: StarCoderRunSpec) -> int:
    """Members that have a Pod, by index 0 to this: those that train and the spares. Which is which says the
    assignment."""
    return spec.workers.replicas + spec.elasticity.spares


def members_ever(spec: StarCoderRunSpec, status: StarCoderRunStatus) -> int:
    """Members that have or had a Pod: a run that was made smaller may still train with those it is to give up."""
    return max(pool_size(spec), len(status.incarnations))


def least(spec: StarCoderRunSpec) -> int:
    """With fewer members the run waits."""
    return spec.workers.replicas if spec.elasticity.min_replicas is None else spec.elasticity.min_replicas


def whole_copies(spec: StarCoderRunSpec) -> int:
    """Fewest members whose GPUs hold whole copies of the model; where tensor x pipeline spans members they are lost and
    come back by as many."""
    return model_parallel(spec) // gcd(model_parallel(spec), spec.workers.gpus_per_worker)


def largest(spec: StarCoderRunSpec, live: int) -> int:
    """How many of `live` members train: no more than are wanted, in whole copies of the model; 0 where those are fewer
    than the least."""
    most = min(live, spec.workers.replicas) // whole_copies(spec) * whole_copies(spec)
    return most if most >= least(spec) else 0


def settled(spec: StarCoderRunSpec, before: int) -> int:
    """How many are to train after an attempt of `before` members: as many again, all that are wanted where that is no
    number to train with."""
    fits = least(spec) <= before <= spec.workers.replicas and before % whole_copies(spec) == 0
    return before if fits else spec.workers.replicas
