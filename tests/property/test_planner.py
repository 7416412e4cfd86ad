"""Whatever fails in whatever order, and wherever the operator is cut: attempts stay apart and the run comes through.

Operator and agents are the shipped ones; the cluster between them is in memory (tests/support/simulated_cluster.py)
and checks each call: names are never used twice, nothing happens before it is recorded, an attempt runs in one form.
"""

import contextlib
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from starcoder_operator.domain import failure
from starcoder_operator.domain.failure import CAUSES, Charge
from starcoder_operator.domain.planner import plan
from starcoder_trainer.contract.report import Problem
from tests.support import runs
from tests.support.simulated_cluster import Conflict, Cut, SimulatedCluster

ENOUGH = 600
"""Rounds of one second in which everything comes to rest; the longest wait of the planner is 60 s."""
CHARGED = frozenset(c for c, r in CAUSES.items() if r.charge is Charge.RUN)


class Planner(RuleBasedStateMachine):
    @initialize(
        replicas=st.integers(1, 3),
        spares=st.integers(0, 2),
        least=st.none() | st.integers(1, 3),
        gang=st.sampled_from(["Native", "Native", "None"]),
    )
    def start(self, replicas, spares, least, gang):
        self.replicas = replicas
        spec = runs.run(
            workers__replicas=replicas,
            training__globalBatchSize=24,
            training__iterations=60,
            scheduling__gang=gang,
            failurePolicy__maxRestartsWithoutProgress=1000,
            elasticity={
                "spares": spares,
                "patience": "10s",
                "growBack": {"interval": "20s"},
                **({"minReplicas": min(least, replicas)} if least else {}),
            },
            workers__terminationGracePeriodSeconds=30,
        ).spec
        self.cluster = SimulatedCluster(spec, nodes=replicas + 1)
        self.cluster.pullable = {"", "good"}
        self.old = self.cluster.snapshot()
        self.dead: set[str] = set()
        """Nodes that died; the control plane notices some time."""
        self.chargeable = 0
        """What happened that may be the run's own doing, or looks exactly like it."""
        self.highest_attempt = 0

    def operator_looks(self, snapshot, cut=None):
        with contextlib.suppress(Conflict, Cut):
            self.cluster.act(snapshot, plan(snapshot), cut)

    def all_turn(self):
        self.operator_looks(self.cluster.snapshot())
        self.cluster.settle_cluster()
        self.cluster.world.now += 1

    def rests(self, rounds):
        for _ in range(rounds):
            if self.cluster.status.state == "Succeeded":
                return
            self.all_turn()

    def running_pods(self):
        return sorted(n for n, p in self.cluster.pods.items() if p.agent is not None)

    # The operator

    @rule()
    def operator_passes(self):
        self.operator_looks(self.cluster.snapshot())

    @rule(cut=st.integers(0, 6))
    def operator_is_cut(self, cut):
        self.operator_looks(self.cluster.snapshot(), cut)

    @rule()
    def another_operator_reads(self):
        self.old = self.cluster.snapshot()

    @rule()
    def another_operator_acts_on_what_it_read_before(self):
        self.operator_looks(self.old)

    # The cluster

    @rule(rounds=st.integers(1, 6))
    def all_goes_on(self, rounds):
        for _ in range(rounds):
            self.all_turn()

    @rule()
    def cluster_goes_on(self):
        self.cluster.settle_cluster()

    @rule(seconds=st.sampled_from([1, 5, 20]))
    def time_passes(self, seconds):
        """Agents beat on where they can."""
        self.cluster.world.now += seconds
        self.cluster.settle_cluster()

    @precondition(lambda self: len(self.dead) < 2)
    @rule(data=st.data())
    def node_dies(self, data):
        node = data.draw(st.sampled_from(sorted(self.cluster.nodes)))
        self.cluster.node_dies(node)
        self.dead.add(node)

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def control_plane_notices_a_dead_node(self, data):
        self.cluster.node_is_unknown(data.draw(st.sampled_from(sorted(self.dead))))

    @rule(data=st.data(), shut=st.booleans())
    def node_is_cordoned_or_opened(self, data, shut):
        node = data.draw(st.sampled_from(sorted(self.cluster.nodes)))
        self.cluster.nodes[node] = replace(self.cluster.nodes[node], unschedulable=shut)

    @rule(image=st.sampled_from(["good", "typo"]))
    def somebody_sets_the_image(self, image):
        workers = self.cluster.spec.workers.model_copy(update={"image": image})
        self.cluster.change_spec(workers=workers)

    @rule(replicas=st.integers(1, 3), spares=st.integers(0, 2))
    def somebody_resizes_the_run(self, replicas, spares):
        spec = self.cluster.spec
        least = spec.elasticity.min_replicas
        elasticity = {"spares": spares, "min_replicas": least and min(least, replicas)}
        self.cluster.change_spec(
            workers=spec.workers.model_copy(update={"replicas": replicas}),
            elasticity=spec.elasticity.model_copy(update=elasticity),
        )

    @rule(pipeline=st.sampled_from([1, 2]), tensor=st.sampled_from([1, 2]))
    def somebody_changes_the_layout(self, pipeline, tensor):
        spec = self.cluster.spec
        least = spec.elasticity.min_replicas or 0
        if (spec.workers.gpus % (pipeline * tensor), 2 * least % (pipeline * tensor)) == (0, 0):
            self.cluster.change_spec(
                parallelism=spec.parallelism.model_copy(update={"pipeline": pipeline, "tensor": tensor})
            )

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def node_returns(self, data):
        node = data.draw(st.sampled_from(sorted(self.dead)))
        self.dead.discard(node)
        # faster than anybody saw it go, its Pods' containers were started again
        self.chargeable += 1
        self.cluster.node_returns(node)

    @precondition(lambda self: self.cluster.pods)
    @rule(data=st.data(), grace=st.sampled_from([30, 30, 2, 0]))
    def somebody_deletes_a_pod(self, data, grace):
        self.cluster.delete_pod(data.draw(st.sampled_from(sorted(self.cluster.pods))), grace)

    @precondition(lambda self: self.running_pods())
    @rule(data=st.data(), what=st.sampled_from(["workers", "upload"]))
    def nothing_in_a_pod_comes_to_an_end_while_it_is_deleted(self, data, what):
        name = data.draw(st.sampled_from(self.running_pods()))
        self.cluster.delete_pod(name, 30)
        self.cluster.pods[name].agent.holds_up.add(what)

    @precondition(lambda self: self.running_pods())
    @rule(data=st.data())
    def worker_crashes(self, data):
        pod = self.cluster.pods[data.draw(st.sampled_from(self.running_pods()))]
        self.chargeable += pod.agent.crash()

    @precondition(lambda self: self.running_pods())
    @rule(data=st.data())
    def agent_restarts(self, data):
        self.chargeable += 1
        self.cluster.agent_restarts(data.draw(st.sampled_from(self.running_pods())))

    @rule(reached=st.booleans())
    def api_server_is_out_of_the_agents_reach(self, reached):
        self.cluster.api_reaches_agents = reached

    @precondition(lambda self: self.cluster.groups)
    @rule(data=st.data())
    def somebody_deletes_a_podgroup(self, data):
        self.cluster.delete_group(data.draw(st.sampled_from(sorted(self.cluster.groups))))

    @rule()
    def somebody_deletes_the_assignment(self):
        self.cluster.delete_assignment()

    @rule(suspend=st.booleans())
    def somebody_suspends_or_resumes(self, suspend):
        if self.cluster.spec.suspend != suspend:
            self.cluster.change_spec(suspend=suspend)

    @rule(hindered=st.booleans())
    def storage_is_hindered_or_mended(self, hindered):
        self.cluster.world.store.problem = Problem("BucketNotFound", "no such bucket") if hindered else None

    @rule(refused=st.sampled_from(["create pod", "create gang", "create lease", "write assignment", None]))
    def api_server_refuses(self, refused):
        self.cluster.refusing = {refused: "exceeded quota"} if refused else {}

    @rule(there=st.booleans(), kept=st.booleans())
    def gang_api_comes_and_goes(self, there, kept):
        self.cluster.gang_api, self.cluster.gang_field = there, kept

    # What holds after each step; more is checked by the cluster as it is used

    @invariant()
    def attempts_only_grow(self):
        status = self.cluster.status
        assert status.attempt >= self.highest_attempt
        self.highest_attempt = status.attempt

    @invariant()
    def checkpoints_are_listed_in_order_of_attempts(self):
        attempts = [attempt for attempt, _ in self.cluster.world.store.commits]
        assert attempts == sorted(attempts)

    @invariant()
    def no_two_attempts_run_at_once_where_the_operator_reaches(self):
        """Workers of an older attempt may only be where its agent has not yet seen the newer one."""
        running = {p.agent.running for p in self.cluster.pods.values() if p.agent and p.agent.running is not None}
        assert len(running) <= 2

    @invariant()
    def state_says_what_is_so(self):
        status = self.cluster.status
        if status.state == "Succeeded":
            assert self.cluster.world.store.entries[-1].step >= self.cluster.spec.training.iterations
            assert status.progress == "100%"
        assert status.state != "Failed", status.message
        training = status.condition("Training")
        if status.tokens_per_second is not None:
            assert training is not None
            assert training.status == "True"

    def teardown(self):
        """All faults end: the run comes to its end, and was charged no more than what may have been its own doing."""
        if not hasattr(self, "cluster"):
            return
        cluster = self.cluster
        cluster.api_reaches_agents = cluster.gang_api = cluster.gang_field = True
        cluster.world.store.problem, cluster.refusing = None, {}
        self.somebody_sets_the_image("good")
        self.somebody_changes_the_layout(1, 1)
        self.somebody_resizes_the_run(self.replicas, 1)
        for node in sorted(cluster.nodes):
            cluster.nodes[node] = replace(cluster.nodes[node], unschedulable=False)
        for node in sorted(self.dead):
            cluster.node_is_unknown(node)
        if cluster.spec.suspend:
            cluster.change_spec(suspend=False)
        self.rests(20)
        for node in sorted(self.dead):
            cluster.node_returns(node)
        self.rests(ENOUGH)
        status = cluster.status
        assert status.state == "Succeeded", f"{status.state}: {status.reason}: {status.message}"
        charged = sum(n for cause, n in status.restarts.by_cause.items() if failure.Cause(cause) in CHARGED)
        assert charged <= self.chargeable, status.restarts
        for _ in range(70):
            self.all_turn()
        assert not [p.view.name for p in cluster.pods.values() if p.view.phase == "Running"], "GPUs are not given back"
        assert not cluster.groups


Planner.TestCase.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
TestPlanner = Planner.TestCase
