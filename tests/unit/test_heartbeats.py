"""Who is suspected when, by the relay and by those that beat to it; time is only numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from starcoder_trainer.agent.heartbeats import TRUSTED_RENEWALS, Heartbeats, Standing, is_news, is_relayed
from starcoder_trainer.contract.assignment import Assignment, Endpoint, Layout, Member, Relay
from starcoder_trainer.contract.heartbeat import Answer, Beat, Rhythm
from starcoder_trainer.contract.report import Progress, Report

RHYTHM = Rhythm(seconds=1.0, missed=3)
BOOTS = ("boot-0", "boot-1", "boot-2")


def relay(member: int, boot_id: str = "") -> Relay:
    return Relay(member, boot_id or BOOTS[member], Endpoint(f"10.0.0.{member}", 7))


LEADER = relay(0)


def assignment(attempt: int = 1, by: Relay | None = LEADER, members: tuple[int, ...] = (0, 1, 2)) -> Assignment:
    return Assignment(
        "uid-1", attempt, "run", tuple(Member(i, BOOTS[i]) for i in members), 1, Layout(1, 1, 3), relay=by
    )


class Gang:
    """Three agents on one network; each looks every quarter of a second and beats every second, unless it is `down`."""

    def __init__(self) -> None:
        self.now = 100.0
        self.agents = [Heartbeats(member=i, incarnation=0, boot_id=b, rhythm=RHYTHM, now=self.now)
                       for i, b in enumerate(BOOTS)]  # fmt: skip
        self.down: set[int] = set()
        """They do nothing and reach nobody."""
        self.apart: set[int] = set()
        """They live and reach no other."""
        self.stalled: set[int] = set()
        """They do nothing; their machines answer."""
        self.leases = True
        """The API server takes Leases."""

    def assign(self, written: Assignment, *members: int) -> None:
        for i in members or range(3):
            self.agents[i].assigned(self.now, written)

    def goes_on(self, seconds: float) -> None:
        for _ in range(round(seconds * 4)):
            self.now += 0.25
            beating = self.now % 1 == 0
            for i, agent in enumerate(self.agents):
                for boot_id in agent.connected:
                    if {i, BOOTS.index(boot_id)} & (self.down | self.apart):
                        agent.broke(boot_id)
                if i in self.down | self.stalled:
                    continue
                if self.leases:
                    agent.renewed(self.now)
                to = agent.target
                if beating and to is not None and not {i, to.member} & (self.down | self.apart):
                    agent.reached(self.now)
                    if to.member in self.stalled:
                        continue
                    agent.answered(self.now, self.agents[to.member].take(self.now, agent.beat(to)))
                agent.standing(self.now)

    def says(self, member: int) -> Standing:
        return self.agents[member].standing(self.now)


@pytest.fixture
def gang() -> Gang:
    found = Gang()
    found.assign(assignment())
    found.goes_on(5)
    return found


def test_the_relay_speaks_for_all_that_beat_to_it(gang: Gang) -> None:
    assert [gang.says(i) for i in range(3)] == [Standing(), Standing("boot-0"), Standing("boot-0")]


def test_an_agent_that_misses_three_beats_is_suspect_and_one_that_misses_two_is_not(gang: Gang) -> None:
    gang.down.add(2)
    gang.goes_on(3)
    assert gang.says(0).suspects == ()
    gang.goes_on(0.25)
    assert gang.says(0).suspects == (2,)


def test_one_late_beat_makes_nobody_suspect(gang: Gang) -> None:
    gang.down.add(2)
    gang.goes_on(2.75)
    gang.down.clear()
    for _ in range(8):
        gang.goes_on(0.25)
        assert gang.says(0).suspects == ()


def test_a_suspect_that_beats_again_is_cleared(gang: Gang) -> None:
    gang.down.add(2)
    gang.goes_on(10)
    gang.down.clear()
    gang.goes_on(1)
    assert gang.says(0).suspects == ()
    assert gang.says(2).relayed_by == "boot-0"


def test_agents_of_a_silent_relay_speak_for_themselves_first_and_suspect_it_a_beat_later(gang: Gang) -> None:
    gang.down.add(0)
    gang.goes_on(2)
    assert gang.says(1) == Standing("boot-0")
    gang.goes_on(0.25)
    assert gang.says(1) == Standing()
    gang.goes_on(1)
    assert gang.says(1) == gang.says(2) == Standing(suspects=(0,))


def test_an_agent_cut_off_from_its_relay_speaks_for_itself_before_that_one_suspects_it(gang: Gang) -> None:
    gang.apart.add(1)
    while gang.says(1).relayed_by:
        assert gang.says(0).suspects == ()
        gang.goes_on(0.25)
    gang.goes_on(1)
    assert (gang.says(0).suspects, gang.says(1).suspects, gang.says(2)) == ((1,), (0,), Standing("boot-0"))


def test_an_agent_that_only_has_no_cpu_is_suspect_much_later(gang: Gang) -> None:
    gang.stalled.add(2)
    gang.goes_on(RHYTHM.stall - 0.25)
    assert gang.says(0).suspects == ()
    gang.goes_on(0.25)
    assert gang.says(0).suspects == (2,)


def test_agents_of_a_relay_that_only_has_no_cpu_speak_for_themselves_and_suspect_it_much_later(gang: Gang) -> None:
    gang.stalled.add(0)
    gang.goes_on(RHYTHM.stall - 0.25)
    assert gang.says(1) == gang.says(2) == Standing()
    gang.goes_on(0.25)
    assert gang.says(1) == gang.says(2) == Standing(suspects=(0,))


def test_who_stood_still_itself_suspects_nobody_for_it(gang: Gang) -> None:
    gang.now += 60
    assert [gang.says(i).suspects for i in range(3)] == [(), (), ()]
    gang.goes_on(1)
    assert [gang.says(i) for i in range(3)] == [Standing(), Standing("boot-0"), Standing("boot-0")]


def test_a_relay_whose_lease_is_not_renewed_speaks_for_nobody_and_is_not_suspected(gang: Gang) -> None:
    gang.leases = False
    gang.goes_on(TRUSTED_RENEWALS * RHYTHM.renewal + 1)
    assert [gang.says(i) for i in range(3)] == [Standing(), Standing(), Standing()]
    gang.leases = True
    gang.goes_on(1)
    assert gang.says(1) == Standing("boot-0")


def test_a_member_that_never_beats_is_suspect_after_a_grace_of_its_own() -> None:
    gang = Gang()
    gang.down = {2}
    gang.assign(assignment(members=(0, 1)), 0, 1)
    gang.goes_on(60)
    assert gang.says(0).suspects == ()
    gang.assign(assignment(2), 0, 1)
    gang.goes_on(3)
    assert gang.says(0).suspects == ()
    gang.goes_on(0.25)
    assert gang.says(0).suspects == (2,)


def test_one_that_stands_by_is_watched_once_it_has_beaten() -> None:
    gang = Gang()
    gang.assign(assignment(members=(0, 1)))
    gang.goes_on(5)
    assert gang.says(2).relayed_by == "boot-0"
    gang.down.add(2)
    gang.goes_on(4)
    assert gang.says(0).suspects == (2,)


def test_a_later_attempt_with_the_same_relay_forgets_nobody(gang: Gang) -> None:
    gang.down.add(2)
    gang.goes_on(2)
    gang.assign(assignment(2), 0, 1)
    gang.goes_on(1.25)
    assert gang.says(0).suspects == (2,)


def test_another_relay_begins_with_a_fresh_grace_for_all(gang: Gang) -> None:
    gang.down.add(0)
    gang.goes_on(4)
    gang.assign(assignment(2, relay(1), (1, 2)), 1, 2)
    assert [gang.says(i) for i in (1, 2)] == [Standing(), Standing()]
    gang.goes_on(3)
    assert [gang.says(i) for i in (1, 2)] == [Standing(), Standing("boot-1")]


def test_without_a_relay_every_agent_speaks_for_itself(gang: Gang) -> None:
    gang.assign(assignment(2, None))
    gang.goes_on(10)
    assert [gang.says(i) for i in range(3)] == [Standing()] * 3


def test_an_older_assignment_changes_nothing(gang: Gang) -> None:
    gang.assign(assignment(2))
    gang.assign(assignment(1, relay(2)))
    assert gang.agents[1].target == relay(0)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"to": "boot-9"}, "the beat is for agent boot-9, this is boot-0"),
        ({"attempt": 0}, "the beat is of attempt 0, this is 1"),
        ({"boot_id": "boot-9"}, "attempt 1 lists agent boot-1 for member 1, not boot-9"),
        ({"incarnation": -1}, "Pod 0 of member 1 is heard, later than -1"),
    ],
)
def test_a_beat_of_another_run_attempt_agent_or_pod_is_refused_and_counts_for_nothing(
    gang: Gang, changes: dict[str, str | int], why: str
) -> None:
    gang.down.add(1)
    gang.goes_on(4)
    beat = Beat("boot-0", 1, 0, "boot-1", 1)
    answer = gang.agents[0].take(gang.now, replace(beat, **changes))  # type: ignore[arg-type]
    assert (answer.relays, answer.refused) == (False, why)
    assert gang.says(0).suspects == (1,)
    assert gang.agents[0].take(gang.now, beat) == Answer("boot-0", relays=True)
    assert gang.says(0).suspects == ()


def test_a_refused_agent_speaks_for_itself_and_suspects_nobody(gang: Gang) -> None:
    gang.assign(assignment(2), 0)  # the watch of the others is late
    gang.goes_on(RHYTHM.stall)
    assert gang.says(1) == Standing()
    assert gang.says(0).suspects == (1, 2)


def test_the_answer_of_whoever_got_the_relay_s_address_is_no_answer(gang: Gang) -> None:
    gang.down.add(0)
    for _ in range(16):
        gang.goes_on(0.25)
        gang.agents[1].answered(gang.now, Answer("somebody", relays=True))
    assert gang.says(1).suspects == (0,)


def test_the_longest_silence_is_that_of_the_quietest(gang: Gang) -> None:
    gang.down.add(2)
    gang.goes_on(2)
    assert gang.agents[0].longest_silence(gang.now) == 2
    assert gang.agents[1].longest_silence(gang.now) == 0


REPORT = Report("b", "p", 0, "n", 1, "training")


@pytest.mark.parametrize(
    ("changes", "news"),
    [
        ({"progress": Progress(iteration=7)}, False),
        ({"relayed_by": "boot-0"}, False),
        ({"state": "failed"}, True),
        ({"suspects": (1,)}, True),
    ],
)
def test_progress_and_a_relay_that_begins_to_speak_are_no_news(changes: dict[str, object], news: bool) -> None:
    assert is_news(REPORT, replace(REPORT, **changes)) == news  # type: ignore[arg-type]


@pytest.mark.parametrize("then", ["", "boot-1"])
def test_a_relay_that_speaks_no_more_is_news(then: str) -> None:
    assert is_news(replace(REPORT, relayed_by="boot-0"), replace(REPORT, relayed_by=then))


def test_a_lease_rests_only_while_it_names_the_relay_that_speaks() -> None:
    relayed = replace(REPORT, relayed_by="boot-0")
    assert is_relayed(relayed, relayed)
    assert not is_relayed(REPORT, relayed)
    assert not is_relayed(relayed, REPORT)
    assert not is_relayed(REPORT, REPORT)
