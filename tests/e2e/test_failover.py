"""Each way in which a part of a run goes away: what is told, who takes over, and that nothing verified is lost."""

from __future__ import annotations

from typing import Any

import pytest

from devcluster.cluster import Cluster
from starcoder_operator.domain.failure import CAUSES, Charge
from starcoder_trainer.contract import names
from starcoder_trainer.contract.ledger import stacks_key
from tests.support.cluster import Run, manifest, resumed, started_at, until, worker_pids

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

LONG: dict[str, Any] = {"training__iterations": 5000}
"""Does not end while a test looks at it."""
SPARE: dict[str, Any] = LONG | {"elasticity__spares": 1}


UNCHARGED = {cause for cause, rule in CAUSES.items() if rule.charge is Charge.NOBODY}


def spare_of(*members: int) -> int:
    """The one of three that does not take part."""
    return next(i for i in range(3) if i not in members)


def test_a_spare_takes_the_place_of_a_member_whose_node_is_killed(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("spare", **SPARE)).apply()
    before = run.until_checkpoint()
    run.until(lambda s: s["workers"].get("spares") == 1, "the spare stands by")
    stays, lost = run.members()
    node = run.node_of(lost)
    trained_on.kill_node(node)
    try:
        status = resumed(run, before)
        assert run.members() == [stays, spare_of(stays, lost)], "the spare did not take over the lost member's rank"
        assert status["lastFailure"]["node"] == node
        assert status["restartsWithoutProgress"] == 0
        assert status["workers"]["ready"] == 2
        assert started_at(run) >= before["checkpoint"]["iteration"] > 0
    finally:
        trained_on.start_node(node)
    run.until(lambda s: s["workers"].get("spares") == 1, "a new Pod stands by")
    assert run.status["attempt"] == status["attempt"], "a spare that came back ended the attempt"
    run.delete()


def test_a_spare_on_a_node_that_dies_is_replaced_and_no_attempt_ends(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("idle-spare", **SPARE)).apply()
    before = run.until_checkpoint()
    run.until(lambda s: s["workers"].get("spares") == 1, "the spare stands by")
    node = run.node_of(spare_of(*run.members()))
    trained_on.kill_node(node)
    try:
        run.until(lambda s: s["workers"].get("spares", 0) == 0, "the loss is told")
        run.until_checkpoint(before["checkpoint"]["iteration"] + 20)
    finally:
        trained_on.start_node(node)
    status = run.until(lambda s: s["workers"].get("spares") == 1, "another stands by")
    assert (status["attempt"], status["restarts"]["total"]) == (before["attempt"], 0)
    run.delete()


def test_a_partitioned_node_is_given_up_and_its_pod_is_cleaned_away_when_it_is_back(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("partition", **SPARE)).apply()
    before = run.until_checkpoint()
    run.until(lambda s: s["workers"].get("spares") == 1, "the spare stands by")
    leader = run.members()[0]  # whose agent may commit, were it not fenced
    node = run.node_of(leader)
    lost = next(n for n in run.pod_names() if n.startswith(f"partition-w{leader}-"))
    trained_on.partition(node)
    try:
        status = resumed(run, before)
        after = run.until_checkpoint(status["checkpoint"]["iteration"])
    finally:
        trained_on.heal(node)
    until(lambda: lost not in run.all_pod_names(), "the old Pod is gone")
    run.until_checkpoint(after["checkpoint"]["iteration"])
    attempts = [entry.attempt for entry in run.head().entries]
    assert attempts == sorted(attempts)
    assert run.head().attempt == run.status["attempt"] == status["attempt"], "the zombie disturbed its successor"
    run.delete()


