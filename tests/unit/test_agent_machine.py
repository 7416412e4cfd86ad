"""What an agent decides: which workers run, what it answers."""

import signal
from dataclasses import replace

import pytest

from starcoder_trainer.agent import messages as m
from starcoder_trainer.contract.assignment import Assignment, Layout, Member
from starcoder_trainer.contract.report import Failure, Problem
from starcoder_trainer.contract.worker import Exited, Saved, Started, Step
from tests.support.told_agent import CONFIG, OFFER, RANKS, Agent, kinds, verified


def test_an_agent_is_idle_for_an_attempt_once_its_fork_server_is_warm():
    agent = Agent(1).assigned(1, "hold")
    assert (agent.said.attempt, agent.said.state) == (0, "idle")
    agent.ready()
    assert (agent.said.attempt, agent.said.state) == (1, "idle")


def test_the_leader_prepares_while_holding_and_the_others_do_not():
    assert Agent(0).assigned(1, "hold").did == (m.Prepare(1, CONFIG),)
    assert Agent(1).assigned(1, "hold").did == ()


def test_the_leader_prepares_once_an_attempt():
    agent = Agent(0).assigned(1, "hold").assigned(1, "hold")
    assert agent.did == ()


def test_the_offer_is_reported_when_prepared_and_gone_with_the_next_attempt():
    agent = Agent(0).ready().assigned(1, "hold").tell(m.Prepared, 1, OFFER, verified(10))
    assert agent.said.offer == OFFER
    assert agent.said.verified == verified(10)
    agent.assigned(2, "hold")
    assert agent.said.offer is None


def test_a_late_answer_of_an_abandoned_preparation_is_not_offered():
    agent = Agent(0).ready().assigned(1, "hold").assigned(2, "hold").tell(m.Prepared, 1, OFFER, None)
    assert agent.said.offer is None


def test_a_hindrance_is_told_until_it_is_mended():
    found = Problem("DataNotFound", "no data")
    agent = Agent(0).ready().assigned(1, "hold").tell(m.PrepareHindered, 1, found)
    assert agent.said.problem == found
    assert agent.said.state == "idle"
    agent.tell(m.Prepared, 1, OFFER, None)
    assert agent.said.problem is None


def test_a_hindrance_is_told_also_when_the_workers_get_ready_meanwhile():
    found = Problem("CredentialsMissing", "no Secret")
    agent = Agent(0).assigned(1, "hold").tell(m.PrepareHindered, 1, found).ready()
    assert agent.said.problem == found
    agent.assigned(2, "hold")
    assert agent.said.problem is None, "the next attempt prepares anew"


def test_a_hindrance_is_over_as_soon_as_the_leader_has_head_though_the_rest_takes_its_time():
    found = Problem("StorageUnreachable", "no answer")
    agent = Agent(0).ready().assigned(1, "hold").tell(m.PrepareHindered, 1, found)
    assert agent.tell(m.PrepareHindered, 1, None).said.problem is None
    assert agent.said.offer is None


def test_a_late_answer_of_who_leads_no_more_is_not_taken_for_what_is_verified():
    agent = Agent(0).ready().assigned(1, "hold").assigned(2, "hold", listed=False)
    agent.tell(m.Prepared, 1, OFFER, verified(20))
    assert (agent.said.offer, agent.said.verified) == (None, None)


def test_a_leader_that_has_asked_s3_itself_tells_nothing_of_what_uploads_of_before_meet():
    found = Problem("StorageUnreachable", "no answer")
    agent = Agent(0).training(1).tell(m.StorageTrouble, found).assigned(2, "hold").tell(m.WorkersStopped)
    assert agent.said.problem == found, "it has not asked yet"
    assert agent.tell(m.PrepareHindered, 2, None).said.problem is None
    agent.tell(m.Prepared, 2, OFFER, None)
    assert (agent.said.offer, agent.said.problem) == (OFFER, None)
    assert agent.assigned(2, "run").said.problem == found, "while training it is told"


def test_who_does_not_lead_tells_of_its_uploads_also_while_an_attempt_is_held():
    found = Problem("StorageUnreachable", "no answer")
    agent = Agent(1).training(1).tell(m.StorageTrouble, found).assigned(2, "hold")
    assert agent.said.problem == found


