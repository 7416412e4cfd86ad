"""A node: one process tree in namespaces of its own. It dies by one SIGKILL and comes back as after a reboot."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from . import binaries, cgroups, network, nodefiles
from .addresses import NodeAddress
from .imagefiles import TinyImage, write_archive
from .options import Options
from .process import Daemon, ProcessFailed, environment
from .waiting import until

INIT = Path(__file__).parent / "node-init.sh"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
UNSHARED = ("--mount", "--uts", "--pid")
# The kubelet's connections notice a healed link in under a second, not in 13.
FAST_ENVIRONMENT = {"HTTP2_READ_IDLE_TIMEOUT_SECONDS": "2", "HTTP2_PING_TIMEOUT_SECONDS": "2"}


@dataclass(frozen=True)
class Node:
    """Node `address` of the cluster whose state is in `cluster`."""

    address: NodeAddress
    cluster: Path
    options: Options

    @property
    def name(self) -> str:
        return self.address.name

    @property
    def daemon(self) -> Daemon:
        """`unshare`, which lives exactly as long as the node's first process."""
        return Daemon(self.name, self.cluster)

    @property
    def disk(self) -> Path:
        return self.cluster / "nodes" / self.name

    @property
    def containerd_root(self) -> Path:
        """Its /var/lib/containerd, as this machine sees it."""
        return self.disk / "lib" / "containerd"

    @property
    def running(self) -> bool:
        return self._first_process() is not None

    @property
    def pid(self) -> int:
        """Its first process, as this machine counts; /proc/PID/root is its file system. Raises ProcessFailed when it is
        switched off."""
        pid = self._first_process()
        if pid is None:
            raise ProcessFailed(f"node {self.name} doesn't run; start it with `start-node {self.name}`")
        return pid

    def create(self) -> None:
        """Its disk, with configuration and nothing else."""
        runc = shutil.which("runc", path=SYSTEM_PATH)
        if runc is None:
            raise ProcessFailed(f"found no runc in {SYSTEM_PATH}; install Debian's package runc")
        etc = self.disk / "etc"
        for folder in (etc, self.containerd_root, self.disk / "log"):
            folder.mkdir(parents=True)
        for name, content in nodefiles.files(self.address, self.options.node_monitor, Path(runc)).items():
            (etc / name).write_text(content)

    def start(self) -> None:
        """Switches it on; returns when it has its first process. Raises ProcessFailed where it runs already."""
        if not self.daemon.identity():
            cgroups.remove(self.address.cgroup)
        cgroups.create(self.address.cgroup)
        self.daemon.start(
            ("unshare", *UNSHARED, "--fork", "--kill-child", "--mount-proc", INIT),
            netns=self.address.netns,
            env={
                "NODE": self.name,
                "ADDRESS": self.address.ip,
                "GPUS": str(self.options.gpus_per_node),
                "CLUSTER": str(self.cluster),
                "PROGRAMS": str(binaries.path("kubelet").parent),
                **(FAST_ENVIRONMENT if self.options.node_monitor == "fast" else {}),
            },
        )
        # `unshare` forks a moment later; before that the node would seem to be off.
        until(lambda: self.running, f"node {self.name} has a first process", [self.daemon], every=0.01)

    def kill(self, seconds: float = 60) -> bool:
        """One SIGKILL to its first process, as a machine that loses power; returns once no process of it is left. False
        where it didn't run.

        The kernel lets a pid namespace's first process go only after all others: `unshare`, its parent, ends then.
        """
        pid = self._first_process()
        if pid is None:
            return self.daemon.kill()
        os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + seconds
        while self.daemon.identity():
            if time.monotonic() > end:
                raise ProcessFailed(f"node {self.name} (pid {pid}) still has processes {seconds:.0f} s after SIGKILL")
            time.sleep(0.01)
        self.daemon.pid_file.unlink(missing_ok=True)
        return True

    def run(self, *command: str | Path, timeout: float = 120, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command inside the node. Raises CommandFailed where `check` is set and it exits with a code but 0."""
        done = subprocess.run(
            ["nsenter", f"--target={self.pid}", "--mount", "--uts", "--net", "--pid", "--", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment() | {"PATH": f"/run/programs:{SYSTEM_PATH}"},
            cwd="/",
            check=False,
        )
        if check and done.returncode:
            words = " ".join(map(str, command))
            raise CommandFailed(f"`{words}` on node {self.name} exited with {done.returncode}: {done.stderr.strip()}")
        return done

    def ctr(self, *arguments: str | Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """containerd's client, in the namespace of Kubernetes' images."""
        return self.run("ctr", "--address", nodefiles.SOCKET, "--namespace", "k8s.io", *arguments, timeout=timeout)

    def wait_for_containerd(self) -> None:
        until(self._containerd_answers, f"containerd of {self.name} answers", [self.daemon], every=0.1)

    def import_image(self, image: TinyImage) -> None:
        """Raises CommandFailed."""
        with tempfile.NamedTemporaryFile(dir=self.disk, suffix=".tar") as archive:
            write_archive(image, Path(archive.name))
            self.ctr("images", "import", "--local", archive.name)

    @property
    def plugged_in(self) -> bool:
        return network.link_is_up(self.address)

    def plug(self, *, plugged: bool) -> None:
        """Its network cable, in or out."""
        network.set_link(self.address, up=plugged)

    def cut_off(self, but: int) -> None:
        """From all but one TCP port of the control plane."""
        network.cut_off(self.address, but)

    def cut_off_from(self, port: int) -> None:
        """From one TCP port of the control plane."""
        network.cut_off_from(self.address, port)

    def join_again(self) -> None:
        """After `cut_off` or `cut_off_from`, if there was one."""
        network.join_again(self.address)

    def logs(self) -> tuple[Path, ...]:
        return tuple(sorted((self.cluster / "log").glob(f"{self.name}*.log")))

    def _first_process(self) -> int | None:
        parent = self.daemon.identity()
        if parent is None:
            return None
        try:
            children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        except FileNotFoundError:
            return None
        return int(children[0]) if children else None

    def _containerd_answers(self) -> bool:
        try:
            # Before node-init.sh has mounted the node's own /run there is no ctr in it, so no other containerd answers.
            return bool(self.ctr("version"))
        except (OSError, CommandFailed, ProcessFailed):
            return False


class CommandFailed(RuntimeError):
    """A command inside a node exited with another code than 0."""
