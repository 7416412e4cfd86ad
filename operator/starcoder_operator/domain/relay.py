"""Which agent takes the heartbeats of all others: the leader's as soon as it answers, and any other until then, so that
the Leases of a gang that waits are not renewed one by one either."""

from __future__ import annotations

from dataclasses import replace

from starcoder_trainer.contract.assignment import Assignment, Relay

from .members import MemberView


def with_relay(assignment: Assignment, members: tuple[MemberView, ...]) -> Assignment:
    """The assignment with its relay, none where no agent answers. One that answers is kept until the leader does."""
    able = {
        m.index: Relay(m.index, m.boot_id, m.report.listens)
        for m in members
        if m.live and m.report is not None and m.report.listens is not None
    }
    kept = assignment.relay if assignment.relay in able.values() else None
    return replace(assignment, relay=able.get(assignment.leader.index) or kept or next(iter(able.values()), None))
