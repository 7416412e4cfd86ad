"""The loss of each iteration, as the workers' logs told it while their Pods were there."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from devcluster import binaries
from devcluster.cluster import Cluster
from examples.demo import stages
from starcoder_trainer.contract import names
from starcoder_trainer.contract.assignment import Layout

_DONE = re.compile(r"iteration\s+(\d+)/\d+ \| loss (\S+) \|")  # the bar: a log may break off anywhere
_BEGINS = re.compile(r"iteration (\d+) of \d+; attempt (\d+), TP(\d+) x PP(\d+) x DP(\d+); ")


@dataclass
class Told:
    """What the workers of one attempt told."""

    start: int
    """Iteration that they began at."""
    layout: Layout
    losses: dict[int, set[str]] = field(default_factory=dict)
    """By iteration, all digits; several Pods tell the same one."""


def loss_in(line: str) -> tuple[int, str] | None:
    """Iteration and its loss, all digits, where a worker's line tells them."""
    said = _DONE.search(line)
    return (int(said[1]), said[2]) if said else None


@dataclass
class Losses:
    """Follows the log of every Pod of a run from its first line to its last."""

    cluster: Cluster
    run: str
    attempts: dict[int, Told] = field(default_factory=dict)
    _followed: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    _threads: list[threading.Thread] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def follow(self, pods: list[str]) -> None:
        """Those that are not followed yet, or whose log broke off (its node or the API server was away)."""
        for pod in pods:
            known = self._followed.get(pod)
            if known is None or known.poll() is not None:
                self._begin(pod)

    def close(self) -> None:
        for process in self._followed.values():
            process.kill()
        for thread in self._threads:
            thread.join()

    def _begin(self, pod: str) -> None:
        command = [
            str(binaries.path("kubectl")), "--kubeconfig", str(self.cluster.kubeconfig), "-n", stages.NAMESPACE, "logs",
            pod, "-c", names.CONTAINER_WORKER, "--follow", "--tail=-1",
        ]  # fmt: skip
        with self.cluster.inside():
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self._followed[pod] = process
        thread = threading.Thread(target=self._read, args=(process,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.take(process.stdout)

    def take(self, log: Iterable[str]) -> None:
        """One worker container's lines, from its first on; again, where its log broke off."""
        told: Told | None = None
        for line in log:
            if begins := _BEGINS.search(line):
                start, attempt, tensor, pipeline, data = map(int, begins.groups())
                with self._lock:
                    told = self.attempts.setdefault(attempt, Told(start, Layout(tensor, pipeline, data)))
            elif told is not None and (done := loss_in(line)):
                with self._lock:
                    told.losses.setdefault(done[0], set()).add(done[1])
