"""Whose fault an exception is: the one that comes again at its iteration on other nodes is the code's or the data's.

Samples and their order are the same in every attempt, so an error of code or data meets its iteration again wherever
it runs. One that is seen on the same node both times may be the node's; `avoidance` then moves it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from starcoder_operator.api.v1alpha1 import LastFailure

from .failure import Cause, Failure

MOST_NODES = 8
"""Nodes that the status keeps of one failure."""


def nodes_of(found: Failure, signs: Iterable[Failure]) -> tuple[str, ...]:
    """Where the same failure was seen in one attempt, lowest members first."""
    same = [found, *(s for s in signs if _is_same(s, found))]
    return tuple(dict.fromkeys(s.node for s in same if s.node))[:MOST_NODES]


def _is_same(sign: Failure, found: Failure) -> bool:
    """One exception of the code, or one service that does not answer."""
    if found.cause is Cause.STORAGE:
        return sign.cause is Cause.STORAGE
    return found.fingerprint != "" and sign.fingerprint == found.fingerprint


def is_repeated(last: LastFailure | None, found: Failure) -> bool:
    """The attempt before ended by the same exception of the code at the same iteration."""
    return (
        last is not None
        and found.cause is Cause.CRASH
        and found.fingerprint != ""
        and (last.fingerprint, last.iteration) == (found.fingerprint, found.iteration)
    )


def judged(last: LastFailure | None, found: Failure, nodes: tuple[str, ...]) -> Failure:
    """`found`, or a UserError where it is proven to be none of the nodes'.

    Args:
        nodes: where it was seen this time.
    """
    if last is None or not is_repeated(last, found) or not nodes or not last.nodes or {*nodes} & {*last.nodes}:
        return found
    where = "before the first iteration" if found.iteration is None else f"after iteration {found.iteration}"
    message = (
        f"{found.message} (the same exception came twice {where}, on {', '.join(last.nodes)} and then on "
        f"{', '.join(nodes)}: it is the code's or the data's)"
    )
    return replace(found, cause=Cause.USER_ERROR, message=message)
