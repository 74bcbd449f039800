"""Hands the pool's descriptor from the planner to a worker, once for each start of the store.

The worker listens at a Unix socket in a folder of its own (0700). The token of the store's start (`boot`) comes in the
same message, so that nobody takes an old descriptor for a new one. Knows nothing about what the worker does with it.
"""

from __future__ import annotations

import array
import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kvkeep.core.units import BOOT_NBYTES
from kvkeep.errors import StoreGone

MAX_SENDERS = 16
MAX_WAITING = 1  # senders that a stopped worker has not let in, and one more: each keeps a pool in memory


class HandedPool(NamedTuple):
    """The pool of one boot of the store: its token, its descriptor, and one that hangs up when that store has ended.

    Both descriptors belong to the receiver.
    """

    boot: bytes
    fd: int
    life: int

    def close(self) -> None:
        """Closes both descriptors of a pool that nobody uses."""
        close_all((self.fd, self.life))


class PoolDoor:
    """Where one worker receives pools. The worker publishes `path`."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="kvkeep-")
        self.path = str(Path(self._folder) / "pool")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path)
        self._listener.listen(MAX_WAITING)
        self._listener.setblocking(False)
        self._senders: list[socket.socket] = []

    @property
    def fds(self) -> list[int]:
        """Descriptors to poll: when one is readable, `take` may find something."""
        doors = [self._listener] if len(self._senders) < MAX_SENDERS else []
        return [sock.fileno() for sock in (*doors, *self._senders) if sock.fileno() >= 0]

    def take(self) -> list[HandedPool]:
        """All pools that have come since the last call, the newest at the end. Returns at once."""
        self._accept_senders()
        handed = []
        waiting = []
        for sock in self._senders:
            try:
                received = self._receive(sock)
            except BlockingIOError:
                waiting.append(sock)  # it has connected, and sends later
                continue
            sock.close()
            if received is not None:
                handed.append(received)
        self._senders = waiting
        return handed

    def _accept_senders(self) -> None:
        while len(self._senders) < MAX_SENDERS:
            try:
                sock, _ = self._listener.accept()
            except OSError:  # nobody has connected, or the door is closed
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

    def _receive(self, sock: socket.socket) -> HandedPool | None:
        try:
            boot, fds, _, _ = socket.recv_fds(sock, BOOT_NBYTES, 2, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            raise
        except OSError:
            return None
        if len(boot) == BOOT_NBYTES and len(fds) == 2:
            return HandedPool(boot, *fds)
        close_all(fds)
        return None


def send_pool(path: str, pool: HandedPool, limit_s: float) -> None:
    """Hands the pool to the worker that listens at `path`; the worker gets descriptors of its own.

    StoreGone if the worker does not accept within `limit_s`, or is stopped while other senders wait for it.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(limit_s)
            sock.connect(path)
            fds = array.array("i", [pool.fd, pool.life])
            sock.sendmsg([pool.boot], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    except BlockingIOError as error:
        raise StoreGone(f"a worker has not taken the last pool at {path} yet") from error
    except OSError as error:
        raise StoreGone(f"a worker did not take the pool at {path}: {error}") from error


def close_all(fds: Iterable[int]) -> None:
    """Closes descriptors; -1 stands for none."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
