"""A network that is cut between Pods which all reach the API server: their agents live, and don't hear each other.

Workers there lose their connections or don't meet, again and again, and nobody's code is to blame. The relay names in
its Lease whom it does not hear; who renews its own Lease all the same is cut off from it, not lost.
"""

from __future__ import annotations

from starcoder_trainer.contract.assignment import Assignment

from .failure import Cause, Failure
from .hearing import Limits
from .members import MemberView

MOST_NAMED = 3
"""Pods, in a message."""


def cut(at_work: tuple[MemberView, ...], current: Assignment, limits: Limits) -> Failure | None:
    """The cut between members of the attempt that runs or is held, if there is one.

    It has stood for so long that an agent which died meanwhile would have missed its own renewals. Of a gang of three
    or more the node of the smaller side's first member is named.
    """
    relay = current.relay
    of_relay = next((m for m in at_work if relay is not None and m.index == relay.member), None)
    if of_relay is None or not _renews(of_relay, limits):
        return None
    apart = [m for m in at_work if m is not of_relay and _renews(m, limits) and _unheard(m) >= limits.heard]
    if not apart:
        return None
    others = len(at_work) - 1
    named = of_relay if others > 1 and 2 * len(apart) > others else apart[0]
    listed = ", ".join(m.pod_name for m in apart[:MOST_NAMED]) + (", …" if len(apart) > MOST_NAMED else "")
    nodes = " and ".join(dict.fromkeys((of_relay.node, apart[0].node)))
    message = (
        f"the agents of Pods {listed} and {of_relay.pod_name} reach the API server and not each other: the network "
        f"between nodes {nodes} is cut, or a policy forbids it"
    )
    return Failure(Cause.NETWORK_CUT, named.index, named.pod_name, named.node, message)


def _renews(member: MemberView, limits: Limits) -> bool:
    lease = member.lease
    return member.live and lease is not None and lease.witnessed and lease.renewed < limits.suspected


def _unheard(member: MemberView) -> float:
    return member.lease.unheard if member.lease is not None else 0.0
