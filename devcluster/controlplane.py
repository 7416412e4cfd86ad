"""etcd, API server and what runs beside them: started, waited for, stopped; with nodes or all alone on loopback."""

from __future__ import annotations

import random
import socket
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import binaries, components, pki, s3
from .addresses import CONTROL_PLANE, DNS_READY_PORT, S3_PORT, control_plane_netns, nodes
from .components import Site
from .kubeapi import KubeApi
from .network import inside
from .options import Options
from .process import Daemon, environment
from .waiting import until

PORTS = (20000, 30000)
"""Below those that Linux gives to outgoing connections (32768 to 60999 unless changed)."""
COMPONENTS = ("etcd", "apiserver", "controller-manager", "scheduler", "dns", "s3")


@dataclass(frozen=True)
class ControlPlane:
    """The control plane of one state folder."""

    site: Site
    options: Options

    @classmethod
    def of_cluster(cls, name: str, folder: Path, options: Options) -> ControlPlane:
        return cls(Site(folder, control_plane_netns(name)), options)

    @property
    def api(self) -> KubeApi:
        return KubeApi(self.site.pki, self.site.address, self.site.api_port, self.site.netns)

    @property
    def s3(self) -> s3.Server:
        return s3.Server(self.site.folder, CONTROL_PLANE, S3_PORT, self.site.netns)

    def daemon(self, component: str) -> Daemon:
        """Raises ValueError where no component is called that."""
        if component not in COMPONENTS:
            raise ValueError(f"component: found {component!r}, expected one of {', '.join(COMPONENTS)}")
        return Daemon(component, self.site.folder)

    def create_pki(self) -> None:
        certificates = [*pki.control_plane_certificates(self.site.address)]
        if self.site.netns:
            cluster = self.site.netns.removesuffix("-cp")
            certificates += map(pki.node_certificate, nodes(cluster, self.options.nodes))
        self.site.pki.create(certificates, self.site.server)

    def start(self, component: str) -> None:
        """Returns at once; `wait_for_api` and friends wait."""
        daemon = self.daemon(component)
        site, gangs = self.site, self.options.gangs
        match component:
            case "etcd":
                program, argv = "etcd", components.etcd(site)
            case "apiserver":
                program, argv = "kube-apiserver", components.apiserver(site, gangs=gangs)
            case "controller-manager":
                program = "kube-controller-manager"
                argv = components.controller_manager(site, gangs=gangs, node_monitor=self.options.node_monitor)
            case "scheduler":
                (site.folder / "scheduler.yaml").write_text(components.scheduler_config(site))
                program, argv = "kube-scheduler", components.scheduler(site, gangs=gangs)
            case "dns":
                (site.folder / "Corefile").write_text(components.corefile(site))
                program, argv = "coredns", components.dns(site)
            case _:
                self.s3.start()
                return
        daemon.start((binaries.path(program), *argv), netns=site.netns, tied=not site.netns)

    def stop(self, component: str) -> None:
        """By SIGKILL; returns once it is gone."""
        self.daemon(component).kill()

    def wait_for_api(self) -> None:
        until(
            self.api.ready, "the API server is ready", map(self.daemon, ("etcd", "apiserver")), seconds=300, every=0.1
        )

    def start_all(self) -> None:
        """Everything, in an order in which nothing has to try twice; returns when the API server and DNS answer."""
        for component in ("etcd", "apiserver", "s3"):
            self.start(component)
        self.wait_for_api()
        for component in ("controller-manager", "scheduler"):
            self.start(component)
        self.kubectl("apply", "-f", "-", stdin=components.roles())
        self.start("dns")
        until(self._dns_ready, "DNS is ready", [self.daemon("dns")])
        account = "/api/v1/namespaces/default/serviceaccounts/default"
        until(
            lambda: self.api.exists(account),
            "the controller manager has made default's ServiceAccount",
            map(self.daemon, ("etcd", "apiserver", "controller-manager", "scheduler")),
        )

    def kubectl(
        self, *arguments: str, stdin: str | None = None, check: bool = True, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """kubectl as admin. Raises KubectlFailed where `check` is set and it exits with another code than 0."""
        argv = (*self.kubectl_argv(), *arguments)
        done = subprocess.run(
            argv,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment(),
            check=False,
        )
        if check and done.returncode:
            raise KubectlFailed(f"`kubectl {' '.join(arguments)}` exited with {done.returncode}: {done.stderr.strip()}")
        return done

    def kubectl_argv(self) -> tuple[str, ...]:
        return (
            *self.enter(),
            str(binaries.path("kubectl")),
            "--kubeconfig",
            str(self.site.pki.kubeconfig("admin")),
        )

    def enter(self) -> tuple[str, ...]:
        """What to put before a command so that it runs where the control plane listens."""
        return ("nsenter", f"--net=/run/netns/{self.site.netns}") if self.site.netns else ()

    def _dns_ready(self) -> bool:
        with inside(self.site.netns):
            try:
                connection = socket.create_connection((self.site.address, DNS_READY_PORT), timeout=2)
            except OSError:
                return False
            with connection:
                connection.sendall(b"GET /ready HTTP/1.0\r\n\r\n")
                return b" 200 " in connection.recv(100)


class KubectlFailed(RuntimeError):
    """kubectl exited with another code than 0; the message has its words."""


@dataclass(frozen=True)
class Standalone:
    """An API server with its etcd, and an S3 server, on free ports of loopback: no node, no root. They die with us.

    What needs a controller (a namespace's ServiceAccount and its deletion, garbage collection) doesn't happen.
    """

    folder: Path
    gangs: bool = True

    def start_api(self) -> ControlPlane:
        """Returns once it is ready."""
        api, client, peer = free_ports(3)
        site = Site(self.folder, address="127.0.0.1", api_port=api, etcd_port=client, etcd_peer_port=peer)
        plane = ControlPlane(site, Options(nodes=0, gangs=self.gangs))
        plane.create_pki()
        plane.start("etcd")
        plane.start("apiserver")
        plane.wait_for_api()
        return plane

    def start_s3(self) -> s3.S3:
        """Returns once it answers."""
        (port,) = free_ports(1)
        server = s3.Server(self.folder, "127.0.0.1", port)
        server.start()
        until(lambda: _listens(port), "the S3 server listens", [server.daemon])
        return server.credentials

    def stop(self) -> None:
        for component in ("apiserver", "etcd", "s3"):
            Daemon(component, self.folder).kill()


def free_ports(count: int) -> tuple[int, ...]:
    """Ports of loopback that nobody listens on and no outgoing connection may take meanwhile; all different."""
    found: set[int] = set()
    while len(found) < count:
        port = random.randrange(*PORTS)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.add(port)
    return tuple(found)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True
