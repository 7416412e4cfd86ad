"""An operator that is killed before or after any of its writes, on a real cluster: the next one brings the run to where
it would have come. The simulation cuts at every write (tests/simulation); here some of them meet the real API server.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from devcluster.cluster import Cluster
from examples.demo import stages
from starcoder_operator.adapters.kinds import (
    CONFIG_MAPS,
    DISRUPTION_BUDGETS,
    LEASES,
    POD_GROUPS,
    PODS,
    ROLE_BINDINGS,
    ROLES,
    SERVICE_ACCOUNTS,
)
from starcoder_trainer.contract import names
from tests.support.cluster import Document, Run, manifest, until
from tests.support.operator_space import kubeconfig_with

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3000)]

OWNED = (PODS, CONFIG_MAPS, LEASES, ROLES, ROLE_BINDINGS, SERVICE_ACCOUNTS, POD_GROUPS, DISRUPTION_BUDGETS)
LIVES = int(os.environ.get("LIVES", "5"))
"""Of a run, with a cut in each of its seven phases."""
DEPLOYMENT = "deployment/starcoder-operator"


class CutOperator:
    """The operator as a process of this machine, with the rights and settings of the chart's. Where it is killed
    another one starts at once, as a kubelet would start it."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster = cluster
        self._order, self._calls, self.log = folder / "order", folder / "calls", folder / "operator.log"
        self._calls.touch()
        self._order.write_text("0 before")
        self._environment = os.environ | self._settings() | {
            "STARCODER_OPERATOR_KUBECONFIG": str(self._kubeconfig(folder)),
            "STARCODER_OPERATOR_LEADER_ELECTION": "false",
            "STARCODER_OPERATOR_HOST": "127.0.0.1",
            "STARCODER_OPERATOR_PORT": "0",
            "CUT_ORDER": str(self._order),
            "CUT_CALLS": str(self._calls),
        }  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self.cuts = 0
        self.ended_by_itself = False

    def cut(self, number: int, when: str) -> None:
        """At its write of that number from now; 0: not at all."""
        self._order.write_text(f"{number} {when}")
        self._calls.write_text("")

    def writes(self) -> list[str]:
        """Since `cut` was called."""
        return self._calls.read_text().splitlines()

    @contextmanager
    def working(self) -> Iterator[CutOperator]:
        keeper = threading.Thread(target=self._keep, daemon=True)
        keeper.start()
        try:
            yield self
        finally:
            self._stopped = True
            if self._process is not None:
                self._process.terminate()
            keeper.join(60)

    def _keep(self) -> None:
        command = [sys.executable, "-m", "tests.support.cut_operator"]
        with self._cluster.inside(), self.log.open("wb") as log:
            while not self._stopped:
                self._process = subprocess.Popen(
                    command, cwd=stages.REPOSITORY, env=self._environment, stdout=log, stderr=log
                )
                if self._process.wait() == -9:
                    self.cuts += 1
                elif not self._stopped:
                    self.ended_by_itself = True
                    return

    def _settings(self) -> dict[str, str]:
        found = json.loads(
            self._cluster.kubectl("get", DEPLOYMENT, "-n", stages.OPERATOR_NAMESPACE, "-o", "json").stdout
        )
        environment = found["spec"]["template"]["spec"]["containers"][0]["env"]
        return {e["name"]: e["value"] for e in environment if "value" in e}

    def _kubeconfig(self, folder: Path) -> Path:
        token = self._cluster.kubectl(
            "create", "token", "starcoder-operator", "-n", stages.OPERATOR_NAMESPACE, "--duration=2h"
        ).stdout.strip()
        return kubeconfig_with(self._cluster.kubeconfig, "operator", token, folder)


@pytest.fixture
def operator(trained_on: Cluster, tmp_path: Path) -> Iterator[CutOperator]:
    """In the place of the chart's, which is back when the test is over."""

    def scale(replicas: int) -> None:
        trained_on.kubectl("scale", DEPLOYMENT, "-n", stages.OPERATOR_NAMESPACE, f"--replicas={replicas}")
        trained_on.kubectl("rollout", "status", DEPLOYMENT, "-n", stages.OPERATOR_NAMESPACE, "--timeout=120s")

    made, replicas = (
        CutOperator(trained_on, tmp_path),
        trained_on.kubectl(
            "get", DEPLOYMENT, "-n", stages.OPERATOR_NAMESPACE, "-o", "jsonpath={.spec.replicas}"
        ).stdout,
    )
    scale(0)
    try:
        with made.working() as operator:
            yield operator
    finally:
        scale(int(replicas))


