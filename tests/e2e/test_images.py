"""The shipped images as nodes run them: what is in them, how they get there, and what a change of the sources costs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import devcluster.images
from devcluster.cluster import Cluster
from devcluster.node import Node
from images.build import IMAGES, BuiltImage, build, push
from images.built import folder
from images.context import REPOSITORY

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]  # the first build installs 6 GB

NAMESPACE = "images"
SOURCES = ("devcluster", "images", "operator", "trainer", "requirements", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def built() -> dict[str, BuiltImage]:
    return build()


@pytest.fixture(scope="module")
def loaded(up: Cluster, built: dict[str, BuiltImage]) -> Iterator[Cluster]:
    """Both images on all nodes, and a namespace where only Pods without rights may run."""
    for image in built.values():
        devcluster.images.load(up, image.reference)
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}}
    up.kubectl("apply", "-f", "-", stdin=json.dumps(namespace))
    yield up
    up.kubectl("delete", "namespace", NAMESPACE, "--wait=true", timeout=120)


@pytest.fixture(scope="module", params=sorted(IMAGES))
def inside(request: pytest.FixtureRequest, loaded: Cluster) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command in a Pod of the image, as PSS restricted wants it and with an unwritable root."""
    name = f"inside-{request.param}"
    start_pod(loaded, name, IMAGES[request.param])

    def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return loaded.kubectl("-n", NAMESPACE, "exec", name, "--", *command, check=check, timeout=240)

    return run


