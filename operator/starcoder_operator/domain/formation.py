"""What becomes of the attempt: the decision of one pass, from the assignment as written and what the members show.

An attempt is one formation of the process group. It is recorded in `status.attempt` first, then written to the
assignment in phase hold, filled in as agents answer, and set to run once all are idle and the leader has made its
offer. Numbers only grow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from starcoder_trainer.contract.assignment import Assignment, Member
from starcoder_trainer.contract.report import Report

from . import failure, network, recovery, storage_reach
from .elasticity import pool_size
from .failure import Cause, Failure
from .hearing import USUAL, Limits
from .layout import layout_of
from .leaving import Leaving, leaving, reason_to_leave
from .members import MemberView, all_silent
from .relay import with_relay
from .seats import boot_ids, is_gone, seated, taking_part, vacated
from .sizing import gang_size, regrouped
from .snapshot import PodView, Snapshot, own_assignment
from .timestamps import seconds_between
from .topology import in_order

TOLD_BEFORE = 10.0
"""Seconds by which the kubelet's word of a container's end may come before the failure that it explains is counted."""


@dataclass(frozen=True)
class Stay:
    """Nothing to write; `waiting` says what for, empty while all trains."""

    waiting: str = ""


@dataclass(frozen=True)
class Hold:
    """Write `assignment` in phase hold: a new attempt, or the present one filled in."""

    assignment: Assignment
    why: str
    found: Failure | None = None
    """Explains the failure before better than what was known when its attempt ended."""
    planned: bool = False
    """Nothing has failed: the attempt before gives way."""
    unsaved: bool = False
    """It was to leave with a checkpoint, and has not in time."""


@dataclass(frozen=True)
class Go:
    """Write `assignment` in phase run."""

    assignment: Assignment


@dataclass(frozen=True)
class Drain:
    """Write `assignment` in phase drain: the gang is to leave with a checkpoint."""

    assignment: Assignment
    because: Failure | None = None
    """The Pod that is on its way out; None where it is planned."""
    why: str = ""
    """Where it is planned: what for."""


@dataclass(frozen=True)
class Leave:
    """The gang is leaving; wait until its checkpoint is safe."""

    waiting: str
    because: Failure | None = None


@dataclass(frozen=True)
class Ended:
    """The running attempt has failed: count it, then hold the next."""

    failure: Failure
    signs: tuple[Failure, ...] = ()
    """All that members showed of it."""


@dataclass(frozen=True)
class AwaitCause:
    """Workers lost their peers or wait for them; the cause may show in a moment."""

    failure: Failure
    signs: tuple[Failure, ...] = ()


@dataclass(frozen=True)
class BackOff:
    """All is ready, and the run has failed too often to be started at once."""

    until: str
    """RFC 3339."""
    message: str


@dataclass(frozen=True)
class Unclear:
    """No agent is heard: wait, judge nothing."""


@dataclass(frozen=True)
class Finished:
    """The last iteration is trained and its checkpoint is in HEAD."""


Decision = Stay | Hold | Go | Drain | Leave | Ended | AwaitCause | BackOff | Unclear | Finished


def decide(snapshot: Snapshot, members: tuple[MemberView, ...], config_json: str, limits: Limits = USUAL) -> Decision:
    """What to do about the attempt of a run that is wanted (valid, not suspended, not over)."""
    current = own_assignment(snapshot)
    recorded = snapshot.status.attempt
    if current is None:
        # An agent that has seen an attempt run forms it no more, so one that may have been written is passed over.
        number = next_attempt(snapshot) if any(_reports(snapshot)) or not recorded else recorded
        return Hold(
            held(snapshot, members, number), "the first assignment is written", _explanation(snapshot, members, limits)
        )
    if current.attempt < recorded:
        return Hold(
            held(snapshot, members, recorded), "recorded, not yet written", _explanation(snapshot, members, limits)
        )
    if current.phase == "stop":
        return Hold(held(snapshot, members, next_attempt(snapshot)), "the run goes on")
    if current.phase == "hold":
        return _while_held(snapshot, members, current, config_json, limits)
    return _while_running(snapshot, members, current)


def next_attempt(snapshot: Snapshot) -> int:
    """One beyond every attempt that anyone has ever spoken of."""
    current = own_assignment(snapshot)
    numbers = [snapshot.status.attempt, current.attempt if current else 0]
    for report in _reports(snapshot):
        numbers += [report.attempt, report.fenced_by or 0]
    return max(numbers) + 1


def held(snapshot: Snapshot, members: tuple[MemberView, ...], attempt: int, *, leader: int | None = None) -> Assignment:
    """Attempt `attempt` in phase hold with the agents that live now; survivors keep their places.

    Args:
        leader: member that changes places with the one that leads.
    """
    current, spec = own_assignment(snapshot), snapshot.spec
    places = [Member(p.index) for p in current.members] if current and current.phase != "stop" else []
    if leader is not None:
        places = storage_reach.led_by(leader, places)
    size = gang_size(snapshot, members)
    assignment = Assignment(
        run_uid=snapshot.uid,
        attempt=attempt,
        phase="hold",
        members=seated(places, members[: pool_size(spec)], size),
        gpus_per_member=spec.workers.gpus_per_worker,
        layout=layout_of(spec, size),
    )
    return with_relay(assignment, members)


def is_complete(snapshot: Snapshot) -> bool:
    """A verified checkpoint of the last iteration is known."""
    last = snapshot.spec.training.iterations
    known = snapshot.status.checkpoint
    verified = (r.verified for r in _reports(snapshot))
    return (known is not None and known.iteration >= last) or any(
        v is not None and v.checkpoint.step >= last for v in verified
    )


def _reports(snapshot: Snapshot) -> Iterator[Report]:
    return (lease.report for lease in snapshot.leases if lease.report is not None)


def _while_held(
    snapshot: Snapshot, members: tuple[MemberView, ...], current: Assignment, config_json: str, limits: Limits
) -> Stay | Hold | Go | Unclear | Finished:
    if is_complete(snapshot):
        return Finished()
    if all_silent(members):
        return Unclear()
    found = _explanation(snapshot, members, limits)
    why = _broken(snapshot, members, current, config_json)
    if why:
        return Hold(held(snapshot, members, next_attempt(snapshot)), why, found)
    if (other := storage_reach.next_leader(snapshot, members)) is not None:
        why = f"the leader, Pod {members[current.leader.index].pod_name}, does not reach S3; Pod {other.pod_name} tries"
        return Hold(held(snapshot, members, next_attempt(snapshot), leader=other.index), why, found)
    filled = with_relay(_filled_in(snapshot, members, current), members)
    if current.leader.boot_id and filled.leader.boot_id != current.leader.boot_id:
        why = f"the gang of another size has no place for the leader, Pod {members[current.leader.index].pod_name}"
        return Hold(held(snapshot, members, next_attempt(snapshot)), why, found)
    if filled != current or found is not None:
        return Hold(filled, "agents take their places", found)
    waiting = _waits_for(snapshot, members, current)
    if waiting:
        return Stay(waiting)
    leader = members[current.leader.index].report
    assert leader is not None
    assert leader.offer is not None
    return Go(replace(current, phase="run", offer=leader.offer))


def _broken(snapshot: Snapshot, members: tuple[MemberView, ...], current: Assignment, config_json: str) -> str:
    """Why a held attempt can't go on to run; empty where it can."""
    view = snapshot.assignment
    if view is not None and view.config_json != config_json:
        return "the configuration has changed"
    for report in _reports(snapshot):
        if report.fenced_by is not None and report.fenced_by >= current.attempt and report.attempt == current.attempt:
            return f"HEAD belongs to attempt {report.fenced_by}"
        if report.attempt == current.attempt and report.state != "idle":
            # The assignment was deleted, and written again by an operator that had not seen it run. Agents form an
            # attempt once.
            return f"attempt {current.attempt} has run already"
    for place in current.members:
        member = members[place.index]
        if place.boot_id and member.boot_id and member.boot_id != place.boot_id:
            return f"the agent of member {place.index} was started again"
    leader = members[current.leader.index]
    if current.leader.boot_id and is_gone(leader):
        return f"the leader was lost: {leader.loss.message if leader.loss else f'Pod {leader.pod_name} is new'}"
    if current.leader.boot_id and not vacated(current.members, members, pool_size(snapshot.spec))[0].boot_id:
        return f"the leader's workers can't start in Pod {leader.pod_name}, and another member stands by"
    return ""


