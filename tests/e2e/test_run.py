"""One StarCoderRun from apply to Succeeded, through the shipped chart and images."""

from __future__ import annotations

import json
import re

import pytest

from devcluster.cluster import Cluster
from examples.demo import stages
from starcoder_trainer.contract import names
from tests.support.cluster import NAMESPACE, Run, manifest, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def completed(ready: Cluster) -> Run:
    """A run that nobody disturbed."""
    run = Run(ready, manifest("completes")).apply()
    run.until_state("Succeeded", "Failed", seconds=600)
    return run


def test_a_run_completes_and_its_status_says_so(completed: Run) -> None:
    status = completed.status
    assert status["state"] == "Succeeded", completed.describe()
    assert {c["type"]: c["status"] for c in status["conditions"]} == {
        "Accepted": "True",
        "Scheduled": "True",
        "Training": "False",
        "CheckpointVerified": "True",
        "Degraded": "False",
        "Complete": "True",
    }
    assert (status["iteration"], status["iterations"], status["progress"]) == (60, 60, "100%")
    assert status["consumedTokens"] == 60 * 4 * 128
    assert status["checkpoint"]["iteration"] == 60
    assert status["restarts"]["total"] == 0
    assert float(status["loss"]) < 7.0, "ln(2048) = 7.6 is what knowing nothing costs"


def test_kubectl_get_answers_whether_it_is_fine(completed: Run) -> None:
    header, line = completed.kubectl("get", "scr", completed.name).splitlines()
    assert header.split() == ["NAME", "STATE", "WORKERS", "ITERATION", "PROGRESS", "LOSS", "TOK/S", "RESTARTS", "AGE"]
    assert line.split()[:2] == [completed.name, "Succeeded"]
    wide = completed.kubectl("get", "scr", completed.name, "-o", "wide").splitlines()[0]
    assert wide.split()[-4:] == ["CKPT", "GOODPUT", "ETA", "REASON"]
    assert completed.name in completed.kubectl("get", "all")


def test_head_lists_only_what_is_kept_and_verified(completed: Run) -> None:
    head = completed.head()
    steps = [e.step for e in head.entries]
    assert steps[-1] == 60
    assert 1 <= len(steps) <= 3, "keepLast is 3"
    assert set(steps) <= {30, 40, 50, 60}, "one that was not listed in time is history, none is invented"
    assert completed.status["checkpoint"]["digest"] == head.entries[-1].digest
    assert {f.size > 0 for f in completed.checkpoint(head.entries[-1]).files} == {True}


def test_pods_that_are_done_are_completed_and_give_their_gpus_back(completed: Run) -> None:
    until(
        lambda: all(p["status"]["phase"] == "Succeeded" for p in completed.pods()),
        "every Pod has completed",
        dump=completed.describe,
    )


def test_the_log_of_the_workers_tells_each_iteration(completed: Run) -> None:
    log = completed.kubectl("logs", f"{completed.name}-w0-0", "-c", "worker")
    assert re.search(r"iteration\s+60/60 \| loss \d+\.\d+", log), log[-2000:]


def test_a_run_s_service_account_may_only_touch_its_assignment_and_leases(completed: Run) -> None:
    account = f"system:serviceaccount:{NAMESPACE}:{names.service_account_name(completed.name)}"

    def rules(user: str, group: str) -> set[str]:
        listing = completed.kubectl("auth", "can-i", "--list", "--as", user, "--as-group", group)
        return {re.sub(r"\s+", " ", line.strip()) for line in listing.splitlines()[1:] if line.strip()}

    everybody = rules("nobody-in-particular", "system:authenticated")
    own = rules(account, "system:authenticated") - everybody
    assert own == {
        f"configmaps [] [{names.assignment_name(completed.name)}] [get list watch]",
        f"leases.coordination.k8s.io [] [{names.lease_name(completed.name, 0)}] [get update patch]",
        f"leases.coordination.k8s.io [] [{names.lease_name(completed.name, 1)}] [get update patch]",
    } or own == {
        f"configmaps [] [{names.assignment_name(completed.name)}] [get list watch]",
        "leases.coordination.k8s.io [] "
        f"[{names.lease_name(completed.name, 0)} {names.lease_name(completed.name, 1)}] [get update patch]",
    }, own