def start_pod(cluster: Cluster, name: str, image: str, node: str = "") -> None:
    """Returns once it is Ready. It sleeps."""
    container = {
        "name": "main",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sleep", "infinity"],
        "securityContext": {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    spec: dict[str, Any] = {
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
        "terminationGracePeriodSeconds": 0,
    }
    if node:
        spec["nodeName"] = node
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": NAMESPACE}, "spec": spec}
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(pod))
    cluster.kubectl("-n", NAMESPACE, "wait", f"pod/{name}", "--for=condition=Ready", "--timeout=120s", timeout=150)


def until(met: Callable[[], bool], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)


def snapshots(node: Node) -> set[str]:
    return {line.split()[0] for line in node.ctr("snapshots", "list").stdout.splitlines()[1:]}


def images(node: Node) -> dict[str, str]:
    """Name to the rest of its line: type, digest, size, platforms, labels."""
    return dict(line.split(maxsplit=1) for line in node.ctr("images", "list").stdout.splitlines()[1:])


# -- what is in them --------------------------------------------------------------------------------------------------


def test_an_image_runs_as_a_user_of_its_own_on_a_root_file_system_that_it_cannot_write(inside: Any) -> None:
    assert inside("id", "-u").stdout.strip() == "10001"
    assert inside("id", "-un").stdout.strip() == "starcoder"
    refused = inside("touch", "/opt/starcoder/new", check=False)
    assert refused.returncode
    assert "Read-only file system" in refused.stderr
    assert inside("sh", "-c", "touch /tmp/new && echo written").stdout.strip() == "written"


def test_an_image_holds_no_compiler_and_no_installer(inside: Any) -> None:
    programs = "cc gcc g++ c++ clang rustc go make cmake ld as nvcc pip pip3 uv apt-get"
    found = inside("sh", "-c", f"for p in {programs}; do command -v $p; done; echo end").stdout.split()
    assert found == ["end"]
    assert "No module named 'pip'" in inside("python", "-c", "import pip", check=False).stderr


def test_an_image_holds_nothing_of_the_machine_that_built_it(inside: Any) -> None:
    listed = inside(
        "sh", "-c", "find /run/secrets /run/installer -type f -size +0 2>/dev/null; echo end"
    ).stdout.split()
    assert [line for line in listed if "serviceaccount" not in line] == ["end"]
    assert inside("sh", "-c", "find / -xdev -name '*.whl' -path '*starcoder*' 2>/dev/null; echo end").stdout == "end\n"


def test_the_operator_s_program_answers(loaded: Cluster) -> None:
    start_pod(loaded, "operator-help", IMAGES["operator"])
    said = loaded.kubectl("-n", NAMESPACE, "exec", "operator-help", "--", "starcoder-operator", "--help").stdout
    assert "usage: starcoder-operator" in said


def test_the_trainer_s_program_answers_and_torch_and_megatron_import(loaded: Cluster) -> None:
    start_pod(loaded, "trainer-help", IMAGES["trainer"])

    def run(*command: str) -> str:
        return loaded.kubectl("-n", NAMESPACE, "exec", "trainer-help", "--", *command, timeout=240).stdout

    assert "usage: starcoder-trainer COMMAND" in run("starcoder-trainer", "--help")
    assert "--output" in run("starcoder-trainer", "prepare", "--help")
    script = "import torch, megatron.core as m; print(m.__version__, int(torch.ones(2, 2).sum()))"
    assert run("python", "-c", script).split()[-1] == "4"
    sources = run("sh", "-c", "find /usr/lib/python3.13 -name '*.py' | wc -l")
    assert int(sources) > 500  # what the demo trains on


# -- how they get there -----------------------------------------------------------------------------------------------


def test_nodes_share_one_copy_of_an_image_s_files(loaded: Cluster, built: dict[str, BuiltImage]) -> None:
    layer = max(built["trainer"].layers, key=lambda x: x.size)
    largest = max((p for p in Path(layer.folder).rglob("*.so*") if p.is_file()), key=lambda p: p.stat().st_size)
    for node in loaded.nodes:
        store = node.containerd_root / "io.containerd.snapshotter.v1.overlayfs" / "snapshots"
        copies = list(store.glob(f"*/fs/{largest.relative_to(layer.folder)}"))
        assert [c.samefile(largest) for c in copies] == [True]


def test_an_image_starts_on_every_node_under_the_digest_that_was_built(
    loaded: Cluster, built: dict[str, BuiltImage]
) -> None:
    for node in loaded.nodes:
        start_pod(loaded, f"on-{node.name}", IMAGES["trainer"], node.name)
        path = "jsonpath={.status.containerStatuses[0].imageID}"
        shown = loaded.kubectl("-n", NAMESPACE, "get", "pod", f"on-{node.name}", "-o", path).stdout
        stored = images(node)[IMAGES["trainer"]].split()
        assert built["trainer"].digest in stored
        assert shown
        assert "io.cri-containerd.pinned=pinned" in stored[-1]  # the kubelet never deletes it


def test_loading_again_changes_nothing(loaded: Cluster) -> None:
    before = [(snapshots(n), images(n)) for n in loaded.nodes]
    devcluster.images.load(loaded, IMAGES["trainer"])
    assert [(snapshots(n), images(n)) for n in loaded.nodes] == before


def test_a_node_that_lost_power_still_has_its_images(loaded: Cluster) -> None:
    node = loaded.nodes[-1]
    loaded.kill_node(node.name)
    loaded.start_node(node.name)
    loaded.mend()
    start_pod(loaded, "after-power-loss", IMAGES["trainer"], node.name)
    command = ("starcoder-trainer", "--help")
    assert "usage" in loaded.kubectl("-n", NAMESPACE, "exec", "after-power-loss", "--", *command).stdout


def test_a_removed_image_frees_its_layers_and_a_load_that_was_cut_is_taken_up_again(
    loaded: Cluster, built: dict[str, BuiltImage]
) -> None:
    """Cut as by a kill between a layer's files and its commit."""
    image = built["operator"]
    *_, top = devcluster.images.chain_ids([layer.diff_id for layer in image.layers])
    loaded.kubectl("-n", NAMESPACE, "delete", "pods", "--all", "--wait=true")
    # A layer stays as long as a container stands on it, such as the operator's, where that is installed.
    pods = json.loads(loaded.kubectl("get", "pods", "-A", "-o", "json").stdout)["items"]
    used = {p["spec"].get("nodeName") for p in pods if image.reference in [c["image"] for c in p["spec"]["containers"]]}
    node = next(n for n in loaded.nodes if n.name not in used)
    for name, line in images(node).items():
        if image.digest in line:
            node.ctr("images", "remove", name)
    until(lambda: top not in snapshots(node), "the removed image's own layer is gone")
    node.ctr("snapshots", "prepare", f"fill-{top}")
    devcluster.images.load_on_node(node, image)
    assert top in snapshots(node)
    assert f"fill-{top}" not in snapshots(node)


def test_an_image_can_be_loaded_under_another_name(loaded: Cluster) -> None:
    devcluster.images.load(loaded, IMAGES["operator"], tag="registry.invalid/team/operator:1")
    start_pod(loaded, "renamed", "registry.invalid/team/operator:1")
    for node in loaded.nodes:
        assert "io.cri-containerd.pinned=pinned" in images(node)["registry.invalid/team/operator:1"]
        node.ctr("images", "remove", "registry.invalid/team/operator:1")


def test_a_pushed_image_is_whole_and_an_archive_is_loaded_as_it_is(
    loaded: Cluster, built: dict[str, BuiltImage], tmp_path: Path
) -> None:
    name = "registry.invalid/operator:1"
    push(built["operator"], f"oci-archive:{tmp_path}/operator.tar:{name}")
    devcluster.images.load(loaded, tmp_path / "operator.tar")
    start_pod(loaded, "from-archive", name)
    command = ("starcoder-operator", "--help")
    assert "usage" in loaded.kubectl("-n", NAMESPACE, "exec", "from-archive", "--", *command).stdout
    for node in loaded.nodes:
        assert "io.cri-containerd.pinned=pinned" in images(node)[name]
        node.ctr("images", "remove", name)


# -- what a change costs ----------------------------------------------------------------------------------------------


@pytest.fixture
def changed(tmp_path: Path, built: dict[str, BuiltImage]) -> Iterator[Path]:
    """A copy of the repository with another line in the trainer's sources, one that no build has in its storage."""
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, tmp_path / name)
    with (tmp_path / "trainer" / "starcoder_trainer" / "__init__.py").open("a") as file:
        file.write(f"\nTEST = {uuid.uuid4().hex!r}\n")
    yield tmp_path
    build()  # the references mean this tree's images again