def _filled_in(snapshot: Snapshot, members: tuple[MemberView, ...], current: Assignment) -> Assignment:
    """The held attempt with lost agents taken out and new ones put in, and of another size where that is due.

    New agents are put in when the leader is found and when all are, not one by one: the object is watched by every
    agent, and a large gang answers over many passes.
    """
    kept = vacated(current.members, members, pool_size(snapshot.spec))
    size = gang_size(snapshot, members)
    known = seated(kept, members[: pool_size(snapshot.spec)], size)
    if size != len(kept):
        return replace(current, members=known, layout=layout_of(snapshot.spec, size))
    leader_found = not kept[0].boot_id and bool(known[0].boot_id) and known[0].index == kept[0].index
    if leader_found or all(place.boot_id for place in known):
        return replace(current, members=in_order(snapshot, known, members))
    return replace(current, members=kept)


def _explanation(snapshot: Snapshot, members: tuple[MemberView, ...], limits: Limits) -> Failure | None:
    """What is known by now of a charged attempt that ended because of its peers, or of an agent that was started again:
    a member that took part is lost, its node has restarted, or the network is cut. The kubelet's word comes later than
    theirs."""
    status = snapshot.status
    last = status.last_failure
    # A checkpoint of the attempt that ended, which is seen only now, takes the charge away and not the question.
    is_asked = bool(status.restarts_without_progress) or recovery.is_open(status.recoveries)
    if last is None or last.cause not in {*failure.OF_PEERS, Cause.AGENT_RESTARTED} or not is_asked:
        return None
    since = seconds_between(last.at, snapshot.now) + TOLD_BEFORE
    restarted = [f for m in members if _has_changed(m.pod, since) and (f := failure.with_its_node(m)) is not None]
    lost = [f for m in members if _took_part(m) and (f := failure.lost(m)) is not None]
    if last.cause == Cause.AGENT_RESTARTED:
        return failure.primary(f for f in (*restarted, *lost) if f.member == last.member and f.cause in _OF_THE_NODE)
    apart = network.cut(snapshot, members, limits)
    return failure.primary([*lost, *restarted, *([apart] if apart else [])])


