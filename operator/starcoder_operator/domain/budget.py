"""How many Pods of a run evictions have to leave standing, so that a drain takes one member at a time.

Each eviction has the whole gang leave with a checkpoint. The next one waits until the Pod before has its replacement.
"""

from __future__ import annotations

from starcoder_trainer.contract.assignment import Assignment

from .members import MemberView


def min_available(members: tuple[MemberView, ...], assignment: Assignment | None) -> int:
    """One less than the Pods that evictions may meet: the members of the attempt, and the spares that stand by.

    0 for a gang of one, since a budget of one would keep its node from ever being drained: its replacement comes only
    when it is gone. 0 where no attempt is wanted.
    """
    if assignment is None or assignment.phase == "stop":
        return 0
    listed = {place.index for place in assignment.members}
    spares = sum(m.index not in listed and m.loss is None and m.pod is not None and m.pod.ready for m in members)
    return max(0, len(listed) + spares - 1)
