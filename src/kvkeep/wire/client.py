"""A planner's end of the channel: calls go out at once, answers are collected when asked for; nothing blocks unasked.

The socket is non-blocking and has one owner, so there is no thread and no lock. Knows nothing about requests or models.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from kvkeep.errors import StoreGone, WireError
from kvkeep.wire import messages as m
from kvkeep.wire.frames import READ_NBYTES, FrameReader, framed
from kvkeep.wire.pool_socket import HandedPool, close_all
from kvkeep.wire.processes import open_handles

MAX_UNSENT_NBYTES = 8 << 20
MAX_OPEN_CALLS = 4096

Answer = m.Matched | m.Granted | m.Committed | m.Cleared | m.Stats


@dataclass(eq=False)
class Call:
    """One question on its way: `answer` is None until it is there; `failed` once it will never come."""

    number: int
    answer: Answer | None = None
    failed: bool = False
    abandoned: bool = False

    @property
    def done(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return self.failed or self.answer is not None


@dataclass
class Client:
    """A session with a store, from its welcome on.

    `pool_fd` is the pool's descriptor, `life_fd` one that hangs up when the store has ended; both belong to the client.
    """

    sock: socket.socket
    welcome: m.Welcome
    pool_fd: int
    life_fd: int = -1
    clock: Callable[[], float] = time.monotonic
    alive: bool = True
    why_gone: str = ""
    _frames: FrameReader = field(default_factory=FrameReader)
    _unsent: bytearray = field(default_factory=bytearray)
    _calls: dict[int, Call] = field(default_factory=dict)
    _last: int = 0

    @property
    def open_calls(self) -> int:
        """How many calls have no answer yet."""
        return len(self._calls)

    def fetch(
        self, digests: Sequence[bytes], deadline_s: float = 0.0, limit_s: float = 0.0, early: bool = False
    ) -> Call:
        """Asks to pin the longest run from the first digest on; answered by Matched, at the latest after `deadline_s`.

        Without a deadline only the pool is looked at. A tier that takes `limit_s`, if that is more, has failed.
        `early`: the answer may cover chunks that are still being read.
        """
        return self._ask(lambda call: m.Fetch(call, b"".join(digests), deadline_s, limit_s, early))

    def reserve(self, digests: Sequence[bytes], states: bool = False) -> Call:
        """Asks for room for chunks, or for the states at their ends; answered by Granted."""
        return self._ask(lambda call: m.Reserve(call, b"".join(digests), states))

    def commit(self, lease: int, places: Sequence[int], sums: Sequence[bytes]) -> Call:
        """Makes written chunks readable; answered by Committed."""
        return self._ask(lambda call: m.Commit(call, lease, list(places), list(sums)))

    def clear(self, everything: bool = False) -> Call:
        """Drops the namespace's chunks, or all; answered by Cleared."""
        return self._ask(lambda call: m.Clear(call, everything))

    def stats(self, check: bool = False) -> Call:
        """Asks for the store's figures; answered by Stats."""
        return self._ask(lambda call: m.AskStats(call, check))

    def release(self, lease: int) -> None:
        """Ends a lease (0: there is none)."""
        if lease:
            self._tell(m.Release(lease))

    def discard(self, digests: Sequence[bytes]) -> None:
        """Says that these chunks must not be given out again."""
        if digests:
            self._tell(m.Discard(b"".join(digests)))

    def rename(self, namespace: bytes, identity: str, lasting: bool = True) -> None:
        """Moves the session's keys to another namespace from here on; one not `lasting` ends with the session."""
        self._tell(m.Rename(namespace, identity, lasting))

    def abandon(self, call: Call) -> None:
        """Nobody waits for this answer any more; a lease that it brings is released as soon as it is here."""
        call.abandoned = True
        if call.answer is not None:
            self._dispose(call.answer)

    def wait(self, call: Call, limit_s: float) -> Answer | None:
        """The call's answer, or None if it has not come within `limit_s` or never will."""
        end = self.clock() + limit_s
        self.pump()
        while not call.done:
            left = end - self.clock()
            if left <= 0:
                break
            self.pump(left)
        return call.answer

    def pump(self, limit_s: float = 0.0) -> None:
        """Sends what is left, waits at most `limit_s` for something to read, and takes in all that has come."""
        if not self.alive:
            return
        try:
            self._flush()
            if limit_s > 0:
                poll = select.poll()
                poll.register(self.sock, select.POLLIN | (select.POLLOUT if self._unsent else 0))
                poll.poll(max(1, int(limit_s * 1000)))
            self._take_in()
        except (OSError, WireError) as error:
            self.lose(str(error))

    def lose(self, why: str) -> None:
        """Gives the session up: every open call fails and nothing is sent any more."""
        if not self.alive:
            return
        self.alive, self.why_gone = False, why
        for call in self._calls.values():
            call.failed = True
        self._calls.clear()
        self.sock.close()

    def close(self) -> None:
        """Says goodbye: the caller's word that none of its processes touches a lease any more."""
        self._tell(m.Bye())
        self.drop()

    def drop(self) -> None:
        """Closes the socket and the pool's descriptors without a word; idempotent."""
        self.lose("closed")
        close_all((self.pool_fd, self.life_fd))
        self.pool_fd = self.life_fd = -1

    def take_pool(self) -> HandedPool:
        """The pool, to whoever maps it or hands it on: a descriptor that is kept keeps a dead store's memory."""
        handed = HandedPool(self.welcome.boot, self.pool_fd, self.life_fd)
        self.pool_fd = self.life_fd = -1
        return handed

    def _ask(self, message: Callable[[int], m.ToStore]) -> Call:
        self._last += 1
        call = Call(self._last)
        if len(self._calls) >= MAX_OPEN_CALLS:
            self.lose(f"{MAX_OPEN_CALLS} calls without an answer")
        if not self.alive:
            call.failed = True
            return call
        self._calls[call.number] = call
        self._tell(message(call.number))
        return call

    def _tell(self, message: m.ToStore) -> None:
        if not self.alive:
            return
        try:
            self._unsent += framed(m.encoded(message))
            self._flush()
            if len(self._unsent) > MAX_UNSENT_NBYTES:
                self.lose("the store does not read")
        except (OSError, WireError) as error:
            self.lose(str(error))

    def _flush(self) -> None:
        if not self._unsent:
            return
        try:
            del self._unsent[: self.sock.send(self._unsent)]
        except (BlockingIOError, InterruptedError):
            return

    def _take_in(self) -> None:
        while True:
            try:
                data = self.sock.recv(READ_NBYTES)
            except (BlockingIOError, InterruptedError):
                return
            if not data:
                raise StoreGone("the store closed the connection")
            for payload in self._frames.feed(data):
                self._take(m.decoded_by_client(payload))
            if len(data) < READ_NBYTES:
                return

    def _take(self, answer: m.FromStore) -> None:
        if isinstance(answer, m.Refused):
            raise WireError(f"the store ended the session: {answer.text}")
        if isinstance(answer, m.Welcome):
            raise WireError("a second welcome")
        call = self._calls.pop(answer.call, None)
        if call is None:
            return
        call.answer = answer
        if call.abandoned:
            self._dispose(answer)

    def _dispose(self, answer: Answer) -> None:
        if isinstance(answer, m.Matched | m.Granted):
            self.release(answer.lease)
        if isinstance(answer, m.Matched) and answer.state is not None:
            self.release(answer.state.lease)