def start_build(repository: Path, name: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "images.build", name]
    return subprocess.Popen(argv, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_change_of_the_sources_replaces_the_last_layer_alone(changed: Path, built: dict[str, BuiltImage]) -> None:
    process = start_build(changed, "trainer")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    after = devcluster.images.resolve(IMAGES["trainer"])
    assert isinstance(after, BuiltImage)
    assert out.split() == [after.reference, after.digest]
    assert after.layers[:-1] == built["trainer"].layers[:-1]
    assert after.layers[-1] != built["trainer"].layers[-1]


def test_an_interrupted_build_leaves_no_mount_no_process_and_no_half_image(changed: Path) -> None:
    before = devcluster.images.resolve(IMAGES["operator"])
    process = start_build(changed, "operator")
    assert process.stderr is not None
    for line in process.stderr:
        if "STEP 9/9" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert str(folder()) not in Path("/proc/mounts").read_text()
    assert not programs_that_name(folder())
    assert devcluster.images.resolve(IMAGES["operator"]) == before
    process = start_build(changed, "operator")  # and the next one isn't bothered by what is left in the storage
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert devcluster.images.resolve(IMAGES["operator"]) != before


def programs_that_name(path: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(path) in words and int(process.name) != os.getpid():
            found.append(words.replace("\0", " "))
    return found


def test_a_mount_that_buildah_left_over_its_storage_keeps_no_layer_from_being_linked() -> None:
    place = folder() / "tmp" / f"mount-{os.getpid()}"
    source, target = place / "overlay" / "layer", place / "node"
    source.mkdir(parents=True)
    target.mkdir()
    (source / "file").write_text("content")
    subprocess.run(["mount", "--bind", place / "overlay", place / "overlay"], check=True)
    try:
        link = ["cp", "--archive", "--link", f"{source}/.", f"{target}/"]
        assert subprocess.run(link, capture_output=True, check=False).returncode != 0, "links cross mounts here"
        subprocess.run([*devcluster.images.past_mounts(source), *link], check=True)
        assert (target / "file").stat().st_nlink == 2
    finally:
        subprocess.run(["umount", place / "overlay"], check=True)
        shutil.rmtree(place)