def _has_changed(pod: PodView | None, since: float) -> bool:
    """Its agent's container has, in the last `since` seconds. An operator that came later takes what it finds: it has
    not seen the Pod before, and what the kubelet tells is the container's last end."""
    if pod is None:
        return False
    return pod.age <= since if pod.agent_changed is None else pod.agent_changed <= since


_OF_THE_NODE = frozenset({Cause.NODE_RESTARTED, Cause.NODE_LOST, Cause.AGENT_UNRESPONSIVE})
"""What explains an agent that was started again: its node came back, and may be gone once more."""


def _took_part(member: MemberView) -> bool:
    """The newest Pod's agent has been in an attempt."""
    report = member.lease.report if member.lease else None
    return report is not None and report.incarnation == member.last_incarnation and report.attempt > 0


def _waits_for(snapshot: Snapshot, members: tuple[MemberView, ...], current: Assignment) -> str:
    absent = [members[p.index] for p in current.members if not p.boot_id or not members[p.index].live]
    if absent:
        return f"waiting for the agents of {_listing([m.pod_name or f'member {m.index}' for m in absent])}"
    reports = {p.index: members[p.index].report for p in current.members}
    troubled = [
        i for i, r in reports.items()
        if r is not None and r.problem is not None and not storage_reach.is_passed_over(snapshot, members, members[i])
    ]  # fmt: skip
    if troubled:
        return f"members {_listing([str(i) for i in troubled])} can't go on"
    busy = [i for i, r in reports.items() if r is None or r.attempt != current.attempt or r.state != "idle"]
    if busy:
        return f"waiting for members {_listing([str(i) for i in busy])} to be idle"
    leader = reports[current.leader.index]
    if leader is None or leader.offer is None:
        return f"waiting for the leader, member {current.leader.index}, to claim HEAD and choose the checkpoint"
    return ""


