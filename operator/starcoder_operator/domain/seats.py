"""Who takes part in an attempt, in rank order.

A run has a pool of members. Those that its assignment lists take part, each in a place of the rank order; the others
stand by. A spare is a role and no identity: where a member is lost, one that stands by takes its place at once, and the
Pod that comes for the lost one stands by in turn. Survivors keep their places, so that local files stay of use.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from starcoder_trainer.contract.assignment import Assignment, Member

from .members import MemberView


def seated(places: Iterable[Member], pool: tuple[MemberView, ...], size: int) -> tuple[Member, ...]:
    """`size` places: those that are held stay as they are, open ones go to whoever is live.

    A place that nobody can take yet stays open under the index of the member whose Pod is waited for.

    Args:
        places: in rank order, with the agent that holds each; empty boot ids are open.
        pool: members that may take part, by index.
        size: how many take part.
    """
    known = [replace(p, boot_id=p.boot_id or pool[p.index].boot_id) for p in places if p.index < len(pool)]
    known = _shortened(known, pool, size)
    named = {place.index for place in known}
    others = sorted((m for m in pool if m.index not in named), key=_usefulness)
    more = size - len(known)
    known += [Member(m.index, m.boot_id) for m in others[:more]]
    standing_by = iter([m for m in others[more:] if m.live])
    return tuple(place if place.boot_id else _taken(place, next(standing_by, None)) for place in known)


def taking_part(assignment: Assignment | None, members: tuple[MemberView, ...]) -> tuple[MemberView, ...]:
    """The members that an assignment lists, in rank order."""
    places = assignment.members if assignment else ()
    return tuple(members[place.index] for place in places if place.index < len(members))


def _shortened(known: list[Member], pool: tuple[MemberView, ...], size: int) -> list[Member]:
    """Without as many as are too many: first those that do not live, then from the end."""
    order = sorted(range(len(known)), key=lambda i: (not pool[known[i].index].live, i))
    return [known[i] for i in sorted(order[:size])]


def _usefulness(member: MemberView) -> tuple[bool, bool, int]:
    troubled = member.report is not None and member.report.problem is not None
    return not member.live, troubled, member.index


def _taken(place: Member, by: MemberView | None) -> Member:
    return place if by is None else Member(by.index, by.boot_id)