def test_a_zombie_that_still_reaches_s3_commits_until_the_next_attempt_has_claimed_and_is_fenced(
    trained_on: Cluster,
) -> None:
    """A gang of one trains on when it is cut off: nothing but the claim of its successor keeps its checkpoints out."""
    alone = SPARE | {"workers__replicas": 1, "training__globalBatchSize": 4}
    run = Run(trained_on, manifest("zombie", **alone)).apply()
    before = run.until_checkpoint()
    run.until(lambda s: s["workers"].get("spares") == 1, "the spare stands by")
    (member,) = run.members()
    pod = run.pod_of(member)
    node = trained_on.node(pod["spec"]["nodeName"])
    workers, log = worker_pids(node.ctr, pod), f"/var/log/pods/*_{pod['metadata']['uid']}/agent/*.log"

    def of_the_zombie(words: str) -> bool:
        return node.run("sh", "-c", f"grep -hs '{words}' {log}", check=False).returncode == 0

    trained_on.partition_from_all_but_s3(node.name)
    try:
        status = resumed(run, before)
        assert run.members() != [member]
        fenced = f"fenced by attempt {status['attempt']}"
        until(lambda: of_the_zombie(fenced), "HEAD tells the zombie", dump=run.describe)
        until(lambda: not set(workers) & set(worker_pids(node.ctr, pod)), "its workers are stopped", dump=run.describe)
        run.until_checkpoint(status["checkpoint"]["iteration"])
    finally:
        trained_on.heal(node.name)
    until(lambda: pod["metadata"]["name"] not in run.all_pod_names(), "the old Pod is gone")
    attempts = [entry.attempt for entry in run.head().entries]
    assert attempts == sorted(attempts), "a checkpoint of the zombie was committed after its successor had claimed"
    assert run.head().attempt == run.status["attempt"] == status["attempt"], "the zombie disturbed its successor"
    run.delete()


def test_a_node_that_alone_does_not_reach_s3_is_passed_over_and_then_avoided(trained_on: Cluster) -> None:
    """The leader's: it can't claim HEAD, and its workers can't read when another leads."""
    run = Run(trained_on, manifest("no-way-to-s3", **LONG)).apply()
    before = run.until_checkpoint()
    leader, other = run.members()
    node = run.node_of(leader)
    trained_on.partition_from_s3(node)
    try:
        run.kill_worker(other)
        run.until(lambda s: s["reason"] == "StorageUnreachable", "the trouble is told")
        until(lambda: run.members()[0] == other, "another member leads", dump=run.describe)
        status = run.until(
            lambda s: s["state"] == "Running" and node in [a["node"] for a in s.get("avoidedNodes") or []],
            "it trains, and keeps away from the node",
            seconds=600,
        )
        assert run.node_of(leader) != node
        assert status["checkpoint"]["iteration"] >= before["checkpoint"]["iteration"]
        run.until_checkpoint(status["checkpoint"]["iteration"])
    finally:
        trained_on.heal(node)
    assert run.status["restarts"]["byCause"]["Storage"] >= 2
    run.delete()


def test_an_agent_that_is_killed_starts_again_and_takes_its_member_s_place(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("agent-killed", **LONG)).apply()
    before, pods = run.until_checkpoint(), run.pod_names()
    run.kill_container(1, names.CONTAINER_AGENT)
    status = resumed(run, before)
    assert run.pod_names() == pods
    assert status["lastFailure"]["cause"] == "AgentRestarted"
    assert status["restarts"]["total"] == 1
    run.delete()


def test_a_worker_that_is_out_of_memory_is_told_as_such(trained_on: Cluster) -> None:
    # What a Pod requests leaves room for its workers to be the kernel's first choice (processes.die_before_parent).
    limits = {"requests": {"cpu": "100m", "memory": "4Gi"}, "limits": {"memory": "4Gi"}}
    changes = LONG | {"workers__resources": limits, "workers__sharedMemory": "6Gi"}
    run = Run(trained_on, manifest("oom", **changes)).apply()
    before = run.until_checkpoint()
    # Shared memory counts as the container's and belongs to no process: the largest one, a worker, is killed for it.
    # No more of it than kills one: the container itself lives, and the kubelet has nothing to tell.
    fill = (
        'kills() { grep -h "^oom_kill " /sys/fs/cgroup/memory.events /sys/fs/cgroup/memory/memory.oom_control; }; '
        'before=$(kills); for i in $(seq 80); do [ "$(kills)" = "$before" ] || break; '
        "dd if=/dev/zero of=/dev/shm/fill.$i bs=1M count=50; done; rm -f /dev/shm/fill.*"
    )
    run.kubectl("exec", run.pod_names()[1], "-c", names.CONTAINER_WORKER, "--", "sh", "-c", fill, check=False)
    status = resumed(run, before)
    assert status["lastFailure"]["cause"] == "OutOfMemory", status["lastFailure"]
    run.delete()


