"""What must hold after each step: judged as objects are written, workers are started and HEAD changes."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from starcoder_operator.adapters.kinds import CONFIG_MAPS, EVENTS, LEASES, POD_GROUPS, PODS, RUNS, Manifest
from starcoder_operator.domain.failure import CAUSES, Cause, Charge
from starcoder_operator.domain.timestamps import milliseconds
from starcoder_trainer.contract import names
from starcoder_trainer.contract.assignment import Assignment
from starcoder_trainer.contract.ledger import HEAD_KEY, MANIFEST, Head, checkpoint_prefix
from starcoder_trainer.contract.worker import Start

from .api_server import Change, owner_uids

if TYPE_CHECKING:
    from .machines import Sandbox
    from .world import Simulation

PHASES = ("hold", "run", "drain", "stop")
"""In the order in which an attempt goes through them; it may skip some."""
CHARGED = frozenset(cause for cause, rule in CAUSES.items() if rule.charge is Charge.RUN)


class Checks:
    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self._names: set[tuple[str, str, str]] = set()
        """(run's uid, kind, name) that were ever given."""
        self._torn_away: set[str] = set()
        self._highest: dict[str, int] = {}
        """Assignment -> attempt last written; forgotten where somebody deletes it."""
        self._forms: dict[tuple[str, int], set[str]] = defaultdict(set)
        self._phases: dict[tuple[str, int], int] = {}
        """(run's uid, attempt) -> place of the last written phase in `PHASES`."""
        self._started: dict[str, int] = {}
        """Boot id -> attempt that its workers were last started for."""
        self._ever_listed: set[tuple[int, int, str]] = set()
        self.newest_step = 0
        sim.api.watchers.append(self._on_change)
        sim.bucket.written = self._store_written
        sim.bucket.deleted = self._store_deleted

    def require(self, holds: bool, sentence: str) -> None:
        if not holds:
            self._sim.fails(sentence)

    # The API

    def _on_change(self, change: Change) -> None:
        if change.by.startswith("operator"):
            self._operator_wrote(change)
        if change.kind is RUNS and change.before is not None and change.type == "MODIFIED":
            self._status_written(change.before.get("status") or {}, change.thing.get("status") or {})
        if change.kind is PODS and change.type == "ADDED" and change.by.startswith("operator"):
            self._never_before(change.thing, "Pod")
            if not self._sim.is_overtaken(change.by):
                self._pod_created(change.thing)
        if change.kind is POD_GROUPS:
            self._group_changed(change)
        if change.kind is CONFIG_MAPS:
            self._assignment_changed(change)

    def _operator_wrote(self, change: Change) -> None:
        meta = change.thing["metadata"]
        if change.kind in (RUNS, EVENTS) or (change.kind is LEASES and meta["namespace"] == "operators"):
            self.require(change.kind is not RUNS or change.type == "MODIFIED", f"{change.by} made or deleted a run")
            return
        # A run that was deleted meanwhile may still be acted on for a moment; its name is no claim to others' things.
        whose = owner_uids(change.before or change.thing)
        verb = {"ADDED": "made", "MODIFIED": "changed", "DELETED": "deleted"}[change.type]
        self.require(
            bool(whose & self._sim.run_uids),
            f"{change.by} {verb} {change.kind.kind} {meta['name']}, which belongs to {whose or 'nobody'}",
        )

    def _status_written(self, before: Manifest, after: Manifest) -> None:
        for field in ("attempt", "placement"):
            was, now = before.get(field, 0), after.get(field, 0)
            self.require(now >= was, f"status.{field} went from {was} to {now}")
        pairs = zip(before.get("incarnations", ()), after.get("incarnations", ()), strict=False)
        self.require(all(now >= was for was, now in pairs), "status.incarnations went down")
        restarts = after.get("restarts") or {}
        counts = restarts.get("byCause") or {}
        self.require(
            sum(counts.values()) == restarts.get("total", 0) and all(n > 0 for n in counts.values()),
            f"restarts do not add up: {restarts}",
        )
        charged = max(_charged(counts), after.get("restartsWithoutProgress", 0))
        self.require(
            charged <= self._sim.chargeable or self._may_wait_for_cause(after),
            f"charged {charged} times ({counts}), and at most {self._sim.chargeable} failures were the run's own",
        )
        if before.get("state") != after.get("state"):
            self._sim.tell(f"run is {after.get('state')}: {after.get('reason')}: {after.get('message')}")
        self.require(
            after.get("state") != "Succeeded" or self.newest_step >= self._sim.iterations,
            "Succeeded without a verified checkpoint of the last iteration",
        )
        self.require(after.get("state") != "Failed", f"the run is Failed: {after.get('message')}")

        self._account_written(before.get("goodput"), after.get("goodput"))

    def _account_written(self, before: Manifest | None, after: Manifest | None) -> None:
        if after is None:
            return
        buckets = after["buckets"]
        told, lived = sum(buckets.values()), milliseconds(after["asOf"]) - milliseconds(after["since"])
        self.require(round(1000 * told) == lived, f"the buckets add up to {told:.3f} s of {lived / 1000:.3f} s")
        for bucket, seconds in ((before or {}).get("buckets") or {}).items():
            self.require(buckets[bucket] >= seconds, f"bucket {bucket} went from {seconds} to {buckets[bucket]} s")

    def _may_wait_for_cause(self, status: Manifest) -> bool:
        """A lost connection and an agent that started again are charged until their cause shows, and then put down to
        that."""
        return (status.get("lastFailure") or {}).get("cause") in ("Peer", "AgentRestarted")

    def budget(self, status: Manifest) -> None:
        """At the end, when every cause has shown."""
        counts = (status.get("restarts") or {}).get("byCause") or {}
        charged = max(_charged(counts), status.get("restartsWithoutProgress", 0))
        self.require(
            charged <= self._sim.chargeable,
            f"charged {charged} times ({counts}), and at most {self._sim.chargeable} failures were the run's own",
        )

    def _pod_created(self, pod: Manifest) -> None:
        name = pod["metadata"]["name"]
        member = int(pod["metadata"]["labels"][names.LABEL_MEMBER])
        incarnation = int(pod["metadata"]["labels"][names.LABEL_INCARNATION])
        run = self._sim.run_of(pod)
        if run is None:
            return
        recorded = (run.get("status") or {}).get("incarnations", ())
        self.require(
            member < len(recorded) and incarnation <= recorded[member],
            f"Pod {name} was created before it was recorded: status.incarnations {list(recorded)}",
        )
        found = self._sim.api.find(
            CONFIG_MAPS, pod["metadata"]["namespace"], names.assignment_name(run["metadata"]["name"])
        )
        if found is not None:
            running = Assignment.from_json(found["data"][names.ASSIGNMENT_KEY])
            self.require(
                running.phase != "run" or member not in [m.index for m in running.members],
                f"Pod {name} was created while member {member} is to run in attempt {running.attempt}",
            )

    def _never_before(self, thing: Manifest, kind: str) -> None:
        for uid in owner_uids(thing):
            key = (uid, kind, thing["metadata"]["name"])
            self.require(key not in self._names, f"the name {key[2]} was given to a second {kind}")
            self._names.add(key)

    def _group_changed(self, change: Change) -> None:
        name = change.thing["metadata"]["name"]
        if change.type == "ADDED":
            # one that was read as there, and deleted by somebody meanwhile, may come again
            if name not in self._torn_away and not self._sim.is_overtaken(change.by):
                self._never_before(change.thing, "PodGroup")
        elif change.by == "user":
            self._torn_away.add(name)

    def _assignment_changed(self, change: Change) -> None:
        meta = change.thing["metadata"]
        if change.type == "DELETED":
            self._highest.pop(meta["name"], None)
            return
        written = Assignment.from_json(change.thing["data"][names.ASSIGNMENT_KEY])
        self._sim.tell(f"attempt {written.attempt} {written.phase}: {_places(written)}")
        highest = self._highest.get(meta["name"], 0)
        run = self._sim.run_of(change.thing)
        if run is None or run["metadata"]["uid"] != written.run_uid:
            return
        recorded = (run.get("status") or {}).get("attempt", 0)
        self.require(written.attempt >= highest, f"the assignment went from attempt {highest} to {written.attempt}")
        self.require(
            written.attempt <= recorded, f"attempt {written.attempt} was written, and status.attempt is {recorded}"
        )
        self._highest[meta["name"]] = written.attempt
        is_of = written.run_uid, written.attempt
        phase, before = PHASES.index(written.phase), self._phases.get(is_of, 0)
        self.require(phase >= before, f"attempt {written.attempt} went from {PHASES[before]} to {written.phase}")
        self._phases[is_of] = phase
        if written.phase == "run":
            forms = self._forms[is_of]
            forms.add(written.to_json())
            self.require(len(forms) == 1, f"attempt {written.attempt} runs in two forms")
            self.require(all(m.boot_id for m in written.members), f"attempt {written.attempt} runs with empty places")

    # Workers

    def workers_start(self, box: Sandbox, start: Start, beside: list[int]) -> None:
        assert box.agent is not None
        boot, attempt = box.agent.boot_id, start.attempt
        self._sim.tell(f"{box.name} starts ranks {list(start.ranks)} of attempt {attempt} on {box.machine.name}")
        self.require(not beside, f"{box.name} starts workers of attempt {attempt} beside those of {beside}")
        for other in box.machine.sandboxes.values():
            if other is not box and other.run_uid == box.run_uid and other.server and other.server.workers:
                self._sim.fails(f"{box.name} starts workers on {box.machine.name}, where those of {other.name} run")
        last = self._started.get(boot, 0)
        self.require(attempt > last, f"{box.name} starts attempt {attempt} after attempt {last}")
        self._started[boot] = attempt
        head = self._head()
        self.require(
            head is not None and head.attempt >= attempt,
            f"workers of attempt {attempt} start, and HEAD is of attempt {head.attempt if head else 'none'}",
        )
        found = start.checkpoint
        if found is None:
            self.require(
                not self._ever_listed, f"attempt {attempt} starts at iteration 0, and checkpoints are verified"
            )
        else:
            known = (found.attempt, found.step, found.digest) in self._ever_listed
            self.require(known, f"attempt {attempt} starts at {found}, which HEAD never listed")

    def can_load(self, start: Start) -> bool:
        found = start.checkpoint
        return found is None or f"{checkpoint_prefix(found.attempt, found.step)}/{MANIFEST}" in self._sim.bucket.objects

    # The ledger

    def _head(self) -> Head | None:
        found = self._sim.bucket.objects.get(HEAD_KEY)
        return Head.from_json(found[0]) if found else None

    def _store_written(self, key: str, before: bytes | None, by: str) -> None:
        if key != HEAD_KEY:
            return
        head = self._head()
        assert head is not None
        old = Head.from_json(before) if before else Head(head.run_uid, head.run_name, 0, "", "")
        self.require(head.holder == by, f"HEAD is written by {by}, and held by {head.holder}")
        self.require(head.attempt >= old.attempt, f"HEAD went from attempt {old.attempt} to {head.attempt}")
        for entry in head.entries:
            if entry not in old.entries:
                self._sim.tell(f"HEAD lists step {entry.step} of attempt {entry.attempt}, by attempt {head.attempt}")
        if head.entries != old.entries:
            self.require(
                (head.attempt, head.holder) == (old.attempt, old.holder),
                f"the entries of HEAD were changed by attempt {head.attempt} of {head.holder}, and it was held by "
                f"attempt {old.attempt} of {old.holder}",
            )
        elif head.attempt > old.attempt:
            self._sim.tell(f"HEAD is claimed for attempt {head.attempt}")
        newest = head.newest.step if head.newest else 0
        self.require(newest >= self.newest_step, f"the newest verified step went from {self.newest_step} to {newest}")
        self.newest_step = newest
        for entry in head.entries:
            self._ever_listed.add((entry.attempt, entry.step, entry.digest))
            manifest = f"{checkpoint_prefix(entry.attempt, entry.step)}/{MANIFEST}"
            self.require(manifest in self._sim.bucket.objects, f"HEAD lists {manifest}, which is not there")

    def _store_deleted(self, key: str) -> None:
        head = self._head()
        for entry in head.entries if head else ():
            self.require(
                not key.startswith(f"{checkpoint_prefix(entry.attempt, entry.step)}/"),
                f"{key} was deleted, and HEAD lists it",
            )


def _charged(by_cause: dict[str, int]) -> int:
    return sum(n for cause, n in by_cause.items() if Cause(cause) in CHARGED)


def _places(written: Assignment) -> str:
    return ", ".join(f"{m.index}:{m.boot_id or '-'}" for m in written.members)