def test_what_a_leader_prepared_counts_though_an_older_look_of_the_assignment_comes_late():
    agent = Agent(0).ready().assigned(1, "hold").assigned(1, "hold", listed=False).tell(m.Prepared, 1, OFFER, None)
    assert agent.assigned(1, "hold").said.offer == OFFER


def test_a_hindrance_of_who_leads_no_more_hinders_nobody():
    found = Problem("StorageUnreachable", "no answer")
    agent = Agent(0).ready().assigned(1, "hold").tell(m.PrepareHindered, 1, found)
    agent.assigned(2, "hold", listed=False).tell(m.PrepareHindered, 1, found)
    assert agent.said.problem is None


def test_a_fenced_leader_says_by_which_attempt():
    agent = Agent(0).ready().assigned(1, "hold").tell(m.FencedOut, 1, 7)
    assert agent.said.fenced_by == 7
    agent.assigned(8, "hold")
    assert agent.said.fenced_by is None


def test_workers_of_a_leader_that_head_fences_are_stopped_for_nothing_they_do_can_be_saved():
    agent = Agent(0).training(1).tell(m.FencedOut, 1, 2)
    assert kinds(agent.did) == [m.StopWorkers]
    assert (agent.said.state, agent.said.fenced_by) == ("failed", 2)
    assert agent.said.failure == Failure("Peer", "HEAD in S3 belongs to attempt 2, this is 1")


@pytest.mark.parametrize("finished", [False, True])
def test_an_attempt_whose_head_was_put_back_to_an_older_one_ends_for_it_could_never_commit(finished):
    agent = Agent(0).training(3)
    if finished:
        agent.saved(3, 100).exited(3, 0, 0).exited(3, 1, 0)
    agent.tell(m.FencedOut, 3, 1)
    assert agent.said.state == "failed"
    assert agent.said.failure.cause == "Storage"
    assert "HEAD in S3 belongs to attempt 1, this is 3: it was put back by hand" in agent.said.failure.message


def test_an_agent_that_is_not_listed_stands_by_idle_and_takes_any_place_as_soon_as_it_is():
    spare = Agent(2).ready()
    for phase in ("hold", "run"):
        spare.assigned(1, phase)
        assert (spare.did, spare.said.state, spare.said.attempt) == ((), "idle", 0)
    members = (Member(2, "boot-2"), Member(1, "boot-1"))
    held = Assignment("uid-1", 2, "hold", members, 2, Layout(2, 1, 2))
    spare.tell(m.Assigned, held, CONFIG)
    assert spare.did == (m.Prepare(2, CONFIG),), "in the first place it leads"
    assert (spare.said.state, spare.said.attempt) == ("idle", 2)
    spare.tell(m.Assigned, replace(held, phase="run", offer=OFFER), CONFIG)
    (start,) = spare.did
    assert (start.start.ranks, start.as_leader) == ((0, 1), True)


def test_workers_of_an_agent_that_the_next_attempt_does_not_list_are_stopped_and_it_stands_by():
    agent = Agent(1).training(1).assigned(2, "hold", listed=False)
    assert agent.did == (m.StopWorkers(1),)
    assert agent.said.state == "training", "not idle before they are reaped"
    agent.tell(m.WorkersStopped)
    assert (agent.said.state, agent.said.attempt) == ("idle", 1)
    agent.assigned(3, "hold")
    assert (agent.said.state, agent.said.attempt) == ("idle", 3)


def test_a_failure_is_not_told_any_more_once_the_run_has_gone_on_without_its_agent():
    agent = Agent(1).training(1).exited(1, 2, 70, "Crash")
    assert agent.said.failure is not None
    agent.tell(m.WorkersStopped).assigned(2, "hold", listed=False)
    assert (agent.said.state, agent.said.failure) == ("idle", None)


def test_run_starts_the_ranks_of_its_place():
    agent = Agent(1).running(3)
    (start,) = agent.did
    assert start.start.ranks == (2, 3)
    assert start.start.checkpoint == OFFER.checkpoint
    assert (start.start.master_address, start.start.master_port) == ("10.0.0.1", 4000)
    assert start.start.interface_address == "10.0.0.9"
    assert not start.as_leader
    assert agent.said.state == "starting"


