"""Schedulers that place a run's Pods together or not at all, one a file behind one Protocol."""

from .protocol import Gang, Group
from .registry import GANGS, gang_of

__all__ = ["GANGS", "Gang", "Group", "gang_of"]