class Joining:
    """A connection whose hello is out and whose welcome has not come yet; this process is always one of its holders."""

    def __init__(self, sock: socket.socket, hello: m.Hello) -> None:
        self._sock = sock
        self._frames = FrameReader()
        self._fds: list[int] = []
        self._sock.setblocking(False)
        hello = msgspec.structs.replace(hello, holders=list(dict.fromkeys([os.getpid(), *hello.holders])))
        pidfds = open_handles(hello.holders)
        try:
            # the first bytes of a socket: its buffer takes them all
            socket.send_fds(self._sock, [framed(m.encoded(hello))], pidfds)
        except OSError as error:
            self.poll()  # a store that refuses says why before it closes
            raise self._given_up(StoreGone(f"the store did not take our hello: {error}")) from error
        finally:
            for fd in pidfds:
                os.close(fd)

    def poll(self) -> Client | None:
        """The client once the welcome is here, else None; StoreGone or WireError if it will never come."""
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, READ_NBYTES, 4, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            raise self._given_up(StoreGone(f"the store did not welcome us: {error}")) from error
        self._fds += fds
        if not data:
            raise self._given_up(StoreGone("the store ended before it welcomed us: its last lines say why"))
        for payload in self._frames.feed(data):
            welcome = m.decoded_by_client(payload)
            if isinstance(welcome, m.Refused):
                raise self._given_up(WireError(f"the store refused the session: {welcome.text}"))
            if not isinstance(welcome, m.Welcome) or len(self._fds) != 2:
                raise self._given_up(WireError("the store's welcome came without a pool"))
            pool_fd, life_fd = self._fds
            return Client(self._sock, welcome, pool_fd, life_fd)
        return None

    def wait(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> Client:
        """The client, within `limit_s`; StoreGone or WireError otherwise."""
        end = clock() + limit_s
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while (left := end - clock()) > 0:
            poll.poll(max(1, int(left * 1000)))
            client = self.poll()
            if client is not None:
                return client
        raise self._given_up(StoreGone(f"the store did not welcome us within {limit_s} s"))

    def close(self) -> None:
        """Gives the connection up; idempotent."""
        self._sock.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def _given_up(self, error: WireError) -> WireError:
        self.close()
        return error
