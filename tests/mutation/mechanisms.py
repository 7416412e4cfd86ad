"""What each end-to-end test of failures rests on, and how to switch it off.

A row takes away one mechanism and nothing else: a run that nobody disturbs still trains, saves and succeeds. Where two
mechanisms would each save the test alone, what is switched off is where they meet.
"""

from __future__ import annotations

from dataclasses import dataclass

FAILOVER = "tests/e2e/test_failover.py"
FAILURES = "tests/e2e/test_failures.py"
LEAVING = "tests/e2e/test_leaving.py"


@dataclass(frozen=True)
class Mechanism:
    name: str
    file: str
    """From the repository's root; of operator, trainer or chart."""
    old: str
    """Occurs once in it."""
    new: str
    """What takes its place; the code can be imported, and an undisturbed run completes."""
    tests: tuple[str, ...]
    """Fail without it, in themselves and not in what their fixtures do."""

    def switched_off(self, text: str) -> str:
        """What `file`, whose content is `text`, becomes."""
        assert text.count(self.old) == 1, f"{self.name}: {self.file} has what is to be replaced not once"
        return text.replace(self.old, self.new)


MECHANISMS: tuple[Mechanism, ...] = (
    # Without a spare there is no room: each node holds one Pod.
    Mechanism(
        name="a-spare-takes-a-lost-members-place",
        file="operator/starcoder_operator/domain/seats.py",
        old="    return place if by is None else Member(by.index, by.boot_id)",
        new="    return place",
        tests=(f"{FAILOVER}::test_a_spare_takes_the_place_of_a_member_whose_node_is_killed",),
    ),
    # That it is replaced can't be taken away alone: a kubelet that is back starts the containers of its Pods again.
    Mechanism(
        name="only-members-at-work-end-an-attempt",
        file="operator/starcoder_operator/domain/formation.py",
        old="    first = failure.primary([*failures, *departures]) if failures else None",
        new=(
            "    failures += tuple(f for m in members if m not in at_work and (f := failure.lost(m)) is not None)\n"
            "    first = failure.primary([*failures, *departures]) if failures else None"
        ),
        tests=(f"{FAILOVER}::test_a_spare_on_a_node_that_dies_is_replaced_and_no_attempt_ends",),
    ),
    # Kubernetes itself would delete the Pod, 35 s after the cut (build.pod.TOLERATION_SECONDS); the test heals sooner.
    Mechanism(
        name="lost-pods-are-deleted",
        file="operator/starcoder_operator/domain/placement.py",
        old=(
            "    return [DeletePod(pod.name, pod.uid, why(pod)) "
            "for pod in snapshot.pods if pod.uid not in stay and not pod.deleting]"
        ),
        new="    return []",
        tests=(f"{FAILOVER}::test_a_partitioned_node_is_given_up_and_its_pod_is_cleaned_away_when_it_is_back",),
    ),
    # By its Lease and by the kubelet's word; what is left is that its peers lost their connections.
    Mechanism(
        name="an-agent-that-started-again-is-known",
        file="operator/starcoder_operator/domain/failure.py",
        old="    is_another = member.report is not None and member.report.boot_id != boot_id",
        new=(
            "    return lost(member)\n    is_another = member.report is not None and member.report.boot_id != boot_id"
        ),
        tests=(f"{FAILOVER}::test_an_agent_that_is_killed_starts_again_and_takes_its_member_s_place",),
    ),
    # The kubelet's OOMKilled does not help: it is a worker that is killed, the container's first process lives.
    Mechanism(
        name="the-kernels-kills-are-counted",
        file="trainer/starcoder_trainer/processes.py",
        old='_OOM_FILES = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")',
        new="_OOM_FILES = ()",
        tests=(f"{FAILOVER}::test_a_worker_that_is_out_of_memory_is_told_as_such",),
    ),
    Mechanism(
        name="a-workers-last-words-are-told",
        file="operator/starcoder_operator/domain/failure.py",
        old="            Cause(said.cause), where + said.message, said.exit_code,",
        new="            Cause(said.cause), where, said.exit_code,",
        tests=(f"{FAILOVER}::test_a_worker_that_raises_is_told_with_python_s_exception",),
    ),
    Mechanism(
        name="an-attempt-starts-from-the-checkpoint",
        file="operator/starcoder_operator/domain/formation.py",
        old='    return Go(replace(current, phase="run", offer=leader.offer))',
        new='    return Go(replace(current, phase="run", offer=replace(leader.offer, checkpoint=None)))',
        tests=(
            f"{FAILOVER}::test_a_power_cut_that_is_over_at_once_is_recovered_from_and_charged_to_nobody",
            f"{FAILURES}::test_after_a_killed_worker_the_survivors_keep_their_pods_and_train_from_the_checkpoint",
        ),
    ),
    # The Pods that come join the group that was placed before, and each is placed alone.
    Mechanism(
        name="a-gang-of-which-nothing-stands-is-placed-anew",
        file="operator/starcoder_operator/domain/placement.py",
        old="    return _beyond(snapshot, number) if spent or stopped else number",
        new="    return number",
        tests=(f"{FAILOVER}::test_a_whole_gang_that_is_lost_is_placed_again_as_a_gang_and_resumes",),
    ),
    # Both that its place is opened and that another agent in it ends the attempt.
    Mechanism(
        name="who-is-lost-in-a-held-attempt-leaves-it",
        file="operator/starcoder_operator/domain/formation.py",
        old="    found = _explanation(snapshot, members, limits)\n",
        new=(
            "    if any(p.boot_id and members[p.index].boot_id != p.boot_id for p in current.members):\n"
            '        return Stay("waiting for agents that are lost")\n'
            "    found = _explanation(snapshot, members, limits)\n"
        ),
        tests=(f"{FAILOVER}::test_a_second_node_that_dies_during_the_recovery_is_recovered_from_as_well",),
    ),
    # Its test alone: nobody leads that cluster any more.
    Mechanism(
        name="a-silent-leader-is-followed",
        file="operator/starcoder_operator/leader.py",
        old="            if now - self._seen[1] < promised:\n                return False\n",
        new="            return False\n",
        tests=(f"{FAILOVER}::test_operator_and_node_are_lost_together",),
    ),
    # After a failure it goes on with whoever is left, and at once: patience is longer than the test looks.
    Mechanism(
        name="a-gang-is-not-shrunk-below-its-least",
        file="operator/starcoder_operator/domain/sizing.py",
        old="    return possible if possible and _left(snapshot, members) <= 0 else target",
        new=(
            "    if snapshot.status.restarts.total and _fit(snapshot, members):\n"
            "        return _fit(snapshot, members)\n"
            "    return possible if possible and _left(snapshot, members) <= 0 else target"
        ),
        tests=(f"{FAILOVER}::test_without_a_spare_or_a_free_node_the_gang_waits_whole_until_the_node_is_back",),
    ),
    Mechanism(
        name="patience-ends",
        file="operator/starcoder_operator/domain/sizing.py",
        old="    left = snapshot.spec.elasticity.patience.seconds - waited",
        new="    left = 3600.0",
        tests=(f"{FAILOVER}::test_a_run_shrinks_to_what_is_left_and_grows_again_when_there_is_room",),
    ),
    Mechanism(
        name="a-shrunk-run-grows",
        file="operator/starcoder_operator/domain/sizing.py",
        old=(
            "    if possible > size and grows_after(snapshot, snapshot.status) is None "
            "and not _more_come(snapshot, members):"
        ),
        new="    if False:",
        tests=(f"{FAILOVER}::test_a_run_shrinks_to_what_is_left_and_grows_again_when_there_is_room",),
    ),
    # Collectives time out after 15 minutes, which is longer than the test waits.
    Mechanism(
        name="workers-that-stand-still-are-noticed",
        file="trainer/starcoder_trainer/agent/stall.py",
        old="        return max(found, key=lambda o: (not o.silent, o.seconds), default=None)",
        new="        return None",
        tests=(f"{FAILOVER}::test_a_rank_that_is_stopped_is_found_named_and_restarted",),
    ),
    Mechanism(
        name="a-pod-whose-workers-failed-is-kept",
        file="operator/starcoder_operator/domain/placement.py",
        old="    if member.index >= pool_size(snapshot.spec):\n",
        new=(
            '    if member.report is not None and member.report.state == "failed":\n'
            '        return "its workers have failed"\n'
            "    if member.index >= pool_size(snapshot.spec):\n"
        ),
        tests=(f"{FAILURES}::test_after_a_killed_worker_the_survivors_keep_their_pods_and_train_from_the_checkpoint",),
    ),
    Mechanism(
        name="names-of-pods-are-never-used-again",
        file="operator/starcoder_operator/build/pod.py",
        old='        "metadata": owner.metadata(names.pod_name(owner.name, member, incarnation)),',
        new='        "metadata": owner.metadata(names.pod_name(owner.name, member, 0)),',
        tests=(
            f"{FAILURES}::test_a_deleted_pod_is_replaced_under_a_new_name",
            f"{FAILURES}::test_a_run_without_gangs_replaces_a_lost_pod_and_resumes",
        ),
    ),
    # That its workers are gone is told by the agent, by their peers and by the kubelet.
    Mechanism(
        name="an-agent-finds-the-new-fork-server",
        file="trainer/starcoder_trainer/agent/channel.py",
        old="            self._on_lost(why)",
        new="            self._on_lost(why)\n            await asyncio.Event().wait()",
        tests=(f"{FAILURES}::test_a_worker_container_that_is_killed_starts_again_in_its_pod_and_training_resumes",),
    ),
    Mechanism(
        name="an-attempt-in-another-layout-than-the-specs-gives-way",
        file="operator/starcoder_operator/domain/sizing.py",
        old=(
            "    if (wanted.tensor, wanted.pipeline, wanted.sequence) != (runs.tensor, runs.pipeline, runs.sequence):"
        ),
        new="    if False:",
        tests=(f"{FAILURES}::test_another_parallelism_is_a_planned_transition_with_a_checkpoint",),
    ),
    # What is deleted for it ends the attempt then, and counts as a failure.
    Mechanism(
        name="a-gang-larger-than-the-specs-gives-way",
        file="operator/starcoder_operator/domain/sizing.py",
        old="    return beyond or len(current.members) > spec.workers.replicas",
        new="    return False",
        tests=(f"{FAILURES}::test_another_number_of_pods_is_a_planned_transition_with_a_checkpoint",),
    ),
    # The bias correction of a resumed run begins anew.
    Mechanism(
        name="the-optimizers-step-is-restored",
        file="trainer/starcoder_trainer/optimizer.py",
        old='                group["step"] = value',
        new='                group["step"] = 0',
        tests=(f"{FAILURES}::test_a_run_that_lost_a_node_ends_bitwise_as_one_that_was_never_disturbed",),
    ),
    Mechanism(
        name="a-group-is-placed-whole",
        file="operator/starcoder_operator/gang/native.py",
        old='        return {"spec": {"schedulingPolicy": {"gang": {"minCount": min_count}}}}',
        new='        return {"spec": {"schedulingPolicy": {"gang": {"minCount": 1}}}}',
        tests=(f"{FAILURES}::test_the_gang_waits_whole_when_one_pod_does_not_fit_and_starts_when_room_appears",),
    ),
    # An operator that believes its memory, which is empty at its first pass, and begins what others have begun.
    Mechanism(
        name="a-new-operator-goes-by-what-is-there",
        file="operator/starcoder_operator/observe.py",
        old="        if not self._ours(CONFIG_MAPS, found, memory):",
        new="        if not memory.state or not self._ours(CONFIG_MAPS, found, memory):",
        tests=(
            f"{FAILURES}::test_training_does_not_notice_that_the_operator_is_deleted",
            f"{FAILURES}::test_an_operator_that_is_deleted_in_the_middle_of_a_recovery_is_followed_by_one_that_ends_it",
        ),
    ),
    # The agent ends, and its fork server ends the workers with it.
    Mechanism(
        name="agents-wait-for-the-api-server",
        file="trainer/starcoder_trainer/agent/kube.py",
        old=(
            "            await asyncio.sleep(pause * random.uniform(0.5, 1.5))"
            "  # noqa: S311 - spreads the gang's retries"
        ),
        new="            raise",
        tests=(f"{FAILURES}::test_training_outlasts_an_api_server_that_is_away",),
    ),
    Mechanism(
        name="trouble-with-storage-is-no-failure",
        file="operator/starcoder_operator/domain/failure.py",
        old="    if own and report is not None and report.fenced_by is not None and report.fenced_by > attempt:",
        new=(
            "    if own and report is not None and report.problem is not None:\n"
            "        return sign(Cause.STORAGE, report.problem.message)\n"
            "    if own and report is not None and report.fenced_by is not None and report.fenced_by > attempt:"
        ),
        tests=(f"{FAILURES}::test_a_storage_that_is_away_costs_no_attempt",),
    ),
    # Where phase drain and SIGTERM meet; each of them would do. The workers end when their grace period does.
    Mechanism(
        name="workers-leave-with-a-checkpoint",
        file="trainer/starcoder_trainer/loop.py",
        old="        leaving = _any_rank(asked_to_leave())",
        new="        leaving = False",
        tests=(
            f"{LEAVING}::test_a_drained_node_costs_no_iteration",
            f"{LEAVING}::test_a_suspended_run_leaves_with_a_checkpoint_and_resumes_at_its_iteration",
            f"{LEAVING}::test_a_deleted_run_leaves_with_a_checkpoint",
            f"{LEAVING}::test_a_preempted_member_has_the_gang_leave_and_the_run_resumes_at_that_iteration",
        ),
    ),
    Mechanism(
        name="a-budget-is-written",
        file="operator/starcoder_operator/domain/planner.py",
        old="    return (EnsureDisruptionBudget(wanted),) if wanted != (snapshot.budget or 0) else ()",
        new="    return ()",
        tests=(f"{LEAVING}::test_evictions_take_one_member_at_a_time",),
    ),
    Mechanism(
        name="a-successor-fences-who-went-before",
        file="trainer/starcoder_trainer/agent/ledger.py",
        old="        return (head.run_uid, head.attempt, head.holder) == (self._run.uid, attempt, self._holder)",
        new="        return head.run_uid == self._run.uid and head.attempt >= attempt",
        tests=(
            f"{FAILOVER}::test_a_zombie_that_still_reaches_s3_commits_until_the_next_attempt_has_claimed_and_is_fenced",
        ),
    ),
    Mechanism(
        name="a-leader-without-s3-is-passed-over",
        file="operator/starcoder_operator/domain/storage_reach.py",
        old="PATIENCE = 60.0",
        new="PATIENCE = 1e9",
        tests=(f"{FAILOVER}::test_a_node_that_alone_does_not_reach_s3_is_passed_over_and_then_avoided",),
    ),
    Mechanism(
        name="an-error-of-the-user-s-ends-the-run",
        file="trainer/starcoder_trainer/failures.py",
        old='                return "UserError"',
        new='                return "Crash"',
        tests=(f"{FAILURES}::test_an_error_of_the_user_s_fails_the_run_at_once_in_python_s_words",),
    ),
    Mechanism(
        name="gpus-that-were-not-injected-are-missed",
        file="trainer/starcoder_trainer/devices.py",
        old="        if allotted := _allotted(environ):",
        new="        if (allotted := _allotted(environ)) and False:",
        tests=(f"{FAILURES}::test_gpus_that_were_allotted_and_not_injected_are_missed_and_nothing_trains_on_the_cpu",),
    ),
)
