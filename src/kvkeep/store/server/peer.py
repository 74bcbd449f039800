"""One connected client as bytes: the frames that it sent and that have no answer yet, the answers that it has not read.

Knows nothing about messages. Takes descriptors only before the client's hello, and only those of processes.
"""

from __future__ import annotations

import os
import select
import socket
from collections import deque
from dataclasses import dataclass, field

from kvkeep.errors import WireError
from kvkeep.store.sessions import Session
from kvkeep.wire.frames import READ_NBYTES, FrameReader
from kvkeep.wire.processes import MAX_HOLDERS, Holders, is_pidfd


@dataclass(eq=False)
class Peer:
    """One client: its socket, its session once it said hello, `fds` that came before the hello, `holders` after it.

    `control`: it said hello as a tool, and has no session in the store. `asked` are its whole frames without an answer;
    while there are any it is `paused`: the server reads nothing more from it. `errands` counts its requests that take
    longer than a round, `fetches` its lookups without an answer, `discards` its keys that are not discarded yet.
    """

    sock: socket.socket
    pid: int
    frames: FrameReader = field(default_factory=FrameReader)
    asked: deque[bytes] = field(default_factory=deque)
    unsent: bytearray = field(default_factory=bytearray)
    session: Session | None = None
    fds: list[int] = field(default_factory=list)
    holders: Holders = field(default_factory=Holders)
    control: bool = False
    paused: bool = False
    due: bool = False
    writing: bool = False
    errands: int = 0
    fetches: int = 0
    discards: int = 0

    @property
    def greeted(self) -> bool:
        """Whether it has said hello, and its session has not ended."""
        return self.control or self.session is not None

    @property
    def closed(self) -> bool:
        """Whether its socket is closed."""
        return self.sock.fileno() < 0

    def receive(self) -> bool:
        """Takes in what it sent; False: its end of the socket is closed. WireError for bytes that are no frame."""
        try:
            data = self._read()
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        self.asked.extend(self.frames.feed(data))
        return bool(data)

    def send(self) -> None:
        """Sends as much of the waiting answers as its socket takes now; WireError if the socket is broken."""
        try:
            sent = self.sock.send(self.unsent)
            del self.unsent[:sent]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            raise WireError(f"its socket failed: {error}") from error

    def hung_up(self) -> bool:
        """Whether its end of the socket is closed, also while what it sent before is not read yet."""
        watch = select.poll()
        watch.register(self.sock, select.POLLRDHUP)
        return bool(watch.poll(0))

    def close(self) -> None:
        """Gives its descriptors back; idempotent."""
        self.sock.close()
        self.holders.close()
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()
        self.asked.clear()

    def _read(self) -> bytes:
        if self.greeted:
            return self.sock.recv(READ_NBYTES)
        data, fds, _, _ = socket.recv_fds(self.sock, READ_NBYTES, MAX_HOLDERS, socket.MSG_CMSG_CLOEXEC)
        self.fds += fds
        if len(self.fds) > MAX_HOLDERS:
            raise WireError(f"more than {MAX_HOLDERS} descriptors")
        # checked at once: an end of its own socket would keep that socket open for ever
        if not all(map(is_pidfd, fds)):
            raise WireError("a holder's descriptor is no pidfd")
        return data
