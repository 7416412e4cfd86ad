"""Keys and certificates of a cluster: one authority, P-256, made anew with each cluster."""

from __future__ import annotations

import base64
import json
import secrets
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .addresses import FIRST_SERVICE, NodeAddress

DAYS = "3650"
KUBERNETES_NAMES = (
    "localhost",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
)


@dataclass(frozen=True)
class Certificate:
    """One to be issued: who (Kubernetes reads O as groups, CN as the user), for what, under which names."""

    name: str
    subject: str
    usage: str = "clientAuth"
    alternative_names: tuple[str, ...] = ()
    """As openssl writes them: IP:…, DNS:…"""


@dataclass(frozen=True)
class Pki:
    """A folder with `ca`, `sa` and the issued certificates, as NAME.crt, NAME.key and NAME.conf (kubeconfig)."""

    folder: Path

    def certificate(self, name: str) -> Path:
        return self.folder / f"{name}.crt"

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key"

    def kubeconfig(self, name: str) -> Path:
        return self.folder / f"{name}.conf"

    def create(self, certificates: Iterable[Certificate], server: str) -> None:
        """Makes all, with a kubeconfig for each client of the API server `server` (a URL)."""
        self.folder.mkdir(parents=True, mode=0o700)
        # fmt: off
        _openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-sha256",
            "-keyout", self.key("ca"), "-out", self.certificate("ca"), "-subj", "/CN=kubernetes", "-days", DAYS,
            "-addext", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature",
        )
        # fmt: on
        _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-out", self.key("sa"))
        _openssl("pkey", "-in", self.key("sa"), "-pubout", "-out", self.folder / "sa.pub")
        for certificate in certificates:
            self._issue(certificate)
            if "clientAuth" in certificate.usage:
                self._write_kubeconfig(certificate.name, server)

    def _issue(self, wanted: Certificate) -> None:
        key, request, extensions = self.key(wanted.name), self.folder / "csr", self.folder / "extensions"
        names = f"subjectAltName={','.join(wanted.alternative_names)}\n" if wanted.alternative_names else ""
        extensions.write_text(
            f"keyUsage=critical,digitalSignature\nextendedKeyUsage={wanted.usage}\n{names}"
            "authorityKeyIdentifier=keyid\n"
        )
        # fmt: off
        _openssl(
            "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", key, "-out", request, "-subj", wanted.subject,
        )
        _openssl(
            "x509", "-req", "-in", request, "-CA", self.certificate("ca"), "-CAkey", self.key("ca"), "-sha256",
            "-set_serial", f"0x{secrets.token_hex(8)}", "-days", DAYS, "-extfile", extensions,
            "-out", self.certificate(wanted.name),
        )
        # fmt: on
        request.unlink()
        extensions.unlink()

    def _write_kubeconfig(self, name: str, server: str) -> None:
        """Whole in itself, so that it may be copied; JSON is YAML."""

        def data(path: Path) -> str:
            return base64.b64encode(path.read_bytes()).decode()

        cluster = {"server": server, "certificate-authority-data": data(self.certificate("ca"))}
        user = {
            "client-certificate-data": data(self.certificate(name)),
            "client-key-data": data(self.key(name)),
        }
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "devcluster", "cluster": cluster}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "devcluster", "context": {"cluster": "devcluster", "user": name}}],
            "current-context": "devcluster",
        }
        path = self.kubeconfig(name)
        path.touch(mode=0o600)
        path.write_text(json.dumps(document, indent=2))


def control_plane_certificates(address: str) -> tuple[Certificate, ...]:
    """Those of the API server, reached at `address`, and of its clients that run beside it."""
    names = (f"IP:{address}", "IP:127.0.0.1", f"IP:{FIRST_SERVICE}", *(f"DNS:{n}" for n in KUBERNETES_NAMES))
    components = ("kube-controller-manager", "kube-scheduler", "kube-proxy", "coredns")
    return (
        Certificate("apiserver", "/CN=kube-apiserver", "serverAuth", tuple(dict.fromkeys(names))),
        Certificate("apiserver-kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client"),
        Certificate("admin", "/O=system:masters/CN=admin"),
        *(Certificate(c, f"/CN=system:{c}") for c in components),
    )


def node_certificate(node: NodeAddress) -> Certificate:
    """A kubelet's: its user for the node authorizer, and what it serves logs and exec with."""
    return Certificate(
        node.name,
        f"/O=system:nodes/CN=system:node:{node.name}",
        "serverAuth,clientAuth",
        (f"IP:{node.ip}", f"DNS:{node.name}"),
    )


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False, umask=0o077)
    if done.returncode:
        raise RuntimeError(f"`openssl {' '.join(map(str, arguments))}`:\n{done.stderr.strip()}")
