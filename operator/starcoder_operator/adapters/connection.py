"""Where the API server is and who we are there, for the client library and for kopf alike."""

from __future__ import annotations

import os
import ssl
from collections.abc import Sequence
from pathlib import Path

import aiohttp
from kubernetes.aio.client import Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config

from starcoder_trainer.contract.sockets import probed_socket

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class NoConnection(Exception):
    """Nothing says where the API server is."""


async def load(kubeconfig: str = "") -> Configuration:
    """Server, CA and credentials; tokens of a ServiceAccount are read again as they are rotated.

    Args:
        kubeconfig: file; empty: $KUBECONFIG, else the Pod's ServiceAccount, else ~/.kube/config.

    Raises:
        NoConnection: none of them is there or readable.
    """
    configuration = Configuration()
    file = kubeconfig or os.environ.get("KUBECONFIG", "")
    try:
        if file:
            await load_kube_config(config_file=file, client_configuration=configuration)
        elif os.environ.get("KUBERNETES_SERVICE_HOST"):
            load_incluster_config(client_configuration=configuration)
        else:
            await load_kube_config(client_configuration=configuration)
    except ConfigException as e:
        raise NoConnection(
            f"no way to the API server: {e}; expected a kubeconfig (--kubeconfig, $KUBECONFIG, ~/.kube/config) or a "
            "Pod's ServiceAccount"
        ) from e
    return configuration


def own_namespace() -> str:
    """Namespace of the Pod we run in, `default` outside a cluster."""
    return NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.exists() else "default"


async def watch_session(configuration: Configuration, traces: Sequence[aiohttp.TraceConfig]) -> aiohttp.ClientSession:
    """HTTP session for kopf's watches; made again when the server answers 401, so that it has a fresh token."""
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert, cadata=configuration.ca_cert_data)
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, keyfile=configuration.key_file)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    authorization = await configuration.get_api_key_with_prefix("BearerToken")
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=context, socket_factory=probed_socket),
        headers={"Authorization": authorization} if authorization else {},
        trace_configs=list(traces),
        # a Pod with a large assignment is one line of a watch
        read_bufsize=2**21,
    )