def test_only_the_leader_hands_over_the_listening_socket():
    (start,) = Agent(0).running(3).did
    assert start.as_leader


def test_training_is_said_when_every_local_rank_has_started():
    agent = Agent(1).running(3).tell(m.WorkerStarted, Started(3, 2, 10))
    assert agent.said.state == "starting"
    agent.tell(m.WorkerStarted, Started(3, 3, 10))
    assert agent.said.state == "training"
    agent.tell(m.WorkerStepped, Step(3, 2, 11, 44, 2816, 5.5, 1e-3, 0.7, 1234.0, {"total": 0.1}))
    assert (agent.said.progress.iteration, agent.said.progress.loss) == (11, 5.5)


def test_an_attempt_is_started_once_even_if_run_is_seen_again():
    assert Agent(1).running(3).assigned(3, "run").did == ()


def test_a_lower_attempt_than_seen_is_ignored():
    agent = Agent(1).ready().assigned(5, "hold").assigned(4, "run")
    assert agent.did == ()
    assert agent.said.attempt == 5


def test_an_attempt_is_not_held_again_after_it_ran():
    agent = Agent(1).training(3).assigned(3, "hold")
    assert agent.did == ()
    assert agent.said.state == "training"


def test_an_attempt_that_runs_takes_no_other_members_and_can_still_be_stopped():
    leader = Agent(0).training(3).assigned(3, "run", listed=False)
    assert leader.exited(3, 0).exited(3, 1).said.state == "failed", "it is the leader still: no checkpoint is verified"
    assert Agent(1).training(3).assigned(3, "stop", listed=False).did == (m.QuitWorkers(),)


def test_the_assignment_of_another_run_of_the_same_name_is_ignored():
    agent = Agent(0).ready().assigned(1, "hold", run_uid="uid-old")
    assert agent.did == ()
    assert agent.said.attempt == 0


def test_hold_stops_the_workers_and_idle_is_said_only_when_they_are_reaped():
    agent = Agent(1).training(3).assigned(4, "hold")
    assert agent.did == (m.StopWorkers(3),)
    assert (agent.said.attempt, agent.said.state) == (3, "training")
    agent.tell(m.WorkersStopped)
    assert (agent.said.attempt, agent.said.state) == (4, "idle")


def test_nothing_starts_before_the_workers_before_are_reaped():
    agent = Agent(1).training(3).assigned(4, "hold").assigned(4, "run")
    assert agent.did == ()
    agent.tell(m.WorkersStopped)
    assert kinds(agent.did) == [m.StartWorkers]
    assert agent.did[0].start.attempt == 4


def test_an_agent_that_is_not_listed_stops_what_is_over_and_keeps_still():
    agent = Agent(1).training(3).assigned(4, "hold", listed=False)
    assert agent.did == (m.StopWorkers(3),)
    agent.tell(m.WorkersStopped)
    assert agent.did == ()
    agent.assigned(4, "run", listed=False)
    assert agent.did == ()
    assert agent.said.attempt == 3


def test_a_failed_worker_fails_the_attempt_at_once_and_the_others_are_stopped():
    agent = Agent(1).training(3).exited(3, 2, 70, "Crash")
    assert agent.said.state == "failed"
    assert agent.said.failure.cause == "Crash"
    assert agent.did == (m.StopWorkers(3),)
    agent.tell(m.WorkersStopped)
    assert agent.did == ()
    assert agent.said.state == "failed"


def test_a_real_cause_replaces_peer_and_not_the_other_way():
    agent = Agent(1).training(3).exited(3, 2, 75, "Peer").exited(3, 3, 78, "UserError")
    assert agent.said.failure.cause == "UserError"
    agent = Agent(1).training(3).exited(3, 2, 78, "UserError").exited(3, 3, 75, "Peer")
    assert agent.said.failure.cause == "UserError"


def test_a_worker_that_the_agent_itself_killed_is_no_cause():
    agent = Agent(1).training(3).exited(3, 2, 75, "Peer").exited(3, 3, -signal.SIGKILL, "Crash")
    assert agent.said.failure.cause == "Peer"


