"""What the store tells a service manager: that it is ready, what it is doing, that it is ending (sd_notify(3)).

Knows nothing about the store. Without NOTIFY_SOCKET in the environment nothing is said, and a manager that does not
listen harms nobody.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping

log = logging.getLogger("kvkeep.store")


def notify(state: str, environ: Mapping[str, str]) -> None:
    """Sends one state, as "READY=1" or "STATUS=...", as one datagram; never waits."""
    path = environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError as error:
            log.debug("the service manager was not told %r: %s", state, error)
