"""An agent whose workers make no progress: they are asked why first, then it is told and they are stopped."""

from __future__ import annotations

from collections.abc import Mapping

from starcoder_trainer.agent import messages as m
from starcoder_trainer.contract.stamp import Stamp
from starcoder_trainer.contract.worker import Sight
from tests.support.told_agent import RANKS, Agent

ALLOWED = 20.0


def stamps(attempt: int, interval: int) -> Mapping[int, Stamp]:
    return {rank: Stamp(attempt, interval, interval, "forward_backward", ALLOWED) for rank in RANKS[1]}


def observed(agent: Agent, attempt: int, interval: int, seconds: float) -> list[m.Action]:
    """Looks at each second, and all that came of them."""
    did: list[m.Action] = []
    for _ in range(int(seconds)):
        agent.now += 1.0
        agent.tell(m.Observed, stamps(attempt, interval), True)
        did += agent.did
    return did


def hanging(attempt: int = 3) -> Agent:
    """Its workers were found to hang and are asked."""
    agent = Agent(1).training(attempt)
    assert observed(agent, attempt, 7, ALLOWED + 1) == []
    (asked,) = observed(agent, attempt, 7, 5)
    assert isinstance(asked, m.Interrogate)
    assert (asked.overdue.attempt, asked.stamps) == (attempt, stamps(attempt, 7))
    return agent


def told(agent: Agent, attempt: int, *sights: Sight) -> Agent:
    return agent.tell(m.Testified, attempt, sights, "stacks are there")


STOPPED, WAITING = Sight(2, 12, "T"), Sight(3, 13, "S")


def test_workers_are_asked_before_anybody_is_told_or_stopped() -> None:
    assert hanging().said.state == "training"


def test_what_they_say_is_told_as_the_failure_and_they_are_stopped() -> None:
    agent = told(hanging(), 3, STOPPED, WAITING)
    assert agent.did == (m.StopWorkers(3),)
    said = agent.said
    assert said.state == "failed"
    assert said.failure is not None
    assert (said.failure.cause, said.failure.rank, said.failure.suspicion[0]) == ("Hang", 2, 0)


def test_no_answer_of_the_fork_server_is_told_as_well() -> None:
    agent = hanging().tell(m.Testified, 3, None, "")
    assert agent.said.failure is not None
    assert agent.said.failure.cause == "Hang"


def test_workers_that_go_on_while_they_are_asked_are_left_alone() -> None:
    agent = hanging()
    assert observed(agent, 3, 8, 3) == []
    told(agent, 3, STOPPED, WAITING)
    assert (agent.did, agent.said.state) == ((), "training")
    assert observed(agent, 3, 8, ALLOWED - 4) == []
    assert len(observed(agent, 3, 8, 5)) == 1, "a later hang is one of its own"


def test_peers_that_another_pod_has_stopped_already_don_t_hide_why() -> None:
    agent = hanging().exited(3, 3, 75, "Peer")
    assert agent.said.state == "training"
    told(agent, 3, STOPPED)
    assert agent.said.failure is not None
    assert agent.said.failure.cause == "Hang"


def test_a_worker_that_ends_by_itself_while_it_is_asked_tells_more_than_the_hang() -> None:
    agent = hanging().exited(3, 3, 70, "Crash")
    assert agent.said.failure is not None
    assert agent.said.failure.cause == "Crash"
    told(agent, 3, STOPPED)
    assert agent.said.failure.cause == "Crash"


def test_what_was_seen_of_an_attempt_can_t_judge_the_next() -> None:
    agent = hanging().assigned(4, "hold").tell(m.WorkersStopped).assigned(4, "run")
    told(agent, 3, STOPPED)
    assert observed(agent, 3, 7, 300) == [], "stamps of attempt 3 lie there still"
    assert (agent.said.attempt, agent.said.state) == (4, "starting")


def test_workers_that_are_being_stopped_are_not_watched() -> None:
    agent = Agent(1).training(3).assigned(4, "hold")
    assert agent.machine.watched is None
    assert observed(agent, 3, 7, 100) == []


def test_workers_are_told_where_to_keep_their_stamps() -> None:
    (start,) = Agent(1).running(3).did
    assert start.start.stamps == "/run/stamps"


def test_workers_that_don_t_end_are_told_so_that_the_pod_is_replaced() -> None:
    agent = Agent(1).training(3).assigned(4, "hold").tell(m.Ticked)
    agent.now = 59
    agent.tell(m.Ticked)
    assert agent.said.problem is None
    agent.now = 61
    agent.tell(m.Ticked)
    assert agent.said.problem is not None
    assert agent.said.problem.reason == "WorkersStuck"
    assert "did not end within 60 s of SIGKILL" in agent.said.problem.message
    agent.tell(m.WorkersStopped)
    assert agent.said.problem is None
    assert (agent.said.attempt, agent.said.state) == (4, "idle")