def test_a_worker_that_raises_is_told_with_python_s_exception(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("raises", **LONG)).apply()
    before, pods = run.until_checkpoint(), run.pod_names()
    # What a worker can't write it can't save.
    in_worker = ("exec", pods[1], "-c", names.CONTAINER_WORKER, "--", "chmod", "-R")
    local = f"{names.SCRATCH_DIR}/checkpoints"
    run.kubectl(*in_worker, "a-w", local)
    failed = run.until(lambda s: s.get("lastFailure"), "it is told")["lastFailure"]
    run.kubectl(*in_worker, "u+w", local)
    assert failed["cause"] == "Crash"
    assert "PermissionError" in failed["message"]
    resumed(run, before)
    assert run.pod_names() == pods
    run.delete()


def test_a_power_cut_that_is_over_at_once_is_recovered_from_and_charged_to_nobody(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("power-cut", **LONG)).apply()
    before = run.until_checkpoint()
    nodes = [n.name for n in trained_on.nodes]
    for node in nodes:
        trained_on.kill_node(node)
    for node in nodes:
        trained_on.start_node(node)
    resumed(run, before)
    assert started_at(run, run.members()[0]) >= before["checkpoint"]["iteration"] > 0
    status = run.until(lambda s: s.get("restartsWithoutProgress") == 0, "what was charged is refunded")
    assert status["restarts"]["byCause"].keys() <= UNCHARGED, status["lastFailure"]
    run.delete()


def test_a_whole_gang_that_is_lost_is_placed_again_as_a_gang_and_resumes(trained_on: Cluster) -> None:
    """Its members are found to be lost one after the other, and there is no room before all are."""
    run = Run(trained_on, manifest("gang-lost", **LONG)).apply()
    before, pods = run.until_checkpoint(), run.pod_names()
    nodes = [n.name for n in trained_on.nodes]
    kept = next(n for n in nodes if n not in [run.node_of(m) for m in run.members()])
    lost = [n for n in nodes if n != kept]
    try:
        trained_on.kubectl("cordon", *lost)
        while run.operators_node() != kept:  # without an operator nothing would be placed
            run.hand_over_leadership()
        trained_on.kubectl("uncordon", *lost)
        trained_on.kubectl("cordon", kept)
        for node in lost:
            trained_on.kill_node(node)
        run.until(lambda s: s["placement"] > before["placement"], "the gang is to be placed anew")
        group = f"gang-lost-p{run.status['placement']}"

        def waiting() -> list[Any]:
            return [p for p in run.pods() if p["metadata"]["name"] not in pods]

        def is_one_gang() -> bool:
            return [p["spec"]["schedulingGroup"]["podGroupName"] for p in waiting()] == [group, group]

        until(is_one_gang, "it has new Pods, in one group", dump=run.describe)
        trained_on.kubectl("uncordon", kept)
        run.until_reason("Scheduled", "Unschedulable")
        assert not any("nodeName" in p["spec"] for p in waiting()), "half of a gang was placed on the node that is left"
    finally:
        trained_on.kubectl("uncordon", *nodes)
        for node in lost:
            if not trained_on.node(node).running:
                trained_on.start_node(node)
    status = resumed(run, before)
    assert started_at(run, run.members()[0]) >= before["checkpoint"]["iteration"] > 0
    assert status["restarts"]["byCause"].keys() <= UNCHARGED, status["lastFailure"]
    run.delete()


