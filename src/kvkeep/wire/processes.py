"""The processes that may touch a session's memory, by the kernel's handles on them (pidfds).

A pid holds in one pid namespace only, and the kernel gives it to another process later. A pidfd passes over a Unix
socket into another container and always means the same process. Knows nothing about sessions, leases or sockets.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

MAX_HOLDERS = 250  # the kernel passes 253 descriptors in one message
Process = tuple[str, int]


class Credentials(NamedTuple):
    """The process that made the other end of a Unix socket, says the kernel; pid 0: it is in another pid namespace."""

    pid: int
    uid: int


def credentials_of(sock: socket.socket) -> Credentials:
    """The process and user at the other end (SO_PEERCRED, unix(7))."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return Credentials(pid, uid)


@dataclass(eq=False)
class Holders:
    """`alive` has each process that may still run, by its pidfd, which belongs to this.

    `doubt`: there is another process that nobody can watch, so that nobody will know when it ends.
    """

    alive: dict[int, Process | None] = field(default_factory=dict)
    doubt: bool = False

    @property
    def gone(self) -> bool:
        """Whether all of them have ended."""
        return not self.alive and not self.doubt

    def within(self, others: Holders) -> bool:
        """Whether each of these that may still run is surely one of `others`."""
        return not self.doubt and None not in self.alive.values() and {*self.alive.values()} <= {*others.alive.values()}

    def died(self, fd: int) -> None:
        """Forgets the process of this pidfd, which has ended, and closes the pidfd."""
        del self.alive[fd]
        os.close(fd)

    def close(self) -> None:
        """Closes the descriptors; idempotent."""
        for fd in self.alive:
            os.close(fd)
        self.alive.clear()


def open_handles(pids: Iterable[int]) -> list[int]:
    """A pidfd for each of these processes that this process can see, in order; they belong to the caller."""
    fds = []
    for pid in pids:
        try:
            fds.append(os.pidfd_open(pid))
        except (OSError, OverflowError):
            continue  # the store counts the pidfds and sees that some are missing
    return fds


def is_pidfd(fd: int) -> bool:
    """Whether the descriptor is a pidfd: no file, pipe or memory can have a link of these names."""
    link = os.readlink(f"/proc/self/fd/{fd}")
    return link == "anon_inode:[pidfd]" or link.startswith("pidfd:")


def holders_of(fds: Sequence[int], count: int) -> Holders:
    """The `count` processes of a session, with their pidfds, which it owns. Fewer pidfds than processes: a doubt."""
    return Holders({fd: _process(fd) for fd in fds}, doubt=len(fds) < count)


def _process(fd: int) -> Process | None:
    """Which process it is: by the pidfd's inode, which is never used again, on kernels that have it; else by its pid.

    None if neither can be read here, also for want of a descriptor to read it with.
    """
    name = os.readlink(f"/proc/self/fd/{fd}")
    if name.startswith("pidfd:"):
        return name, os.fstat(fd).st_ino
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    except OSError:
        return None
    pid = next((int(line.split()[1]) for line in lines if line.startswith("Pid:")), 0)
    return ("pid", pid) if pid > 0 else None
