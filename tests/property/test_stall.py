"""A gang whose iterations vary within the multiple that is allowed is never judged, and one that stops always is."""

from hypothesis import given, settings
from hypothesis import strategies as st

from starcoder_trainer.agent.stall import LOOK_SECONDS, Overdue, Watch
from starcoder_trainer.contract.config import HangConfig
from starcoder_trainer.contract.stamp import Stamp
from starcoder_trainer.pace import LEARNT, TIMES, Pace

FLOORS = HangConfig(iteration=5.0, first_iteration=30.0, checkpoint=20.0)


class Gang:
    """Two ranks in two Pods: each stamps by itself, each agent looks when it gets round to it."""

    def __init__(self, lateness: list[float]) -> None:
        self.now = 0.0
        self.stamps: dict[int, Stamp] = {}
        self.paces = [
            Pace(1, FLOORS, lambda stamp, rank=rank: self.stamps.__setitem__(rank, stamp), lambda: self.now)
            for rank in (0, 1)
        ]
        self.watches = [Watch(1, (rank,), FLOORS, 0.0) for rank in (0, 1)]
        self.lateness = lateness
        self.looked = 0
        self.next_look = 0.0
        self.judged: list[Overdue] = []

    def passes(self, seconds: float) -> None:
        stop = self.now + seconds
        while self.next_look <= stop:
            self.now = self.next_look
            for rank, watch in enumerate(self.watches):
                if found := watch.look(self.now, {rank: self.stamps[rank]}, True):
                    self.judged.append(found)
            late = self.lateness[self.looked % len(self.lateness)] if self.lateness else 0.0
            self.next_look += LOOK_SECONDS + late
            self.looked += 1
        self.now = stop

    def all(self, do: str, *args: object) -> None:
        for pace in self.paces:
            getattr(pace, do)(*args)


def run(gang: Gang, first: float, fastest: float, factors: list[float], every: int) -> None:
    gang.all("enter", "form")
    gang.all("formed", 0)
    gang.all("enter", "data")
    gang.passes(first)
    gang.all("done", 1)
    for number, factor in enumerate(factors, start=2):
        gang.all("enter", "data")
        gang.passes(fastest * factor * 0.3)
        gang.all("enter", "forward_backward")
        gang.passes(fastest * factor * 0.7)
        gang.all("done", number)
        if number % every == 0:
            gang.all("enter", "checkpoint")
    gang.all("enter", "data")


within = st.lists(st.floats(1.0, TIMES * 0.999), min_size=1, max_size=60)
late = st.lists(st.floats(0.0, 40.0), max_size=5)


@settings(max_examples=300, deadline=None)
@given(
    first=st.floats(0.0, 29.0), fastest=st.floats(0.01, 20.0), factors=within, lateness=late, every=st.integers(1, 9)
)
def test_iterations_within_the_multiple_are_never_judged(first, fastest, factors, lateness, every):
    gang = Gang(lateness)
    # Until some are known the floor of the first is what holds.
    warm = [min(f, 29.0 / fastest) if n < LEARNT else f for n, f in enumerate(factors)]
    run(gang, first, fastest, warm if fastest <= 29.0 else [], every)
    assert gang.judged == []


@settings(max_examples=100, deadline=None)
@given(fastest=st.floats(0.01, 20.0), factors=within, every=st.integers(1, 9))
def test_a_gang_that_stops_is_judged_by_all_its_agents_at_about_the_same_time(fastest, factors, every):
    gang = Gang([])
    run(gang, 1.0, min(fastest, 3.0), factors, every)
    assert gang.judged == []
    limit = gang.stamps[0].allowed
    assert limit == gang.stamps[1].allowed, "both have learned the same"
    gang.passes(limit + 3 * LOOK_SECONDS)
    assert len(gang.judged) >= 2
    assert gang.judged[0].allowed == gang.judged[1].allowed == limit
