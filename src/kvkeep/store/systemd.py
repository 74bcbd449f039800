"""Notify a service manager that the store is ready, what it is doing, and that it is ending (sd_notify(3)).

Knows nothing about the store. Without NOTIFY_SOCKET in the environment it sends nothing.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping

log = logging.getLogger("kvkeep.store")


def notify(state: str, environ: Mapping[str, str]) -> None:
    """Send a state, such as "READY=1" or "STATUS=...", as one datagram; never wait."""
    path = environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError as error:
            log.debug("%r was not sent to the service manager: %s", state, error)
