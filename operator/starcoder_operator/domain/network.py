"""A network that is cut between Pods which all reach the API server: their agents live, and don't hear each other.

Workers there lose their connections or don't meet, again and again, and nobody's code is to blame. The relay names in
its Lease whom it does not hear; who renews its own Lease all the same is cut off from it, not lost.
"""

from __future__ import annotations

from .failure import Cause, Failure
from .hearing import Limits
from .members import MemberView
from .seats import boot_ids, taking_part
from .snapshot import Snapshot, own_assignment

MOST_NAMED = 3
"""Pods, in a message."""


def cut(snapshot: Snapshot, members: tuple[MemberView, ...], limits: Limits) -> Failure | None:
    """The cut between members of the attempt that runs or is held, if there is one, and the run has trained before:
    where agents never could hear each other, in a namespace that forbids it, trying without end would help nobody.

    It has stood for so long that an agent which died meanwhile would have missed its own renewals. Of a gang of three
    or more the node of the smaller side's first member is named.
    """
    current = own_assignment(snapshot)
    if current is None or current.relay is None or snapshot.status.checkpoint is None:
        return None
    relay, listed = current.relay, boot_ids(current)
    at_work = [m for m in taking_part(current, members) if m.boot_id and m.boot_id == listed[m.index]]
    of_relay = next((m for m in at_work if m.boot_id == relay.boot_id), None)
    if of_relay is None or not _renews(of_relay, limits):
        return None
    apart = [m for m in at_work if m is not of_relay and _renews(m, limits) and _unheard(m) >= limits.heard]
    if not apart:
        return None
    others = len(at_work) - 1
    named = of_relay if others > 1 and 2 * len(apart) > others else apart[0]
    pods = ", ".join(m.pod_name for m in apart[:MOST_NAMED]) + (", …" if len(apart) > MOST_NAMED else "")
    nodes = " and ".join(dict.fromkeys((of_relay.node, apart[0].node)))
    message = (
        f"the agents of Pods {pods} and {of_relay.pod_name} reach the API server and not each other: the network "
        f"between nodes {nodes} is cut, or a policy forbids it"
    )
    return Failure(Cause.NETWORK_CUT, named.index, named.pod_name, named.node, message)


def _renews(member: MemberView, limits: Limits) -> bool:
    """It speaks for itself, and takes heartbeats: agents of older images don't."""
    lease, report = member.lease, member.report
    takes_part = report is not None and report.listens is not None
    return takes_part and lease is not None and lease.witnessed and lease.renewed < limits.suspected


def _unheard(member: MemberView) -> float:
    return member.lease.unheard if member.lease is not None else 0.0
