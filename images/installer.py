"""How this machine's pip and uv reach their package index, handed to a build without becoming part of a layer.

Settings travel as the secret `installer-env` that the Containerfiles mount, files (CA bundle, uv.toml, caches) as bind
mounts.
"""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

INSIDE = "/run/installer"
"""Where a build finds the files; an empty folder of that name remains in the image."""

PASSED = frozenset(
    f"{tool}_{name}"
    for tool, names in {
        "PIP": "INDEX_URL EXTRA_INDEX_URL TRUSTED_HOST PROXY DEFAULT_TIMEOUT TIMEOUT RETRIES KEYRING_PROVIDER",
        "UV": "INDEX DEFAULT_INDEX INDEX_URL EXTRA_INDEX_URL INDEX_STRATEGY INSECURE_HOST HTTP_TIMEOUT HTTP_RETRIES "
        "OFFLINE CONCURRENT_DOWNLOADS KEYRING_PROVIDER",
    }.items()
    for name in names.split()
) | {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"}
"""Variables that mean the same inside; those that name paths or a Python of this machine don't."""

CA_VARIABLES = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
CA_OF_DEBIAN = "/etc/ssl/certs/ca-certificates.crt"


@dataclass(frozen=True)
class Installer:
    env: Mapping[str, str]
    mounts: tuple[tuple[Path, str, str], ...]
    """(path here, path inside, "ro" or "rw")."""

    def secret(self) -> str:
        """Lines that a shell reads with `.`; values may hold anything."""
        return "".join(f"{name}={shlex.quote(value)}\n" for name, value in sorted(self.env.items()))


def installer(
    caches: Path, environ: Mapping[str, str] = os.environ, pip_config: Mapping[str, str] | None = None
) -> Installer:
    """What this machine has set. `caches` gets the folders of pip and uv, so that a build fetches nothing twice."""
    config = _pip_config() if pip_config is None else pip_config
    env = {name: value for name, value in environ.items() if name in PASSED or name.startswith("UV_INDEX_")}
    for key in ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout"):
        if key in config:
            env.setdefault("PIP_" + key.upper().replace("-", "_"), config[key])
    mounts: list[tuple[Path, str, str]] = []
    bundles = [*(environ.get(name, "") for name in CA_VARIABLES), config.get("cert", ""), CA_OF_DEBIAN]
    if bundle := next((Path(b) for b in bundles if b and Path(b).is_file()), None):
        mounts.append((bundle.resolve(), f"{INSIDE}/ca.crt", "ro"))
        env |= {"SSL_CERT_FILE": f"{INSIDE}/ca.crt", "PIP_CERT": f"{INSIDE}/ca.crt"}
    configs = [environ.get("UV_CONFIG_FILE", ""), str(Path.home() / ".config/uv/uv.toml"), "/etc/uv/uv.toml"]
    if file := next((Path(c) for c in configs if c and Path(c).is_file()), None):
        mounts.append((file.resolve(), f"{INSIDE}/uv.toml", "ro"))
        env["UV_CONFIG_FILE"] = f"{INSIDE}/uv.toml"
    for tool in ("pip", "uv"):
        folder = Path(environ.get(f"{tool.upper()}_CACHE_DIR") or caches / tool)
        folder.mkdir(parents=True, exist_ok=True)
        mounts.append((folder.resolve(), f"{INSIDE}/{tool}", "rw"))
        env[f"{tool.upper()}_CACHE_DIR"] = f"{INSIDE}/{tool}"
    return Installer(env, tuple(mounts))


def _pip_config() -> dict[str, str]:
    """What pip's configuration files say: key without its section -> value. Empty without pip."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    found: dict[str, str] = {}
    for line in listed.stdout.splitlines() if listed.returncode == 0 else ():
        key, _, value = line.partition("=")
        section, _, name = key.partition(".")
        if section in ("global", "install"):
            found[name] = str(ast.literal_eval(value)).replace("\n", " ").strip()
    return found
