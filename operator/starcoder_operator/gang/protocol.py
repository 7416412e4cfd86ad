"""What the operator asks of whatever places a gang. Pure: manifests and views of them."""

from __future__ import annotations

from typing import Protocol

from starcoder_operator.adapters.kinds import Kind, Manifest
from starcoder_operator.api.v1alpha1 import StarCoderRunSpec
from starcoder_operator.build.owner import Owner
from starcoder_operator.domain.snapshot import GangView


class Group(Protocol):
    """The object that stands for one placement."""

    @property
    def kind(self) -> Kind: ...

    def manifest(self, owner: Owner, spec: StarCoderRunSpec, name: str, min_count: int) -> Manifest:
        """To be created before the Pods."""
        ...

    def resized(self, min_count: int) -> Manifest:
        """The part of the manifest that says how many Pods are needed; as a JSON merge patch, it changes that."""
        ...

    def view(self, there: Manifest) -> GangView:
        """What the planner wants to know of the object as it is."""
        ...


class Gang(Protocol):
    @property
    def group(self) -> Group | None:
        """None: this scheduler needs no object."""
        ...

    def joined(self, spec: StarCoderRunSpec, name: str, *, size: int, member: int) -> Manifest:
        """Part of a Pod that makes it a member of the placement `name`.

        Args:
            size: Pods that the placement has in all, where its Pods have to say so.
            member: index of the Pod's member.
        """
        ...

    def membership(self, pod: Manifest) -> str:
        """Name of the placement that a Pod is a member of as the server stored it; empty: none."""
        ...

    def size(self, pod: Manifest) -> int:
        """Of the placement, as the Pod says it; 0: it does not."""
        ...