def test_the_operator_may_not_read_secrets_and_has_no_wildcard(trained_on: Cluster) -> None:
    account = f"system:serviceaccount:{stages.OPERATOR_NAMESPACE}:starcoder-operator"
    listing = trained_on.kubectl("auth", "can-i", "--list", "--as", account, "-n", NAMESPACE).stdout
    assert "secrets" not in listing
    resources = [line for line in listing.splitlines()[1:] if not line.startswith(" ") or "/" not in line]
    assert not [line for line in resources if "*.*" in line or "[*]" in line.replace("[]", "")], listing


def test_deleting_a_run_takes_all_that_is_its_away(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("deleted")).apply()
    run.until_state("Running")
    run.delete()
    kinds = "pods,leases,configmaps,serviceaccounts,roles,rolebindings,podgroups"
    until(
        lambda: run.kubectl("get", kinds, "-l", f"{names.LABEL_RUN}={run.name}", "-o", "name").strip() == "",
        "everything labelled with the run is gone",
        dump=lambda: run.kubectl("get", kinds, "-l", f"{names.LABEL_RUN}={run.name}"),
    )


def test_a_run_under_the_name_of_a_deleted_one_refuses_its_checkpoints_unless_told_to_adopt_them(
    trained_on: Cluster,
) -> None:
    run = Run(trained_on, manifest("again", training__iterations=400)).apply()
    before = run.until_checkpoint()
    run.delete()
    run.apply()
    condition = run.until_reason("Training", "CheckpointForeign")
    assert condition["status"] == "False"
    assert "Adopt" in condition["message"]
    run.apply(checkpoint__resume="Adopt")
    after = run.until_state("Running")
    assert after["iteration"] >= before["checkpoint"]["iteration"]
    run.delete()


def test_a_suspended_run_gives_its_pods_back_and_resumes_at_its_checkpoint(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("suspended", training__iterations=400)).apply()
    verified = run.until_checkpoint()["checkpoint"]["iteration"]
    run.apply(suspend=True)
    run.until_state("Suspended")
    until(lambda: not run.pods(), "no Pod is left", dump=run.describe)
    run.apply(suspend=False)
    status = run.until_state("Running")
    assert status["iteration"] >= verified
    assert status["restarts"]["total"] == 0
    run.delete()


def test_every_pod_tells_prometheus_how_training_is(trained_on: Cluster) -> None:
    run = Run(trained_on, manifest("measured", training__iterations=400)).apply()
    run.until_checkpoint()
    pod = run.pods()[0]
    node = trained_on.nodes[0]
    address = pod["status"]["podIP"]
    text = node.run("curl", "-sS", f"http://{address}:{names.METRICS_PORT}/metrics").stdout
    for metric in (
        "tokens_per_second", "tokens_per_second_per_gpu", "iteration", "loss", "learning_rate", "gradient_norm",
        'step_seconds{phase="forward_backward"}', "checkpoint_save_seconds", "checkpoint_save_bytes",
        "checkpoint_upload_seconds", "checkpoint_uploaded_bytes_total",
    ):  # fmt: skip
        assert f"\nstarcoder_{metric} " in text, f"no {metric} in\n{text}"
    run.delete()


def test_a_namespace_that_enforces_the_restricted_standard_takes_the_pods(trained_on: Cluster) -> None:
    label = json.loads(trained_on.kubectl("get", "namespace", NAMESPACE, "-o", "json").stdout)["metadata"]["labels"]
    assert label["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_chart_installs_cleanly_and_its_own_test_passes(trained_on: Cluster) -> None:
    tested = trained_on.helm(
        "test", "starcoder-operator", "--namespace", stages.OPERATOR_NAMESPACE, "--timeout", "3m"
    ).stdout
    assert "Succeeded" in tested
    linted = trained_on.helm("lint", str(stages.CHART), "--strict").stdout
    assert "0 chart(s) failed" in linted
    rendered = trained_on.helm("template", "starcoder-operator", str(stages.CHART), "-n", stages.OPERATOR_NAMESPACE)
    trained_on.kubectl("apply", "--dry-run=server", "-f", "-", stdin=rendered.stdout)
