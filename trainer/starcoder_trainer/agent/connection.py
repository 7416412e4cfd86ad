"""The agent's connection to the API server."""

from __future__ import annotations

import aiohttp
from kubernetes.aio.client import ApiClient
from kubernetes.aio.client.rest import RESTClientObject

from starcoder_trainer.contract.sockets import probed_socket


class _Probing(RESTClientObject):  # type: ignore[misc]  # the client library has no types there
    def _create_connector(self) -> aiohttp.TCPConnector:
        return aiohttp.TCPConnector(limit=self.maxsize, ssl=self.ssl_context, socket_factory=probed_socket)


def api_client() -> ApiClient:
    """With the default configuration; a connection that died without a word is noticed after `sockets.SECONDS`."""
    made = ApiClient()
    made.rest_client = _Probing(made.configuration)
    return made
