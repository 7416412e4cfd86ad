"""The loss of each iteration, as the workers' logs told it while their Pods were there."""

from __future__ import annotations

import re
import subprocess
import threading
from dataclasses import dataclass, field

from devcluster import binaries
from devcluster.cluster import Cluster
from examples.demo import stages
from starcoder_trainer.contract import names

_DONE = re.compile(r"iteration\s+(\d+)/\d+ \| loss (\S+) \|")  # the bar: a log may break off anywhere
_BEGINS = re.compile(r"iteration (\d+) of \d+; ")


def loss_in(line: str) -> tuple[int, str] | None:
    """Iteration and its loss, all digits, where a worker's line tells them."""
    said = _DONE.search(line)
    return (int(said[1]), said[2]) if said else None


@dataclass
class Losses:
    """Follows the log of every Pod of a run from its first line to its last."""

    cluster: Cluster
    run: str
    by_iteration: dict[int, set[str]] = field(default_factory=dict)
    """All values that were told of an iteration, all digits; several Pods tell the same one."""
    starts: dict[str, int] = field(default_factory=dict)
    """Iterations at which workers began, over all Pods and attempts; by Pod and the runtime's time stamp, since a log
    that broke off is read again from its first line."""
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
            pod, "-c", names.CONTAINER_WORKER, "--follow", "--timestamps", "--tail=-1",
        ]  # fmt: skip
        with self.cluster.inside():
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self._followed[pod] = process
        thread = threading.Thread(target=self._read, args=(pod, process), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _read(self, pod: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.take(pod, line)

    def take(self, pod: str, line: str) -> None:
        """One line of a worker's log, with its time stamp before it."""
        if done := loss_in(line):
            with self._lock:
                self.by_iteration.setdefault(done[0], set()).add(done[1])
        elif said := _BEGINS.search(line):
            with self._lock:
                self.starts[f"{pod} {line.partition(' ')[0]}"] = int(said[1])
