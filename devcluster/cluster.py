"""A whole cluster: brought up, looked at, hurt, removed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from . import binaries, cgroups, imagefiles, kubeapi, network, packages, paths
from .addresses import MAX_NODES, NAME, S3_PORT, control_plane_netns
from .addresses import nodes as node_addresses
from .controlplane import COMPONENTS, ControlPlane
from .leftovers import LeftBehind, found, mounts
from .lock import locked
from .node import Node
from .options import Options
from .process import Daemon, environment
from .s3 import S3, make_buckets
from .waiting import until

__all__ = ["S3", "Cluster", "ClusterError", "Node", "Options"]


class ClusterError(RuntimeError):
    """What was asked can't be done to this cluster; the message says why and what can."""


@dataclass(frozen=True)
class Cluster:
    """The cluster called `name`; several may live side by side. Making the object starts nothing."""

    name: str = "starcoder"

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name: found {self.name!r}, expected {NAME.pattern}")

    # -- looking ------------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        return paths.state(self.name)

    @property
    def running(self) -> bool:
        """Whether `up` finished and the machine was not rebooted since; nodes and components may be stopped."""
        return self._complete.exists() and control_plane_netns(self.name) in network.existing(self.name)

    @property
    def options(self) -> Options:
        """What it was brought up with. Raises ClusterError where it wasn't."""
        try:
            return Options.from_json(self._options.read_text())
        except FileNotFoundError:
            raise ClusterError(f"cluster {self.name} doesn't run; `python -m devcluster up` starts one") from None
        except (TypeError, ValueError) as e:
            raise ClusterError(f"{self._options} is of another version ({e}); run `down`, then `up`") from e

    @property
    def kubeconfig(self) -> Path:
        """The admin's. Its server answers only `inside` the control plane's network namespace."""
        return self.plane.site.pki.kubeconfig("admin")

    @property
    def s3(self) -> S3:
        return self.plane.s3.credentials

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All, those that are switched off too."""
        options = self.options
        return tuple(Node(a, self.folder, options) for a in node_addresses(self.name, options.nodes))

    @property
    def plane(self) -> ControlPlane:
        return ControlPlane.of_cluster(self.name, self.folder, self.options)

    def node(self, name: str) -> Node:
        """Raises ClusterError where no node is called that."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise ClusterError(f"no node is called {name!r}; there are {', '.join(n.name for n in self.nodes)}")

    def kubectl(
        self, *arguments: str, stdin: str | None = None, check: bool = True, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """kubectl as admin. Raises KubectlFailed where `check` is set and it exits with a code but 0."""
        return self.plane.kubectl(*arguments, stdin=stdin, check=check, timeout=timeout)

    def helm(self, *arguments: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """helm as admin, with state and caches of its own. Raises ClusterError where `check` is set and it fails."""
        argv = (*self.plane.enter(), str(binaries.path("helm")), *arguments)
        helm = self.folder / "helm"
        folders = {f"HELM_{kind}_HOME": str(helm / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment() | folders | {"KUBECONFIG": str(self.kubeconfig)},
            check=False,
        )
        if check and done.returncode:
            raise ClusterError(f"`helm {' '.join(arguments)}` exited with {done.returncode}: {done.stderr.strip()}")
        return done

    def inside(self) -> AbstractContextManager[None]:
        """The calling thread, and what it starts meanwhile, reaches API server, Pods and S3 by their addresses."""
        return network.inside(control_plane_netns(self.name))

    def make_buckets(self, *names: str) -> None:
        """Buckets of its S3 server; those that exist are left as they are."""
        with self.inside():
            make_buckets(self.s3, names)

    # -- hurting ------------------------------------------------------------------------------------------------------

    def kill_node(self, name: str) -> None:
        """Power off by one SIGKILL; returns once no process of it is left."""
        if not self.node(name).kill():
            raise ClusterError(f"node {name} doesn't run")

    def start_node(self, name: str) -> None:
        """Power on; returns before it is Ready."""
        node = self.node(name)
        if node.running:
            raise ClusterError(f"node {name} runs already")
        node.start()

    def partition(self, name: str) -> None:
        """Unplugs a node's network cable: its containers run on, nobody hears of them."""
        self.node(name).plug(plugged=False)

    def partition_from_all_but_s3(self, name: str) -> None:
        """Its containers run on, and S3 alone hears of them."""
        self.node(name).cut_off(but=S3_PORT)

    def partition_from_s3(self, name: str) -> None:
        """S3 alone hears of it no more."""
        self.node(name).cut_off_from(S3_PORT)

    def heal(self, name: str) -> None:
        """Ends a partition of any kind."""
        self.node(name).join_again()
        self.node(name).plug(plugged=True)

    def stop_component(self, name: str) -> None:
        """SIGKILL to etcd, apiserver, controller-manager, scheduler, dns or s3; returns once it is gone."""
        self.plane.stop(name)

    def start_component(self, name: str) -> None:
        """Returns at once, but for the API server: when it is ready."""
        self.plane.start(name)
        if name == "apiserver":
            self.plane.wait_for_api()

    def mend(self) -> None:
        """Starts what is stopped, plugs in what is unplugged; returns with all nodes Ready and their GPUs on offer."""
        for component in COMPONENTS:
            if self.plane.daemon(component).identity() is None:
                self.start_component(component)
        for node in self.nodes:
            self.heal(node.name)
            if not node.running:
                node.start()
        self._wait_for_nodes(self.options)

    # -- up and down --------------------------------------------------------------------------------------------------

    def up(self, options: Options | None = None) -> bool:
        """Returns with all nodes Ready; False where it ran already. Without `options`: as it runs, else the defaults.

        What one that was cut half-way left is removed first; one that fails half-way leaves its logs, no process.
        Raises ClusterError where it runs with other options, PackagesMissing, BuildFailed, ProcessFailed.
        """
        require_linux_root()
        packages.ensure(*packages.CLUSTER)
        binaries.build()
        with self._locked():
            if self.running:
                if options not in (None, self.options):
                    raise ClusterError(f"cluster {self.name} runs with {self.options}; run `down` before {options}")
                return False
            self._remove()
            try:
                self._bring_up(options or Options())
            except BaseException:
                self._stop_all()
                raise
            return True

    def down(self) -> None:
        """Removes it with all its data; also one that never came up whole. Raises LeftBehind, naming what withstood."""
        require_linux_root()
        with self._locked():
            self._remove()
            if left := found(self.name):
                raise LeftBehind(self.name, left)

    def _bring_up(self, options: Options) -> None:
        self.folder.mkdir(parents=True, mode=0o700)
        self._options.write_text(options.to_json())
        plane, nodes = self.plane, self.nodes
        plane.create_pki()
        network.create(self.name, [n.address for n in nodes])
        with ThreadPoolExecutor(max_workers=1) as pool:
            switched_on = pool.submit(self._switch_on, nodes)
            plane.start_all()
            switched_on.result()
        self._wait_for_nodes(options)
        self._complete.touch()

    def _switch_on(self, nodes: Sequence[Node]) -> None:
        """Beside the control plane: a kubelet tries until the API server answers."""
        for node in nodes:
            node.create()
            node.start()
        images = (imagefiles.pause(), imagefiles.busybox())
        for node in nodes:
            node.wait_for_containerd()
            for image in images:
                node.import_image(image)

    def _wait_for_nodes(self, options: Options) -> None:
        def ready() -> bool:
            here = self.plane.api.nodes()
            well = [n for n in here if kubeapi.is_ready(n) and kubeapi.gpus(n) == options.gpus_per_node]
            return len(well) == options.nodes

        daemons = (*(n.daemon for n in self.nodes), *map(self.plane.daemon, COMPONENTS))
        until(ready, f"{options.nodes} nodes are Ready with {options.gpus_per_node} GPUs each", daemons, every=0.1)

    def _stop_all(self) -> None:
        """Processes, namespaces, cgroups; not the folder. Works on whatever is there, even with the folder lost."""
        nodes = [Node(a, self.folder, Options()) for a in node_addresses(self.name, MAX_NODES)]
        for node in nodes:
            node.kill()
        for component in COMPONENTS:
            Daemon(component, self.folder).kill()
        network.remove(self.name)
        for node in nodes:
            cgroups.remove(node.address.cgroup)
        self._complete.unlink(missing_ok=True)

    def _remove(self) -> None:
        self._stop_all()
        if mounted := mounts(self.name):  # deleting would reach through them
            raise LeftBehind(self.name, mounted)
        if self.folder.exists():
            shutil.rmtree(self.folder)

    @property
    def _options(self) -> Path:
        return self.folder / "options.json"

    @property
    def _complete(self) -> Path:
        return self.folder / "complete"

    def _locked(self) -> AbstractContextManager[None]:
        return locked(self.folder.with_name(f"{self.name}.lock"), f"up or down of {self.name}")


def require_linux_root() -> None:
    """Raises ClusterError."""
    if sys.platform != "linux":
        raise ClusterError(f"the dev cluster is made of Linux namespaces; found {sys.platform}: run it on Linux")
    remedy = "run it as root of a machine (sudo), or in a container with --privileged"
    if os.geteuid() != 0:
        raise ClusterError(f"making namespaces and mounts needs root; found uid {os.geteuid()}; {remedy}")
    tried = subprocess.run(
        ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "true"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        raise ClusterError(f"root can't make namespaces here: {tried.stderr.strip()}; {remedy}")
