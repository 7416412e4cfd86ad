"""What the planner wants done, as data. `act` carries the actions out in order and stops at the first failure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from starcoder_operator.api.v1alpha1 import StarCoderRunStatus
from starcoder_trainer.contract.assignment import Assignment


@dataclass(frozen=True)
class EnsureAccess:
    """ServiceAccount, Role and RoleBinding of the run's agents."""


@dataclass(frozen=True)
class EnsureLeases:
    """One Lease a member."""

    members: tuple[int, ...]


@dataclass(frozen=True)
class EnsureGang:
    """PodGroup `name` with `min_count`; created before its Pods, min_count patched where it differs."""

    name: str
    min_count: int


@dataclass(frozen=True)
class CreatePod:
    member: int
    incarnation: int
    gang: str
    """Name of the group; empty where the gang is None."""
    avoid_nodes: tuple[str, ...] = ()
    """Not on these."""
    gang_size: int = 0
    """Pods that the group has in all, where Pods have to say so."""
    shun_nodes: tuple[str, ...] = ()
    """Rather not on these."""


@dataclass(frozen=True)
class DeletePod:
    name: str
    uid: str
    why: str


@dataclass(frozen=True)
class DeclareFailed:
    """Sets the phase of a deleted Pod whose node is lost, and so nobody else will, to Failed."""

    name: str
    uid: str
    why: str


@dataclass(frozen=True)
class DeleteGang:
    name: str
    uid: str


@dataclass(frozen=True)
class EnsureDisruptionBudget:
    """The run's PodDisruptionBudget; created or patched."""

    min_available: int


@dataclass(frozen=True)
class WriteAssignment:
    """Create, or replace at `resource_version` (empty: must not exist)."""

    assignment: Assignment
    config_json: str
    resource_version: str


@dataclass(frozen=True)
class EmitEvent:
    kind: Literal["Normal", "Warning"]
    reason: str
    message: str


Action = (
    EnsureAccess
    | EnsureLeases
    | EnsureGang
    | CreatePod
    | DeletePod
    | DeclareFailed
    | DeleteGang
    | EnsureDisruptionBudget
    | WriteAssignment
    | EmitEvent
)


@dataclass(frozen=True)
class Plan:
    status: StarCoderRunStatus
    """Written before the actions where it differs from the one read (volatile fields are rate-limited), so that an
    attempt or a charge is recorded before anything happens because of it."""
    actions: tuple[Action, ...] = ()
    look_again: float | None = None
    """Seconds until the next pass even if nothing changes; None: only on a change."""
