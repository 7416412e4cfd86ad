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
    """`size` places: those that are held stay as they are, open ones go to whoever is fit, best to their own member.

    A place that nobody can take yet stays open under the index of the member whose Pod is waited for.

    Args:
        places: in rank order, with the agent that holds each; empty boot ids are open.
        pool: members that may take part, by index.
        size: how many take part.
    """
    known = [_returned(place, pool[place.index]) for place in places if place.index < len(pool)]
    known = _shortened(known, pool, size)
    others = _standing_by(known, pool)
    more = size - len(known)
    known += [Member(m.index, m.boot_id) for m in others[:more]]
    fit = iter([m for m in others[more:] if m.fit])
    taken = [place if place.boot_id else _taken(place, next(fit, None)) for place in known]
    return tuple(replace(place, boot_id=place.boot_id or pool[place.index].boot_id) for place in taken)


def vacated(places: Iterable[Member], members: tuple[MemberView, ...], pool: int) -> tuple[Member, ...]:
    """The places of a held attempt, open where the agent that holds one will not answer again; and where it is not fit
    and another could take it."""
    places = tuple(places)
    fit = sum(m.fit for m in _standing_by(places, members[:pool]))
    out = []
    for place in places:
        member = members[place.index]
        gone = is_gone(member)
        if place.boot_id and not gone and member.live and not member.fit and fit:
            gone, fit = True, fit - 1
        out.append(replace(place, boot_id="") if gone else place)
    return tuple(out)


def is_gone(member: MemberView) -> bool:
    """The agent that its place names, if any, will not answer again."""
    return member.loss is not None or member.report is None


def taking_part(assignment: Assignment | None, members: tuple[MemberView, ...]) -> tuple[MemberView, ...]:
    """The members that an assignment lists, in rank order."""
    places = assignment.members if assignment else ()
    return tuple(members[place.index] for place in places if place.index < len(members))


def boot_ids(assignment: Assignment) -> dict[int, str]:
    """Member to the agent that the assignment lists."""
    return {place.index: place.boot_id for place in assignment.members}


def _returned(place: Member, member: MemberView) -> Member:
    return replace(place, boot_id=place.boot_id or (member.boot_id if member.fit else ""))


def _standing_by(places: Iterable[Member], pool: tuple[MemberView, ...]) -> list[MemberView]:
    """Who has no place, the most useful first."""
    named = {place.index for place in places}
    return sorted((m for m in pool if m.index not in named), key=lambda m: (not m.fit, not m.live, m.index))


def _shortened(known: list[Member], pool: tuple[MemberView, ...], size: int) -> list[Member]:
    """Without as many as are too many: first those that are not fit, then from the end."""
    order = sorted(range(len(known)), key=lambda i: (not pool[known[i].index].fit, i))
    return [known[i] for i in sorted(order[:size])]


def _taken(place: Member, by: MemberView | None) -> Member:
    return place if by is None else Member(by.index, by.boot_id)
