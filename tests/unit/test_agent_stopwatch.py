"""Where an agent says that the seconds of its attempt went."""

from __future__ import annotations

from starcoder_trainer.contract.report import Spent
from starcoder_trainer.contract.worker import Exited, Step
from tests.unit.test_agent_machine import Agent, m, verified


def step(agent: Agent, iteration: int, *, data: float = 0.0, checkpoint: float = 0.0, attempt: int = 3) -> None:
    message = Step(attempt, 2 * agent.place, iteration, 0, 0, 5.5, 1e-3, 0.7, 1234.0, {}, None, data, checkpoint)
    agent.tell(m.WorkerStepped, message)


def at(agent: Agent, now: float) -> Agent:
    agent.now = now
    return agent


def spent(agent: Agent) -> Spent:
    assert agent.said.progress is not None
    assert agent.said.progress.spent is not None
    return agent.said.progress.spent


def started(agent: Agent, attempt: int = 3, loading: float = 2.0) -> Agent:
    for rank in (2 * agent.place, 2 * agent.place + 1):
        agent.tell(m.WorkerStarted, m.Started(attempt, rank, 10, "sdpa", loading))
    return agent


def test_forming_and_loading_are_told_apart_when_training_begins() -> None:
    agent = at(Agent(1), 100.0).running(3)
    started(at(agent, 105.0))
    assert spent(agent) == Spent(forming=3.0, loading=2.0)


def test_the_seconds_of_iterations_are_divided_as_the_workers_say() -> None:
    agent = started(at(at(Agent(1), 100.0).running(3), 105.0))
    step(at(agent, 109.0), 11, data=0.5, checkpoint=1.0)
    assert spent(agent) == Spent(3.0, 2.0, data=0.5, checkpoint=1.0, compute=2.5, first_iteration=4.0)
    step(at(agent, 115.0), 12, data=0.75, checkpoint=2.0)
    assert spent(agent) == Spent(3.0, 2.0, data=0.75, checkpoint=2.0, compute=7.25, first_iteration=4.0)
    assert spent(agent).total == 15.0


def test_what_workers_say_of_themselves_is_never_more_than_has_passed() -> None:
    agent = started(at(at(Agent(1), 100.0).running(3), 101.0), loading=9.0)
    step(at(agent, 102.0), 11, data=0.75, checkpoint=5.0)
    assert spent(agent) == Spent(0.0, 1.0, data=0.75, checkpoint=0.25, compute=0.0, first_iteration=1.0)


def test_waiting_for_the_last_checkpoint_is_a_checkpoints_time() -> None:
    agent = started(at(at(Agent(0), 100.0).running(3), 105.0))
    step(at(agent, 110.0), 20)
    agent.saved(3, 20)
    for rank in (0, 1):
        agent.tell(m.WorkerExited, Exited(3, rank, 0, None))
    at(agent, 112.5).tell(m.CheckpointVerified, 3, verified(20))
    assert agent.said.state == "done"
    assert spent(agent) == Spent(3.0, 2.0, checkpoint=2.5, compute=5.0, first_iteration=5.0)


def test_another_attempt_counts_from_nothing() -> None:
    agent = started(at(at(Agent(1), 100.0).running(3), 105.0))
    step(at(agent, 110.0), 11)
    agent.assigned(4, "hold").tell(m.WorkersStopped)
    at(agent, 200.0).assigned(4, "run")
    assert agent.said.progress is not None
    assert agent.said.progress.spent is None, "nothing of the attempt before is told as this one's"
    started(at(agent, 201.0), attempt=4, loading=0.25)
    assert spent(agent) == Spent(forming=0.75, loading=0.25)
