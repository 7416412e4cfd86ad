"""API servers of devcluster: with and without Kubernetes' own gangs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config

from devcluster.controlplane import Standalone

pytestmark = pytest.mark.integration

POD: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "a"},
    "spec": {"schedulingGroup": {"podGroupName": "g"}, "containers": [{"name": "c", "image": "localhost/busybox:1"}]},
}


def groups_and_member(kubeconfig: Path) -> tuple[set[str], dict[str, Any]]:
    """API groups served, and spec of a Pod that asks for a gang as the server keeps it."""
    with config.new_client_from_config(str(kubeconfig)) as api:
        groups = {v.group_version for g in client.ApisApi(api).get_api_versions().groups for v in g.versions}
        core = client.CoreV1Api(api)
        core.create_namespaced_service_account("default", {"metadata": {"name": "default"}})
        pod = core.create_namespaced_pod("default", POD, dry_run="All", _preload_content=False)
        return groups, dict(json.loads(pod.data)["spec"])


def test_gangs_are_served_and_kept_unless_they_are_switched_off(tmp_path):
    for gangs in (True, False):
        standalone = Standalone(tmp_path / str(gangs), gangs=gangs)
        try:
            groups, spec = groups_and_member(standalone.start_api().site.pki.kubeconfig("admin"))
        finally:
            standalone.stop()
        assert ("scheduling.k8s.io/v1beta1" in groups) is gangs
        assert (spec.get("schedulingGroup") == {"podGroupName": "g"}) is gangs