def test_an_exit_without_an_explanation_is_a_crash_with_its_code():
    agent = Agent(1).training(3).exited(3, 2, -11)
    assert agent.said.failure.cause == "Crash"
    assert agent.said.failure.exit_code == -11


def test_a_failed_attempt_is_followed_by_idle_of_the_next():
    agent = Agent(1).training(3).exited(3, 2, 70, "Crash").tell(m.WorkersStopped).assigned(4, "hold")
    assert (agent.said.attempt, agent.said.state, agent.said.failure) == (4, "idle", None)


def test_a_vanished_fork_server_fails_the_attempt_and_idle_waits_for_the_next_one():
    agent = Agent(1).training(3).tell(m.WorkersLost, Failure("Crash", "gone"))
    assert agent.said.state == "failed"
    agent.assigned(4, "hold")
    assert (agent.said.attempt, agent.said.state) == (3, "failed")
    agent.ready()
    assert (agent.said.attempt, agent.said.state) == (4, "idle")


def test_a_fork_server_that_vanishes_with_no_worker_fails_nothing():
    agent = Agent(1).ready().assigned(1, "hold").tell(m.WorkersLost, Failure("Crash", "gone"))
    assert agent.said.failure is None


def test_a_fork_server_that_stays_away_is_told_with_where_to_look():
    agent = Agent(1).assigned(1, "hold")
    assert agent.said.problem is None
    agent.now = 61
    agent.tell(m.Ticked)
    assert agent.said.problem.reason == "WorkerNotReady"
    assert "kubectl logs demo-w1-0 -c worker" in agent.said.problem.message
    assert agent.ready().said.problem is None


def test_a_long_wait_for_the_fork_server_is_told_in_ever_longer_steps():
    agent, told = Agent(1).assigned(1, "hold"), []
    for agent.now in range(0, 1200, 5):
        agent.tell(m.Ticked)
        if agent.said.problem and agent.said.problem not in told:
            told.append(agent.said.problem)
    assert [p.message.split("for ")[1].split(" s,")[0] for p in told] == ["60", "120", "240", "480", "960"]


def test_a_step_that_is_saved_while_a_smaller_gang_is_held_is_of_the_gang_that_saved_it():
    smaller = Assignment("uid-1", 4, "hold", (Member(1, "boot-1"),), 2, Layout(2, 1, 1))
    agent = Agent(1).training(3).tell(m.Assigned, smaller, CONFIG).saved(3, 10)
    (upload,) = agent.did
    assert (upload.attempt, upload.step, upload.world_size) == (3, 10, 4)


def test_a_step_is_uploaded_when_every_local_rank_saved_it():
    agent = Agent(1).training(3)
    agent.tell(m.WorkerSaved, Saved(3, 2, 10, "/scratch/2", 0.1, 8))
    assert agent.did == ()
    agent.tell(m.WorkerSaved, Saved(3, 3, 10, "/scratch/3", 0.1, 8))
    (upload,) = agent.did
    assert (upload.attempt, upload.step, upload.world_size) == (3, 10, 4)
    assert [s.rank for s in upload.saved] == [2, 3]


def test_only_the_leader_commits_what_was_uploaded():
    assert Agent(0).training(3).saved(3, 10).tell(m.ShardUploaded, 3, 10).did == (m.Commit(3, 10, 2),)
    assert Agent(1).training(3).saved(3, 10).tell(m.ShardUploaded, 3, 10).did == ()


def finished(agent, attempt):
    agent.training(attempt).saved(attempt, 20)
    for rank in RANKS[agent.place]:
        agent.exited(attempt, rank)
    return agent


def test_a_follower_is_done_when_its_workers_ended_well_and_its_shard_is_uploaded():
    agent = finished(Agent(1), 3)
    assert agent.said.state == "training"
    agent.tell(m.ShardUploaded, 3, 20)
    assert agent.said.state == "done"


def test_the_leader_is_done_when_the_last_checkpoint_is_in_head():
    agent = finished(Agent(0), 3).tell(m.ShardUploaded, 3, 20)
    assert agent.said.state == "training"
    agent.tell(m.CheckpointVerified, 3, verified(20))
    assert agent.said.state == "done"
    assert agent.said.verified == verified(20)