def test_a_second_node_that_dies_during_the_recovery_is_recovered_from_as_well(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("two-faults", **LONG)).apply()
    before = run.until_checkpoint()
    first, second = run.node_of(0), run.node_of(1)
    trained_on.kill_node(first)
    run.until(lambda s: s["attempt"] > before["attempt"], "the first is noticed")
    until(lambda: run.assignment()["attempt"] > before["attempt"], "the next attempt is held for the second")
    assert run.assignment()["phase"] == "hold"
    trained_on.kill_node(second)
    trained_on.start_node(first)
    trained_on.start_node(second)
    status = resumed(run, before)
    assert status["restartsWithoutProgress"] == 0
    run.delete()


def test_operator_and_node_are_lost_together(trained_on: Cluster) -> None:
    """By one power cut: the operator's leader and a member of the run are on the same node."""
    run = Run(trained_on, manifest("operator-and-node", **SPARE)).apply()
    before = run.until_checkpoint()
    run.until(lambda s: s["workers"].get("spares") == 1, "the spare stands by")
    while (node := run.operators_node()) not in [run.node_of(m) for m in run.members()]:
        run.hand_over_leadership()
    trained_on.kill_node(node)
    try:
        status = resumed(run, before)
        assert status["lastFailure"]["node"] == node
        assert run.operators_node() != node
    finally:
        trained_on.start_node(node)
    run.delete()


def test_without_a_spare_or_a_free_node_the_gang_waits_whole_until_the_node_is_back(trained_on: Cluster) -> None:
    size = {"workers__replicas": 3, "training__globalBatchSize": 6}
    run = Run(trained_on, manifest("no-room", **LONG | size)).apply()
    before = run.until_checkpoint()
    node = run.node_of(run.members()[1])
    trained_on.kill_node(node)
    try:
        run.until_reason("Scheduled", "Unschedulable")
        assert run.assignment()["phase"] == "hold"
    finally:
        trained_on.start_node(node)
    status = resumed(run, before)
    assert status["layout"]["data"] == 3
    assert status["lastFailure"]["node"] == node
    assert status["restartsWithoutProgress"] == 0
    run.delete()


def test_a_run_shrinks_to_what_is_left_and_grows_again_when_there_is_room(trained_on: Cluster) -> None:
    elasticity = {"minReplicas": 2, "patience": "5s", "growBack": {"interval": "0s"}}
    size = {"workers__replicas": 3, "training__globalBatchSize": 6, "elasticity": elasticity}
    run = Run(trained_on, manifest("shrinks", **LONG | size)).apply()
    before = run.until_checkpoint()
    assert before["layout"]["data"] == 3
    node = run.node_of(run.members()[1])
    trained_on.kill_node(node)
    try:
        status = resumed(run, before)
        assert status["layout"]["data"] == 2
        assert run.condition("Degraded")["status"] == "True"
        run.until_checkpoint(status["checkpoint"]["iteration"])
    finally:
        trained_on.start_node(node)
    status = run.until(
        lambda s: s.get("state") == "Running" and s["layout"]["data"] == 3, "it trains with all again", seconds=400
    )
    assert run.condition("Degraded")["status"] == "False"
    assert status["restarts"]["total"] == 1, "growth was counted as a failure"
    assert status["restartsWithoutProgress"] == 0
    run.delete()


def test_a_rank_that_is_stopped_is_found_named_and_restarted(trained_on: Cluster) -> None:
    policy = {"hang": {"iteration": "10s", "firstIteration": "5m", "checkpoint": "20s"}}
    run = Run(trained_on, manifest("hangs", **LONG | {"failurePolicy": policy})).apply()
    before, pods = run.until_checkpoint(after=30), run.pod_names()
    run.kill_worker(member=1, signal="STOP")
    status = resumed(run, before)
    assert status["lastFailure"]["cause"] == "Hang", status["lastFailure"]
    assert status["lastFailure"]["member"] == 1, "another rank than the stopped one is suspected"
    assert run.pod_names() == pods
    stacks = [stacks_key(before["attempt"], member) for member in (0, 1)]
    until(lambda: set(stacks) <= set(run.objects(f"a{before['attempt']}/")), "each member's stacks are kept")
    run.delete()
