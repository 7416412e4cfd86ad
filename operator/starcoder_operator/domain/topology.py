"""Rank order after the network: members of one topology domain are neighbours, and so are those of one node.

Tensor ranks are within a member, data ranks follow each other, pipeline stages are farthest apart (Megatron's
`tp-cp-ep-dp-pp`). With each domain in one piece, a ring of data-parallel ranks leaves and enters a domain once.
"""

from __future__ import annotations

from starcoder_trainer.contract.assignment import Member

from .members import MemberView
from .snapshot import Snapshot


def in_order(snapshot: Snapshot, places: tuple[Member, ...], members: tuple[MemberView, ...]) -> tuple[Member, ...]:
    """The same members by domain, then node, the leader first and its domain with it: it may have claimed HEAD.

    Unchanged where the spec names no topology key, an agent is not known yet, or a member has trained before: survivors
    keep their places, since what they have on local disk belongs to those.
    """
    key = snapshot.spec.scheduling.topology_key
    if key is None or not all(place.boot_id for place in places) or any(_has_trained(members[p.index]) for p in places):
        return places
    leader, others = places[0], places[1:]
    home = domain_of(snapshot, members[leader.index].node, key)

    def position(place: Member) -> tuple[bool, bool, str, bool, str, int]:
        node = members[place.index].node
        domain = domain_of(snapshot, node, key)
        return domain != home, not domain, domain, node != members[leader.index].node, node, place.index

    return (leader, *sorted(others, key=position))


def domain_of(snapshot: Snapshot, node: str, key: str) -> str:
    """Value of the node's label; empty where it has none or the node is not known."""
    view = snapshot.nodes.get(node)
    return view.labels.get(key, "") if view is not None else ""


def _has_trained(member: MemberView) -> bool:
    return member.report is not None and member.report.progress is not None
