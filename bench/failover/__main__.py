"""`make bench-failover`: faults on the dev cluster, case by case ours and then the baseline; JSON lines on stdout.

The cluster is its own (`--name`), with the node monitor's stock settings. `--cases` picks some, `--trials` says how
many of ours, `--baseline-trials` how many of the baseline's; 0 leaves it out. Ctrl-C removes the cluster.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.line import Baseline, Sample, line, medians
from devcluster.cluster import Cluster, Options
from examples.demo import stages
from tests.support.cluster import Run, until

from . import baseline, ours
from .ours import Trial

ROLE = ("node-role", "system")
"""Label and taint of the nodes that are the operator's, one for each replica; no run is placed there."""
NODES, OF_OPERATOR = 5, 2


@dataclass(frozen=True)
class Case:
    name: str
    goal: float
    fault: ours.Fault
    spec: dict[str, Any] = field(default_factory=dict)
    baseline: Callable[[baseline.Torchrun, int], Trial] | None = None
    times_faster: float | None = None
    """Than the baseline: the goal."""


CASES = (
    Case("worker-crash", 2.0, ours.worker_crash, {}, baseline.crash_trial),
    Case("pod-delete", 15.0, ours.pod_delete),
    Case("node-kill-spare", 6.0, ours.node_kill, {"elasticity__spares": 1}),
    Case("operator-and-node", 25.0, ours.operator_and_node, {"elasticity__spares": 1}),
    Case("node-kill", 15.0, ours.node_kill, {}, baseline.node_trial, times_faster=10.0),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.failover", description=__doc__)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--baseline-trials", type=int, default=3)
    parser.add_argument("--cases", nargs="*", default=[c.name for c in CASES], choices=[c.name for c in CASES])
    parser.add_argument("--name", default="bench", help="of the cluster")
    parser.add_argument("--keep", action="store_true", help="leave the cluster up")
    args = parser.parse_args(argv)
    cluster = Cluster(args.name)
    try:
        _prepare(cluster)
        for case in CASES:
            if case.name in args.cases:
                _case(cluster, case, args.trials, args.baseline_trials)
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    finally:
        if not args.keep:
            cluster.down()
    return 0


def _prepare(cluster: Cluster) -> None:
    _say(f"dev cluster: {NODES - OF_OPERATOR} nodes x 2 simulated GPUs, {OF_OPERATOR} for the operator, stock monitor")
    with contextlib.redirect_stdout(sys.stderr):
        cluster.up(Options(nodes=NODES, gpus_per_node=2))
        digests = stages.images_in(cluster)
        _install(cluster, digests["operator"])
        stages.storage(cluster)
        stages.start_data(cluster)
    until(lambda: stages.job_ended(stages.job(cluster)), "the prepare Job ends", dump=lambda: stages.job_log(cluster))


def _install(cluster: Cluster, digest: str) -> None:
    """The operator on nodes of its own, as control planes are: a case says whether it is lost or not."""
    key, value = ROLE
    for node in cluster.nodes[-OF_OPERATOR:]:
        cluster.kubectl("label", "node", node.name, f"{key}={value}", "--overwrite")
        cluster.kubectl("taint", "node", node.name, f"{key}={value}:NoSchedule", "--overwrite")
    toleration = {"key": key, "value": value, "effect": "NoSchedule"}
    stages.install(cluster, digest, nodeSelector={key: value}, tolerations=[toleration])


def _case(cluster: Cluster, case: Case, trials: int, baseline_trials: int) -> None:
    done = _ours(cluster, case, trials) if trials else []
    other = _theirs(cluster, case, baseline_trials) if baseline_trials else []
    beside = Baseline(baseline.TITLE, _sample(other)) if other else None
    if not done:
        return
    stages_of = medians([t.stages for t in done if t.stages])
    ours_of = _sample(done)
    print(line(f"failover/{case.name}", "s", ours_of, goal=case.goal, baseline=beside, stages=stages_of), flush=True)
    if beside is not None:
        # a trial that was given up took longer than it counts for: at least so many times faster
        times = Sample((beside.sample.median / ours_of.median,), beside.sample.censored)
        print(line(f"failover/{case.name}/times-faster", "ratio-up", times, goal=case.times_faster), flush=True)
    if again := _again(done):
        lost = Baseline(baseline.TITLE, theirs) if (theirs := _again(other)) else None
        print(line(f"failover/{case.name}/iterations-again", "iterations", again, baseline=lost), flush=True)


def _ours(cluster: Cluster, case: Case, trials: int) -> Sequence[Trial]:
    """One run for all trials; a new one where it did not come out of a fault whole."""
    running: list[Run] = []

    def trial(number: int) -> Trial:
        if running:
            try:
                ours.whole(running[0])
            except AssertionError as e:
                _say(f"{str(e).splitlines()[0]}; a new run is made")
                running.clear()
        if not running:
            running.append(ours.start(cluster, case.name, **case.spec))
            ours.whole(running[0])
        outcome = ours.trial(running[0], case.fault, number)
        if outcome.censored:
            running.clear()
        return outcome

    try:
        return _trials(case.name, trials, trial)
    finally:
        stages.delete_run(cluster, case.name)  # the GPUs are the next one's


def _theirs(cluster: Cluster, case: Case, trials: int) -> Sequence[Trial]:
    """Empty where there is none, or it does not train."""
    if case.baseline is None:
        return ()
    fault, job = case.baseline, baseline.Torchrun(cluster)

    def trial(number: int) -> Trial:
        if number:
            job.whole(time.time())
        return fault(job, number)

    try:
        job.start()
        return _trials(f"{case.name}, torchrun", trials, trial)
    except AssertionError as e:
        _say(f"the baseline is left out: {str(e).splitlines()[0]}")
        return ()
    finally:
        job.delete()


def _trials(name: str, count: int, trial: Callable[[int], Trial]) -> Sequence[Trial]:
    done = []
    for number in range(count):
        outcome = trial(number)
        done.append(outcome)
        said = f"censored at {outcome.seconds:.0f} s" if outcome.censored else f"{outcome.seconds:.2f} s"
        again = "unknown" if outcome.iterations_again is None else outcome.iterations_again
        _say(f"{name} {number + 1}/{count}: {said}, iterations again: {again}, {outcome.stages or {}}")
    return done


def _sample(trials: Sequence[Trial]) -> Sample:
    return Sample(tuple(t.seconds for t in trials), sum(t.censored for t in trials))


def _again(trials: Sequence[Trial]) -> Sample | None:
    """Of the trials that tell: `n` says how many they are. None where none does."""
    known = tuple(float(t.iterations_again) for t in trials if t.iterations_again is not None)
    return Sample(known) if known else None


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