def _while_running(snapshot: Snapshot, members: tuple[MemberView, ...], current: Assignment) -> Decision:
    at_work = taking_part(current, members)
    gang = leaving(snapshot, current, at_work)
    failures = failure.find((m for m in at_work if m.index not in gang.excused), current.attempt, boot_ids(current))
    reports = _heard(at_work)
    done = [r for r in reports if r.attempt == current.attempt and r.state == "done"]
    if is_complete(snapshot) and (failures or len(done) == len(at_work)):
        return Finished()
    because = reason_to_leave(snapshot, at_work)
    departures = [because] if because is not None else []
    departures += [f for m in at_work if m.index in gang.excused and (f := failure.lost(m)) is not None]
    first = failure.primary([*failures, *departures]) if failures else None
    if first is not None and gang.cut_short:
        first = replace(first, message=f"{first.message}; {gang.cut_short}")
    if first is None:
        if len(done) == len(at_work):
            why = "trained to the end of its configuration, and spec.training.iterations is beyond it"
            return Hold(held(snapshot, members, next_attempt(snapshot)), why, planned=True)
        if gang.complete:
            return _after_leaving(snapshot, members, gang, departures)
        if all_silent(members):
            return Unclear()
        if (gang.going or gang.asked) and current.phase == "run":
            return Drain(replace(current, phase="drain"), failure.primary(departures))
        if gang.asked:
            return Leave(str(gang), failure.primary(departures))
        if behind := _behind(reports, current):
            return Stay(f"{len(behind)} of {len(at_work)} members form the group or load")
        why = regrouped(snapshot, members, current)
        return Drain(replace(current, phase="drain"), why=why) if why else Stay()
    return AwaitCause(first, failures) if first.may_have_another_cause else Ended(first, failures)


def iterations_pass(snapshot: Snapshot, members: tuple[MemberView, ...]) -> bool:
    """Whether the attempt as written trains. Not a word of the spec is taken into account: it may be invalid."""
    current = own_assignment(snapshot)
    if current is None or current.phase != "run" or all_silent(members):
        return False
    at_work = taking_part(current, members)
    reports, failures = _heard(at_work), failure.find(at_work, current.attempt, boot_ids(current))
    return len(reports) == len(at_work) and not failures and not _behind(reports, current)


def _heard(at_work: tuple[MemberView, ...]) -> list[Report]:
    """What stands in their Leases, of those that have said anything."""
    return [m.lease.report for m in at_work if m.lease is not None and m.lease.report is not None]


def _behind(reports: list[Report], current: Assignment) -> list[Report]:
    """Of members that form the group of the attempt or load."""
    return [r for r in reports if r.attempt != current.attempt or r.state not in ("training", "done")]


def _after_leaving(
    snapshot: Snapshot, members: tuple[MemberView, ...], gang: Leaving, departures: list[Failure]
) -> Hold | Ended:
    """Their checkpoint is safe: nothing is lost by whatever comes next."""
    because, with_it = failure.primary(departures), f"left with a checkpoint of iteration {gang.iteration}"
    if because is not None:
        told = replace(because, message=f"{because.message}; the gang {with_it}")
        return Ended(told, tuple(departures))
    return Hold(held(snapshot, members, next_attempt(snapshot)), f"the gang {with_it}", planned=True)


def _listing(items: list[str], most: int = 5) -> str:
    more = len(items) - most
    return ", ".join(items[:most]) + (f" and {more} more" if more > 0 else "")
