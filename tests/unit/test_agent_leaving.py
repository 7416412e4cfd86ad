"""How an agent leaves: its workers take a checkpoint first, and nobody goes before it is safe or time is up."""

import pytest

from starcoder_trainer.agent import messages as m
from starcoder_trainer.contract.report import Failure
from tests.support.told_agent import OFFER, Agent, kinds, verified


@pytest.mark.parametrize("told", [m.Terminated, m.WorkersTerminated])
def test_an_agent_whose_pod_is_to_end_asks_its_workers_to_leave_once(told):
    agent = Agent(1).training(3).tell(told)
    assert agent.did == (m.LeaveWorkers(3),)
    assert agent.said.state == "draining"
    assert agent.tell(m.Ticked).did == ()


def test_drain_asks_the_workers_of_its_attempt_to_leave_once():
    agent = Agent(1).training(3).assigned(3, "drain")
    assert agent.did == (m.LeaveWorkers(3),)
    assert agent.said.state == "draining"
    assert agent.assigned(3, "drain").did == ()


def test_a_follower_has_left_when_its_shard_is_uploaded():
    agent = Agent(1).training(3).assigned(3, "drain").left(3, 13)
    assert agent.said.state == "draining"
    agent.tell(m.ShardUploaded, 3, 13)
    assert agent.said.state == "left"
    assert agent.said.progress.iteration == 13
    assert agent.did == (), "its Pod stays"


def test_the_leader_has_left_when_the_checkpoint_is_in_head():
    agent = Agent(0).training(3).assigned(3, "drain").left(3, 13).tell(m.ShardUploaded, 3, 13)
    assert agent.did == (m.Commit(3, 13, 2),)
    assert agent.said.state == "draining"
    agent.tell(m.CheckpointVerified, 3, verified(13))
    assert agent.said.state == "left"


def test_workers_that_leave_because_another_member_was_asked_are_no_failure():
    agent = Agent(1).training(3).left(3, 13)
    assert agent.said.state == "draining"
    agent.tell(m.ShardUploaded, 3, 13)
    assert (agent.said.state, agent.said.failure) == ("left", None)


def test_who_has_left_joins_the_next_attempt_in_the_same_pod():
    agent = Agent(1).training(3).left(3, 13).tell(m.ShardUploaded, 3, 13).assigned(4, "hold")
    assert (agent.said.attempt, agent.said.state) == (4, "idle")
    assert kinds(agent.assigned(4, "run").did) == [m.StartWorkers]


def test_an_attempt_that_was_left_is_not_started_again():
    agent = Agent(1).training(3).left(3, 13).tell(m.ShardUploaded, 3, 13)
    assert agent.assigned(3, "drain").did == ()
    assert agent.assigned(3, "run").did == ()
    assert agent.said.state == "left"


def test_a_terminated_follower_exits_when_its_shard_is_uploaded_and_not_before():
    agent = Agent(1).training(3).tell(m.Terminated).left(3, 13)
    assert agent.did == ()
    agent.tell(m.ShardUploaded, 3, 13)
    assert agent.did == (m.Exit(),)
    assert agent.said.state == "left"


def test_a_terminated_leader_exits_when_the_checkpoint_is_in_head_and_not_before():
    agent = Agent(0).training(3).tell(m.Terminated).left(3, 13).tell(m.ShardUploaded, 3, 13)
    assert kinds(agent.did) == [m.Commit]
    assert agent.tell(m.CheckpointVerified, 3, verified(13)).did == (m.Exit(),)
    assert agent.said.state == "left"


def test_an_agent_that_is_told_by_its_worker_container_alone_waits_for_its_own_sigterm():
    agent = Agent(1).training(3).tell(m.WorkersTerminated).left(3, 13).tell(m.ShardUploaded, 3, 13)
    assert agent.did == ()
    assert agent.tell(m.WorkersLost, Failure("Crash", "gone")).did == ()
    assert agent.said.state == "left"
    assert agent.tell(m.Terminated).did == (m.Exit(),)


def test_the_uploads_of_a_pod_whose_worker_container_has_ended_go_on():
    agent = Agent(1).training(3).tell(m.WorkersTerminated).left(3, 13).tell(m.WorkersLost, Failure("Crash", "gone"))
    agent.now = 100
    assert agent.tell(m.Terminated).did == ()
    assert (agent.said.state, agent.said.problem) == ("draining", None)
    assert agent.tell(m.ShardUploaded, 3, 13).did == (m.Exit(),)


@pytest.mark.parametrize("order", ["drain", "sigterm"])
def test_workers_that_have_not_begun_to_train_are_stopped_since_nothing_is_lost(order):
    agent = Agent(1).running(3)
    agent = agent.assigned(3, "drain") if order == "drain" else agent.tell(m.Terminated)
    assert agent.did == (m.StopWorkers(3),)
    agent.tell(m.WorkersStopped)
    assert (agent.said.state, agent.said.progress.iteration) == ("left", 10)
    assert agent.did == ((m.Exit(),) if order == "sigterm" else ())


