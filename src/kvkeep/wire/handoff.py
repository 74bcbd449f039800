"""How a worker gets the pool's descriptor from its planner: once a boot of the store, and nothing else.

Knows nothing about what is done with the pool. The worker listens at a Unix socket in a folder of its own (0700) and
looks there when it has a step to do; it never waits. A stale descriptor is never mixed up with a new one: the boot
token comes in the same message.
"""

from __future__ import annotations

import array
import contextlib
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import NamedTuple

from kvkeep.errors import StoreGone

BOOT_NBYTES = 16
MAX_SENDERS = 16


class HandedPool(NamedTuple):
    """The pool of one boot of the store: its token and its descriptor, which the receiver owns."""

    boot: bytes
    fd: int


class PoolDoor:
    """Where one worker receives pools. `path` is what it publishes."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="kvkeep-")
        self.path = str(Path(self._folder) / "pool")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path)
        self._listener.listen(4)
        self._listener.setblocking(False)
        self._senders: list[socket.socket] = []

    def take(self) -> HandedPool | None:
        """The newest pool that has been handed over since the last look, or None. Returns at once."""
        self._welcome_senders()
        newest: HandedPool | None = None
        waiting = []
        for sock in self._senders:
            try:
                handed = self._received(sock)
            except BlockingIOError:
                waiting.append(sock)  # it is connected and has not sent yet
                continue
            sock.close()
            if handed is not None:
                if newest is not None:
                    os.close(newest.fd)
                newest = handed
        self._senders = waiting
        return newest

    def _welcome_senders(self) -> None:
        while len(self._senders) < MAX_SENDERS:
            try:
                sock, _ = self._listener.accept()
            except OSError:  # nobody is there, or the door is closed
                return
            sock.setblocking(False)
            self._senders.append(sock)

    def close(self) -> None:
        """Closes the door and removes its folder; idempotent."""
        self._listener.close()
        for sock in self._senders:
            sock.close()
        self._senders.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _received(self, sock: socket.socket) -> HandedPool | None:
        try:
            boot, fds, _, _ = socket.recv_fds(sock, BOOT_NBYTES, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            raise
        except OSError:
            return None
        if len(boot) == BOOT_NBYTES and len(fds) == 1:
            return HandedPool(boot, fds[0])
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        return None


def send_pool(path: str, pool_fd: int, boot: bytes, limit_s: float) -> None:
    """Hands the pool to the worker that listens at `path`; StoreGone if it cannot be reached within `limit_s`."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(limit_s)
            sock.connect(path)
            fds = array.array("i", [pool_fd])
            sock.sendmsg([boot], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    except OSError as error:
        raise StoreGone(f"a worker did not take the pool at {path}: {error}") from error