class Life:
    """What befalls a run, phase by phase, and where each must lead."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        elasticity = {"minReplicas": 2, "patience": "5s", "growBack": {"interval": "0s"}}
        size = {"workers__replicas": 3, "training__globalBatchSize": 6, "elasticity": elasticity}
        self.cluster = cluster
        self.run = Run(cluster, manifest(name, training__iterations=20_000, **size))
        self.phases: dict[str, Callable[[], object]] = {
            "start": self.start,
            "recovery": self.recovery,
            "shrink": self.shrink,
            "grow": self.grow,
            "suspend": self.suspend,
            "resume": self.resume,
            "delete": self.delete,
        }
        self._cordoned = ""

    def trains(self, copies: int, after: int = 0) -> None:
        """With so many copies of the model, in a later attempt, and a checkpoint of it is verified."""

        def so(status: Document) -> bool:
            newest = status.get("checkpoint") or {}
            return (
                status.get("state") == "Running"
                and status["attempt"] > after
                and status["layout"]["data"] == copies
                and f"/a{status['attempt']}/" in newest.get("uri", "")
            )

        self.run.until(so, f"an attempt after {after} trains with {copies} copies and has a checkpoint", seconds=400)

    def start(self) -> None:
        self.run.apply()
        self.trains(3)

    def recovery(self) -> None:
        before = self.run.status["attempt"]
        self._delete_pod_of(self.run.members()[1])
        self.trains(3, before)

    def shrink(self) -> None:
        before, member = self.run.status["attempt"], self.run.members()[1]
        self._cordoned = self.run.node_of(member)
        self.cluster.kubectl("cordon", self._cordoned)
        self._delete_pod_of(member)
        self.trains(2, before)

    def grow(self) -> None:
        before = self.run.status["attempt"]
        self.cluster.kubectl("uncordon", self._cordoned)
        self.trains(3, before)

    def suspend(self) -> None:
        self.run.apply(suspend=True)
        self.run.until_state("Suspended")
        until(lambda: not self.run.all_pod_names(), "no Pod is left", dump=self.run.describe)

    def resume(self) -> None:
        before = self.run.status["attempt"]
        self.run.apply(suspend=False)
        self.trains(3, before)

    def delete(self) -> None:
        self.run.delete()
        until(lambda: not any(self._objects().values()), "all that was the run's is gone", dump=self.run.describe)

    def end(self) -> Document:
        """What must be the same whoever was killed meanwhile."""
        if not self.run.kubectl("get", "scr", self.run.name, "--ignore-not-found", "-o", "name"):
            return {"objects": self._objects()}
        status = self.run.status
        return {
            "state": status["state"],
            "attempt": status["attempt"],
            "layout": status["layout"],
            "workers": status["workers"],
            "restarts": status["restarts"]["total"],
            "charged": status["restartsWithoutProgress"],
            # by member: a name that was recorded and perhaps given is not given again
            "pods": [p["metadata"]["labels"][names.LABEL_MEMBER] for p in self.run.pods()],
            "objects": self._objects(),
        }

    def _objects(self) -> dict[str, int]:
        kinds = [f"{kind.plural}.{kind.group}".rstrip(".") for kind in OWNED]
        selected = ("-l", f"{names.LABEL_RUN}={self.run.name}", "-o", "json")
        items = json.loads(self.run.kubectl("get", ",".join(kinds), *selected))["items"]
        return {kind.kind: sum(i["kind"] == kind.kind for i in items) for kind in OWNED}

    def _delete_pod_of(self, member: int) -> None:
        pod = self.run.pod_of(member)["metadata"]["name"]
        self.run.kubectl("delete", "pod", pod, "--grace-period=0", "--force")


def test_wherever_the_operator_is_cut_the_run_comes_to_the_same_end(operator: CutOperator, trained_on: Cluster) -> None:
    uncut, writes = Life(trained_on, "life-0"), {}
    ends: dict[str, Any] = {}
    for phase, happens in uncut.phases.items():
        operator.cut(0, "before")
        happens()
        ends[phase], writes[phase] = uncut.end(), len(operator.writes())
    assert operator.cuts == 0
    dice = random.Random(1)
    missed = []
    for number in range(1, LIVES + 1):
        life = Life(trained_on, f"life-{number}")
        for phase, happens in life.phases.items():
            # the first writes of a phase are what it is about; later ones tell how training goes on
            at, when = dice.randint(1, max(1, min(writes[phase], 12))), dice.choice(["before", "after"])
            cuts = operator.cuts
            operator.cut(at, when)
            happens()
            told = f"life {number}, killed {when} write {at} of {phase}: {operator.writes()[:at]}"
            assert not operator.ended_by_itself, f"{told}\n{operator.log.read_text()[-3000:]}"
            found = json.loads(json.dumps(life.end()).replace(life.run.name, uncut.run.name))
            assert found == ends[phase], told
            print(told)
            if operator.cuts == cuts:
                missed.append(told)
    assert operator.cuts >= 6 * LIVES, missed
