"""How soon a connection to the API server that died without a word is taken for dead, by operator and agents alike.

A watch says nothing for minutes where nothing happens. If the machine at its other end loses power or its network, TCP
says nothing either, and whoever watches goes on believing what was true before.
"""

from __future__ import annotations

import socket
from typing import Any

IDLE_SECONDS, PROBE_SECONDS, PROBES = 5, 2, 3
SECONDS = IDLE_SECONDS + PROBE_SECONDS * PROBES
"""From the last word of the other end until the connection is given up."""


def probed_socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket whose other end is asked by the kernel whether it is there (tcp(7)).

    Args:
        address: as `socket.getaddrinfo` has them; family, type and protocol are read.
    """
    made = socket.socket(*address[:3])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": IDLE_SECONDS,
        "TCP_KEEPINTVL": PROBE_SECONDS,
        "TCP_KEEPCNT": PROBES,
        "TCP_USER_TIMEOUT": 1000 * SECONDS,  # the same for what was sent and is not acknowledged
    }
    for name, value in options.items():
        if (option := getattr(socket, name, None)) is not None:  # not every system has each of them
            made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made