def test_who_trained_to_the_end_meanwhile_is_done_and_has_not_left():
    agent = Agent(1).training(3).tell(m.Terminated).saved(3, 20).exited(3, 2).exited(3, 3)
    assert agent.did == ()
    agent.tell(m.ShardUploaded, 3, 20)
    assert agent.said.state == "done"
    assert agent.did == (m.Exit(),)


def test_a_terminated_agent_without_workers_exits_at_once():
    assert Agent(1).ready().assigned(1, "hold").tell(m.Terminated).did == (m.Exit(),)


def test_nothing_is_started_in_a_pod_that_is_to_end():
    agent = Agent(1).ready().assigned(1, "hold").tell(m.WorkersTerminated).assigned(1, "run")
    assert agent.did == ()


def test_a_terminated_agent_whose_attempt_failed_waits_for_what_is_being_uploaded_alone():
    agent = Agent(0).training(3).saved(3, 10).exited(3, 0, 75, "Peer").tell(m.WorkersStopped)
    assert agent.tell(m.Terminated).did == ()
    assert kinds(agent.tell(m.ShardUploaded, 3, 10).did) == [m.Commit, m.Exit]


def test_an_upload_that_will_never_be_holds_nobody_up():
    agent = Agent(1).training(3).saved(3, 10).exited(3, 2, 75, "Peer").tell(m.WorkersStopped).tell(m.Terminated)
    assert agent.tell(m.UploadAbandoned, 3, 10).did == (m.Exit(),)


def test_a_leader_whose_attempt_is_fenced_waits_for_no_commit():
    agent = Agent(0).training(3).tell(m.Terminated).left(3, 13).tell(m.ShardUploaded, 3, 13)
    assert agent.tell(m.FencedOut, 3, 4).did == (m.Exit(),)
    assert agent.said.state == "draining"


def test_a_later_attempt_ends_workers_that_are_leaving():
    agent = Agent(1).training(3).assigned(3, "drain").assigned(4, "hold")
    assert agent.did == (m.StopWorkers(3),)
    agent.tell(m.WorkersStopped)
    assert (agent.said.attempt, agent.said.state, agent.said.problem) == (4, "idle", None)


def test_a_worker_that_fails_while_leaving_fails_the_attempt():
    agent = Agent(1).training(3).assigned(3, "drain").exited(3, 2, 75, "Peer")
    assert agent.said.state == "failed"
    assert agent.did == (m.StopWorkers(3),)


def test_a_last_checkpoint_that_can_never_be_committed_is_a_failure_of_leaving():
    agent = Agent(0).training(3).assigned(3, "drain").left(3, 13).tell(m.ShardUploaded, 3, 13)
    agent.tell(m.CheckpointRefused, 3, 13, "cut")
    assert (agent.said.state, agent.said.failure.cause) == ("failed", "Storage")


@pytest.mark.parametrize(("grace", "gives_up"), [(300, 290), (20, 15)])
def test_just_before_the_grace_period_ends_it_gives_up_workers_that_do_not_come_to_an_end(grace, gives_up):
    agent = Agent(0, grace=grace).training(3).tell(m.WorkersTerminated)
    agent.now = gives_up - 0.1
    assert agent.tell(m.Ticked).did == ()
    agent.now = gives_up
    assert agent.tell(m.Ticked).did == (m.StopWorkers(3),)
    problem = agent.said.problem
    assert problem.reason == "GraceExceeded"
    assert "the workers have not come to the end of their iteration" in problem.message
    assert f"after {grace} s" in problem.message
    assert agent.tell(m.WorkersStopped).tell(m.Terminated).did == (m.Exit(),)


def test_just_before_the_grace_period_ends_it_gives_up_an_upload_and_names_the_newest_checkpoint():
    agent = Agent(0).ready().assigned(3, "hold").tell(m.Prepared, 3, OFFER, verified(10)).training(3)
    agent.tell(m.WorkersTerminated).left(3, 13)
    agent.now = 200
    assert agent.tell(m.Terminated).did == ()
    agent.now = 290
    assert agent.tell(m.Ticked).did == (m.Exit(),)
    assert agent.said.state == "draining"
    assert "the checkpoint of iteration 13 is not whole in S3" in agent.said.problem.message
    assert "from the newest verified checkpoint, iteration 10" in agent.said.problem.message


def test_a_fork_server_that_goes_first_when_the_pod_ends_is_no_failure():
    agent = Agent(1).training(3).tell(m.Terminated).tell(m.WorkersLost, Failure("Crash", "gone"))
    assert agent.did == (m.Exit(),)
    assert agent.said.failure is None
