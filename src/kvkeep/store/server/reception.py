"""Accepts clients, reads their first message, and sends those that may not join the reason.

Hello opens an engine's session, which gets the pool. Control opens that of a tool, which gets none of it and may ask
only what is in `ASKS_OF_CONTROL`. A client of another version is refused with both versions. When the process has no
descriptor left it accepts nobody for a while: a waiting client would wake the loop again at once.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

from kvkeep.errors import WireError
from kvkeep.store.openings import Opening
from kvkeep.wire import messages as m
from kvkeep.wire.frames import framed
from kvkeep.wire.processes import MAX_HOLDERS, credentials_of

log = logging.getLogger("kvkeep.store")

REST_S = 1.0
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass
class Reception:
    """Accepts clients at `listener` and hands each to `take_in`; `full` makes room, or returns why there is none."""

    listener: socket.socket
    loop: asyncio.AbstractEventLoop
    take_in: Callable[[socket.socket], None]
    full: Callable[[], str]
    _open: bool = False
    _short: bool = False

    def open(self) -> None:
        """Accepts clients from here on."""
        self._open = True
        self.listener.setblocking(False)
        self.loop.add_reader(self.listener, self._accept)

    def close(self) -> None:
        """Accepts nobody any more; the listener stays its owner's."""
        self._open = False
        self.loop.remove_reader(self.listener)

    def _accept(self) -> None:
        try:
            sock, _ = self.listener.accept()
        except OSError as error:  # the client is gone again, or descriptors are short: serve the others
            if error.errno in _SHORT:
                self._rest(error)
            return
        self._short = False
        why = stranger(sock) or self.full()
        if why:
            log.warning("refused a client: %s", why)
            turn_away(sock, why)
        else:
            self.take_in(sock)

    def _rest(self, error: OSError) -> None:
        if not self._short:
            self._short = True
            log.warning("no client can join (%s): raise the limit of open files of this process", error)
        self.loop.remove_reader(self.listener)
        self.loop.call_later(REST_S, lambda: self.open() if self._open else None)


def stranger(sock: socket.socket) -> str:
    """Why the user at the other end may not join; "" if it may."""
    uid = credentials_of(sock).uid
    if uid in (os.getuid(), 0):
        return ""
    return f"this store is run by user {os.getuid()} and refuses clients of user {uid}"


def turn_away(sock: socket.socket, why: str) -> None:
    """Sends the reason, if the client reads, and closes the socket."""
    sock.setblocking(False)
    try:
        sock.send(framed(m.encoded(m.Refused(WireError.code, why))))
    except OSError as failure:
        log.debug("the refusal could not be sent: %s", failure)
    sock.close()


MAX_PID = 2**22  # the kernel's own limit
ASKS_OF_CONTROL = (m.AskStats, m.Bye)


def first_message(payload: bytes) -> m.Hello | m.Control:
    """The message that opens a session; WireError for another one, and for one of another version."""
    version = m.version_in(payload)
    try:
        message = m.decoded_by_store(payload)
    except WireError:
        _check_version(version)
        raise
    if not isinstance(message, m.Hello | m.Control):
        raise WireError("the first message must be a hello")
    _check_version(message.version)
    return message


def opening_of(hello: m.Hello, owner: int) -> Opening:
    """What an engine says of itself; WireError for holders that cannot be. `owner` is the pid at the other end."""
    if len(hello.holders) > MAX_HOLDERS:
        raise WireError(f"a session names at most {MAX_HOLDERS} processes")
    if not all(0 < pid <= MAX_PID for pid in hello.holders):
        raise WireError("a holder is no process id")
    return Opening(
        hello.name,
        hello.namespace,
        hello.identity,
        hello.chunk_nbytes,
        holders=tuple(hello.holders),
        verify_every=hello.verify_every,
        sizes=tuple(hello.sizes),
        state_sizes=tuple(hello.state_sizes),
        owner=owner,
    )


def check_open(message: m.ToStore, control: bool) -> None:
    """WireError for what an open session may not send: a hello and, with its name, what is not for a tool."""
    if isinstance(message, m.Hello | m.Control):
        raise WireError("a session says hello once")
    if control and not isinstance(message, ASKS_OF_CONTROL):
        raise WireError(f"a control session may not send {type(message).__name__}: it uses no memory of the store")


def _check_version(version: int | None) -> None:
    if version is not None and version != m.VERSION:
        raise WireError(f"protocol version {version} is not {m.VERSION}: use the same kvkeep on both sides")
