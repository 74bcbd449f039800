"""The processes that may touch a session's memory, as the kernel's own handles on them (pidfds).

A pid means something in one namespace only and is given out again; a pidfd goes over a Unix socket into another
container and stays the same process for ever. Knows nothing about sessions, leases or sockets.
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
    """Who made the other end of a Unix socket, as the kernel noted it; a pid of 0 is in another pid namespace."""

    pid: int
    uid: int


def credentials_of(sock: socket.socket) -> Credentials:
    """The process and user at the other end (SO_PEERCRED, unix(7))."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return Credentials(pid, uid)


@dataclass(eq=False)
class Holders:
    """`alive` has each process that is not known to have ended, by the pidfd that this owns.

    `doubt`: there is one that cannot be watched, and so is never known to have ended.
    """

    alive: dict[int, Process | None] = field(default_factory=dict)
    doubt: bool = False

    @property
    def gone(self) -> bool:
        """Whether every one of them has ended."""
        return not self.alive and not self.doubt

    def within(self, others: Holders) -> bool:
        """Whether every one of these that may live is surely one of `others`."""
        return not self.doubt and None not in self.alive.values() and {*self.alive.values()} <= {*others.alive.values()}

    def died(self, fd: int) -> None:
        """One of them has ended."""
        del self.alive[fd]
        os.close(fd)

    def close(self) -> None:
        """Gives the descriptors back; idempotent."""
        for fd in self.alive:
            os.close(fd)
        self.alive.clear()


def open_handles(pids: Iterable[int]) -> list[int]:
    """A pidfd for each process that this one can see, in order; the caller owns them."""
    fds = []
    for pid in pids:
        try:
            fds.append(os.pidfd_open(pid))
        except (OSError, OverflowError):
            continue  # the store sees that one is missing
    return fds


def is_pidfd(fd: int) -> bool:
    """Whether the descriptor is a process's: no file, pipe or memory can have a link of these names."""
    link = os.readlink(f"/proc/self/fd/{fd}")
    return link == "anon_inode:[pidfd]" or link.startswith("pidfd:")


def holders_of(fds: Sequence[int], count: int) -> Holders:
    """The `count` processes of a session, of which these are the pidfds; owns them. Fewer of them leave a doubt."""
    return Holders({fd: _process(fd) for fd in fds}, doubt=len(fds) < count)


def _process(fd: int) -> Process | None:
    """Who it is: a pidfd's inode where its name has it (it is never given again), else its pid if it is visible here.

    None where that cannot be seen, also for want of a descriptor to look with.
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
