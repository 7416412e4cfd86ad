"""`make soak MINUTES=30`: random faults against a running run, then the same run undisturbed, then a verdict.

The cluster is its own. `--seed` draws the same faults again (at other iterations: time is real). Ctrl-C removes the
cluster.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from devcluster.cluster import Cluster
from devcluster.cluster import Options as ClusterOptions
from examples.demo import stages
from starcoder_trainer.checkpoint.common import layout_of
from tests.support.cluster import Run, manifest, until

from . import undisturbed
from .faults import Fault, draw
from .judge import Verdict, judge, unaccounted
from .kept import listed_and_damaged
from .losses import Losses
from .trunk import HistoryGap, Trunk

NODES, REPLICAS, SPARES, GPUS = 4, 3, 1, 2
"""A node for each Pod: with one node away a spare takes over, with two the run shrinks."""
SETTLE = 900.0
"""Seconds within which the run must train again once the faults have stopped."""


@dataclass(frozen=True)
class Settings:
    minutes: float
    pause: float
    """Mean seconds between two faults."""
    seed: int


@dataclass
class History:
    """What was seen while the run was disturbed."""

    faults: list[str] = field(default_factory=list)
    trunk: Trunk = field(default_factory=Trunk)
    verified: list[int] = field(default_factory=list)
    """Iterations of HEAD's newest entry, in the order in which they were seen."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--pause", type=float, default=40, help="mean seconds between two faults")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--name", default="soak", help="of the cluster")
    args = parser.parse_args(argv)
    cluster = Cluster(args.name)
    try:
        _prepare(cluster)
        return _soak(cluster, Settings(args.minutes, args.pause, args.seed))
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    finally:
        cluster.down()


def _prepare(cluster: Cluster) -> None:
    _say(f"dev cluster: {NODES} nodes x {GPUS} simulated GPUs, stock node monitor")
    with contextlib.redirect_stdout(sys.stderr):
        cluster.up(ClusterOptions(nodes=NODES, gpus_per_node=GPUS))
        stages.install(cluster, stages.images_in(cluster)["operator"])
        stages.storage(cluster)
        stages.start_data(cluster)
    until(lambda: stages.job_ended(stages.job(cluster)), "the prepare Job ends", dump=lambda: stages.job_log(cluster))


def _manifest(name: str) -> dict[str, Any]:
    return manifest(
        name,
        workers__replicas=REPLICAS,
        workers__gpusPerWorker=GPUS,
        training__iterations=10**6,  # the learning rate's schedule depends on it
        training__globalBatchSize=2 * REPLICAS,
        training__microBatchSize=2,
        checkpoint__everyIterations=20,
        checkpoint__keepLast=100,  # each is to be seen in HEAD, whatever is away or mended meanwhile
        elasticity={"spares": SPARES, "minReplicas": 1, "patience": "10s", "growBack": {"interval": "30s"}},
    )


def _soak(cluster: Cluster, settings: Settings) -> int:
    run = Run(cluster, _manifest("soak")).apply()
    losses, history = Losses(cluster, run.name), History()
    run.until_checkpoint()
    try:
        _disturb(cluster, run, losses, history, settings)
        cluster.mend()
        before = _seen(run, losses, history)
        until(lambda: _seen(run, losses, history) > before + 20, "it trains on after the faults", SETTLE, run.describe)
        last = run.get()
        left_out = unaccounted(last, datetime.now(UTC))
        listed, damaged = listed_and_damaged(cluster, last["spec"]["checkpoint"]["uri"])
        for each in damaged:
            _say(f"damaged: {each}")
    finally:
        losses.close()
    run.delete()
    stretches = history.trunk.stretches()
    calm = undisturbed.train(cluster, _manifest("undisturbed"), stretches, _say)
    verdict = judge(history.trunk, history.verified, losses.attempts, calm, damaged=len(damaged), unaccounted=left_out)
    _report(history, verdict, last["status"], settings, listed)
    return 0 if verdict.good else 1


def _disturb(cluster: Cluster, run: Run, losses: Losses, history: History, settings: Settings) -> None:
    rng, end = random.Random(settings.seed), time.monotonic() + 60 * settings.minutes
    due, broken = time.monotonic() + 5, list[tuple[float, Fault]]()
    while time.monotonic() < end:
        now = time.monotonic()
        for when, over in [b for b in broken if b[0] <= now]:
            assert over.undo is not None
            over.undo()
            _say(f"{over.what}: mended")
            broken.remove((when, over))
        try:
            _seen(run, losses, history)
        except HistoryGap:  # no verdict can come of this one
            raise
        except Exception:  # what is being broken can't always be looked at
            pass
        if now >= due and len(broken) < 2:
            due = now + rng.expovariate(1 / settings.pause)
            with contextlib.suppress(Exception):
                if fault := draw(rng, cluster, run, {b.what for _, b in broken}):
                    _say(fault.what)
                    fault.do()
                    history.faults.append(fault.what)
                    if fault.undo is not None:
                        broken.append((now + fault.seconds, fault))
        time.sleep(0.5)
    for _, fault in broken:
        assert fault.undo is not None
        fault.undo()


def _seen(run: Run, losses: Losses, history: History) -> int:
    """Looks at Pods and HEAD; the newest verified iteration."""
    with contextlib.suppress(Exception):  # S3 can be looked at while the API server is away
        losses.follow(run.pod_names())
    entries = run.head().entries
    history.verified.append(entries[-1].step)
    history.trunk.see(entries, lambda entry: layout_of(run.checkpoint(entry).common))
    return entries[-1].step


def _report(history: History, verdict: Verdict, status: dict[str, Any], settings: Settings, listed: int) -> None:
    for each in verdict.different[:20]:
        _say(f"different loss at iteration {each}")
    goodput = status.get("goodput") or {}
    print(
        json.dumps(
            {
                "bench": "soak",
                "minutes": settings.minutes,
                "seed": settings.seed,
                "faults": len(history.faults),
                "recoveries": status["restarts"]["total"],
                "byCause": status["restarts"].get("byCause"),
                "verified_checkpoints_lost": verdict.lost,
                "listed_checkpoints_read_back": listed,
                "silent_restarts_at_0": verdict.restarts_at_zero,
                "changes_of_layout": len(history.trunk.stretches()) - 1,
                "losses_compared": verdict.compared,
                "of_iterations_done_again": verdict.abandoned,
                "across_changes_of_layout": verdict.beside,
                "losses_different": len(verdict.different),
                "ettr": goodput.get("ratio"),
                "unaccounted": round(verdict.unaccounted, 4),
                "good": verdict.good,
            }
        ),
        flush=True,
    )


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
