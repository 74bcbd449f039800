"""An engine's end of the channel to its store: send a call at once, collect its answer later, block only in `wait`.

The socket is non-blocking and has one owner, so there is no thread and no lock. Knows nothing about requests or models.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field

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
    """A question to the store: `answer` is None until it is here; `failed`: it will never come."""

    number: int
    answer: Answer | None = None
    failed: bool = False
    abandoned: bool = False

    @property
    def done(self) -> bool:
        """Whether waiting is over: the answer is here, or will never come."""
        return self.failed or self.answer is not None


@dataclass
class Client:
    """A session with a store, from its welcome on.

    `pool_fd` is the pool's descriptor, `life_fd` one that hangs up when the store has ended (-1: a control session has
    neither). Both belong to the client.
    """

    sock: socket.socket
    welcome: m.Welcome
    pool_fd: int = -1
    life_fd: int = -1
    _: KW_ONLY
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
        """Asks to pin the longest run from the first digest on; Matched answers, at the latest after `deadline_s`.

        Without a deadline the store looks in the pool only. A tier that takes `limit_s`, if that is more, has failed.
        `early`: the answer may cover chunks that are still being read.
        """
        return self._ask(
            lambda call: m.Fetch(
                call=call, digests=b"".join(digests), deadline_s=deadline_s, limit_s=limit_s, early=early
            )
        )

    def reserve(self, digests: Sequence[bytes], states: bool = False) -> Call:
        """Asks for room for chunks, or for the states at their ends; Granted answers."""
        return self._ask(lambda call: m.Reserve(call, b"".join(digests), states))

    def commit(self, lease: m.StoreLease, indexes: Sequence[int], sums: Sequence[bytes]) -> Call:
        """Makes written chunks readable, by their indexes in the Reserve; Committed answers.

        The sums must fit a frame (`messages.commit_parts`). Fails for a lease of another start of the store.
        """
        if not self.lent(lease):
            return Call(0, failed=True)
        return self._ask(lambda call: m.Commit(call, lease.number, list(indexes), list(sums)))

    def clear(self, everything: bool = False) -> Call:
        """Drop the namespace's chunks, or all; Cleared answers."""
        return self._ask(lambda call: m.Clear(call, everything))

    def stats(self, check: bool = False) -> Call:
        """Asks for the store's figures; Stats answers."""
        return self._ask(lambda call: m.AskStats(call, check))

    def lent(self, lease: m.StoreLease) -> bool:
        """Whether the lease is of this start of the store: another one's memory is not this pool's."""
        return lease.boot == self.welcome.boot

    def release(self, lease: m.StoreLease) -> None:
        """Ends a lease; without effect for no lease, and for one of another start of the store."""
        if lease and self.lent(lease):
            self._tell(m.Release(lease.number))

    def discard(self, digests: Sequence[bytes]) -> None:
        """Asks the store to give these chunks to nobody any more."""
        if digests:
            self._tell(m.Discard(b"".join(digests)))

    def rename(self, namespace: bytes, identity: str, lasting: bool = True) -> None:
        """Puts all keys from here on into another namespace; one that is not `lasting` ends with the session."""
        self._tell(m.Rename(namespace, identity, lasting))

    def abandon(self, call: Call) -> None:
        """Stops waiting for this answer: releases the lease that it brings as soon as it is here."""
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
        """Gives the session up: every open call fails, and nothing more is sent."""
        if not self.alive:
            return
        self.alive, self.why_gone = False, why
        for call in self._calls.values():
            call.failed = True
        self._calls.clear()
        self.sock.close()

    def close(self) -> None:
        """Says goodbye, which promises that none of our processes touches a lease any more."""
        self._tell(m.Bye())
        self.drop()

    def drop(self) -> None:
        """Closes the socket and the descriptors without a goodbye; idempotent."""
        self.lose("closed")
        close_all((self.pool_fd, self.life_fd))
        self.pool_fd = self.life_fd = -1

    def take_pool(self) -> HandedPool:
        """The pool's descriptors, which now belong to the caller: one that stays open keeps a dead store's memory."""
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
        except OSError as error:
            self._lose_hearing(error)
        except WireError as error:
            self.lose(str(error))

    def _lose_hearing(self, error: OSError) -> None:
        """Gives the session up after a failed send, for the reason that the store gave before it closed, if any."""
        try:
            self._take_in()
        except (OSError, WireError) as said:
            self.lose(str(said))
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
            raise WireError("the store sent a second welcome")
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
    """A connection whose first message is out and whose welcome has not come yet.

    This process is always one of an engine's holders. A control session has none.
    """

    def __init__(self, sock: socket.socket, first: m.Hello | m.Control) -> None:
        self._sock = sock
        self._frames = FrameReader()
        self._fds: list[int] = []
        self._fds_due = 0
        self._sock.setblocking(False)
        holders: list[int] = []
        if isinstance(first, m.Hello):
            holders = list(dict.fromkeys([os.getpid(), *first.holders]))
            first = msgspec.structs.replace(first, holders=holders)
            self._fds_due = 2
        pidfds = open_handles(holders)
        try:
            # the first bytes of a socket: its buffer takes them all
            socket.send_fds(self._sock, [framed(m.encoded(first))], pidfds)
        except OSError as error:
            self.poll()  # a store that refuses says why before it closes
            raise self._give_up(StoreGone(f"the store did not take our hello: {error}")) from error
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
            raise self._give_up(StoreGone(f"the store did not welcome us: {error}")) from error
        self._fds += fds
        if not data:
            raise self._give_up(StoreGone("the store ended before it welcomed us: its last lines say why"))
        for payload in self._frames.feed(data):
            welcome = m.decoded_by_client(payload)
            if isinstance(welcome, m.Refused):
                hint = " (is it another version of kvkeep?)" if welcome.text.startswith("not a message") else ""
                raise self._give_up(WireError(f"the store refused the session: {welcome.text}{hint}"))
            if not isinstance(welcome, m.Welcome) or len(self._fds) != self._fds_due:
                raise self._give_up(WireError("the store's welcome came without a pool"))
            return Client(self._sock, welcome, *self._fds)
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
        raise self._give_up(StoreGone(f"the store did not welcome us within {limit_s} s"))

    def close(self) -> None:
        """Gives the connection up; idempotent."""
        self._sock.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def _give_up(self, error: WireError) -> WireError:
        self.close()
        return error