def test_a_step_that_gave_way_to_a_newer_one_holds_nothing_up():
    agent = Agent(1).training(3).saved(3, 10)
    agent = agent.saved(3, 20).exited(3, 2).exited(3, 3).tell(m.ShardUploaded, 3, 20)
    assert agent.said.state == "done"


@pytest.mark.parametrize("place", [0, 1])
def test_nobody_is_done_with_an_attempt_that_a_later_one_replaced_while_its_checkpoint_was_uploaded(place):
    """Its leader commits nothing any more, so that a checkpoint is in S3 and not in HEAD."""
    agent = finished(Agent(place), 3).tell(m.WorkersLost, Failure("Crash", "gone")).assigned(4, "hold")
    agent.tell(m.ShardUploaded, 3, 20)
    assert (agent.said.attempt, agent.said.state) == (3, "training")
    agent.ready()
    assert (agent.said.attempt, agent.said.state) == (4, "idle")


def test_a_run_that_resumes_at_its_last_checkpoint_is_done_without_saving_again():
    agent = Agent(0).ready().assigned(3, "hold").tell(m.Prepared, 3, OFFER, verified(20)).assigned(3, "run")
    agent.exited(3, 0).exited(3, 1)
    assert agent.said.state == "done"


def test_workers_that_end_well_without_the_last_checkpoint_are_a_failure_and_never_done():
    agent = Agent(0).training(3).exited(3, 0).exited(3, 1)
    assert agent.said.state == "failed"
    assert "expected 20" in agent.said.failure.message


def test_a_last_checkpoint_that_can_never_be_committed_is_a_failure():
    agent = finished(Agent(0), 3).tell(m.ShardUploaded, 3, 20).tell(m.CheckpointRefused, 3, 20, "cut")
    assert agent.said.state == "failed"
    assert agent.said.failure.cause == "Storage"


def test_stop_ends_the_worker_container_once_and_done_stays_done():
    agent = finished(Agent(1), 3).tell(m.ShardUploaded, 3, 20).assigned(3, "stop")
    assert agent.did == (m.QuitWorkers(),)
    agent.tell(m.WorkersLost, Failure("Crash", "gone")).assigned(3, "stop")
    assert agent.did == ()
    assert agent.said.state == "done"


def test_a_fork_server_that_was_started_again_is_told_to_end_as_well():
    agent = Agent(1).training(3).tell(m.WorkersLost, Failure("ContainerCrashed", "gone")).assigned(3, "stop")
    assert agent.did == (m.QuitWorkers(),)
    assert agent.tell(m.WorkersReady).did == (m.QuitWorkers(),)


def test_a_stopped_fork_server_is_not_missed():
    agent = Agent(1).ready().assigned(3, "stop").tell(m.WorkersLost, Failure("Crash", "gone"))
    agent.now = 1000
    agent.tell(m.Ticked)
    assert agent.said.problem is None


def test_a_superseded_agent_stops_its_workers_and_starts_none_ever_again():
    agent = Agent(1).training(3).tell(m.Superseded)
    assert agent.did == (m.StopWorkers(3),)
    assert agent.machine.silent
    agent.tell(m.WorkersStopped).assigned(4, "hold").assigned(4, "run")
    assert agent.did == ()


def test_storage_trouble_is_told_while_training_goes_on():
    found = Problem("StorageUnreachable", "no answer")
    agent = Agent(1).training(3).tell(m.StorageTrouble, found)
    assert (agent.said.state, agent.said.problem) == ("training", found)
    assert agent.tell(m.StorageTrouble, None).said.problem is None


@pytest.mark.parametrize("event", [m.WorkerStarted, m.WorkerExited])
def test_words_of_workers_of_an_older_attempt_change_nothing(event):
    agent = Agent(1).training(3).assigned(4, "hold").tell(m.WorkersStopped).assigned(4, "run")
    before = agent.said
    agent.tell(event, Started(3, 2, 0) if event is m.WorkerStarted else Exited(3, 2, 70, Failure("Crash", "old")))
    assert agent.said == before
    assert agent.did == ()
