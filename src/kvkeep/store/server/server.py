"""The store's end of the channel: one event loop over the sockets of all clients.

Bad bytes from a client end that client's session with a typed error, and change nothing for the others. Each round of
the loop gives a client a bounded time. The server disconnects a client that does not read its answers, and one that
does not say hello in time. Knows nothing about pools or keys beyond handing them on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field

import msgspec

from kvkeep.errors import WireError
from kvkeep.store.below.fetches import FetchLimits
from kvkeep.store.below.tiers import TierWalk
from kvkeep.store.namespaces import plain_name
from kvkeep.store.server.answers import Answers, Checks
from kvkeep.store.server.lingering import Lingering
from kvkeep.store.server.peer import Peer
from kvkeep.store.server.reception import Reception, check_open, first_message, opening_of
from kvkeep.store.sessions import Session
from kvkeep.store.store import Store
from kvkeep.wire import messages as m
from kvkeep.wire.frames import framed
from kvkeep.wire.pool_socket import close_all
from kvkeep.wire.processes import Holders, credentials_of, holders_of

log = logging.getLogger("kvkeep.store")

MAX_UNSENT_NBYTES = 8 << 20
MAX_CLIENTS = 256
MAX_DEADLINE_S = 3600.0
HELLO_LIMIT_S = 5.0
ROUND_FRAMES, ROUND_S = 32, 1e-3  # what one client gets before the others get theirs
MAX_ERRANDS = 4  # of one client: clears and checks that are under way
MAX_DISCARDS = 65_536  # of one client: keys that are not discarded yet
MAX_FETCHES = 4096  # lookups of a client without an answer


@dataclass
class Server:
    """Serves the store of `walk` until `stop` is called or, without a listener, until its only client is gone.

    The event loop's thread owns it and the store; another thread may call `stop` only.
    """

    walk: TierWalk
    boot: bytes
    pool_fd: int
    private: socket.socket | None = None
    listener: socket.socket | None = None
    hello_limit_s: float = HELLO_LIMIT_S
    _peers: dict[int, Peer] = field(default_factory=dict)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _wake: Callable[[], object] = lambda: None
    _reception: Reception | None = None

    def __post_init__(self) -> None:
        self.answers = Answers(self.walk, self.boot)
        self._life = os.pipe()  # nobody writes to it: a reader of the other end sees when this store ends

    @property
    def store(self) -> Store:
        """The pool's own store."""
        return self.walk.store

    async def serve(self) -> None:
        """Runs until `stop` is called or the private client is gone."""
        self.begin(asyncio.get_running_loop())
        self._wake = lambda: self._loop.call_soon_threadsafe(self._over.set)
        if self.private is not None:
            self.accept(self.private)
        if self._reception is not None:
            self._reception.open()
        if not self._stopping.is_set() and (self.listener is not None or self._peers):
            await self._over.wait()
        self._close()

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Makes the parts that need the loop."""
        self._loop = loop
        self._over = asyncio.Event()
        self._lingering = Lingering(self.store, self._loop)
        if self.listener is not None:
            self._reception = Reception(self.listener, loop, self.accept, self._full)
        self._checks = Checks(self.answers.checked, self._loop)

    def stop(self) -> None:
        """Ends `serve`. Any thread may call it, also before `serve` has begun."""
        self._stopping.set()
        self._wake()

    def _close(self) -> None:
        self._wake = lambda: None
        if self._reception is not None:
            self._reception.close()
        for peer in self._peers.values():
            self._unwatch(peer)
            peer.session, peer.control = None, False  # what ends from here on is not answered
            peer.close()
        self._lingering.close()
        for fd in self._life:
            os.close(fd)

    # ---- clients that join

    def accept(self, sock: socket.socket) -> None:
        """Adds a connected client, which must say hello in time."""
        sock.setblocking(False)
        peer = Peer(sock, credentials_of(sock).pid)
        self._peers[sock.fileno()] = peer
        self._loop.add_reader(sock, self._serve_peer, peer)
        if sock is not self.private:
            self._loop.call_later(self.hello_limit_s, self._expect_hello, peer)

    def _full(self) -> str:
        """Why no more clients can come in; "" if there is room. Makes room by dropping one that has said no hello."""
        silent = next((peer for peer in self._peers.values() if not peer.greeted), None)
        if len(self._peers) < MAX_CLIENTS:
            return ""
        if silent is None:
            return f"{MAX_CLIENTS} clients are connected, and no more are taken"
        self._drop(silent, "others wait to come in, and it has said no hello")
        return ""

    def _expect_hello(self, peer: Peer) -> None:
        if not peer.greeted and not peer.closed:
            self._refuse(peer, WireError(f"no hello within {self.hello_limit_s:.0f} s"))

    # ---- what a client asks

    def _serve_peer(self, peer: Peer) -> None:
        """Reads what a client sent and answers a part of it. An error ends that client only."""
        peer.due = False
        if peer.closed:
            return
        try:
            if peer.unsent:
                self._flush(peer)
            if not peer.paused and not peer.receive():
                self._drop(peer, "its end of the socket was closed")
                return
            waits = self._answer_some(peer)
        except WireError as error:
            self._refuse(peer, error)
            return
        if not peer.closed:
            self._pace(peer, waits)

    def _answer_some(self, peer: Peer) -> bool:
        """Answers at most a round's worth; True: the next frame waits for an errand or a lookup of this client."""
        until_s = self._loop.time() + ROUND_S
        for _ in range(ROUND_FRAMES):
            if not peer.asked or self._loop.time() > until_s:
                return False
            if not peer.greeted:
                self._greet(peer, first_message(peer.asked.popleft()))
                continue
            message = m.decoded_by_store(peer.asked[0])
            check_open(message, control=peer.control)
            if _is_too_much(peer, message):
                return True
            peer.asked.popleft()
            self._answer(peer, message)
            if peer.closed:
                return False
        return False

    def _pace(self, peer: Peer, waits: bool) -> None:
        """Reads nothing more from a client that has frames left, and serves it again after the others."""
        if peer.paused != bool(peer.asked):
            peer.paused = bool(peer.asked)
            if peer.paused:
                self._loop.remove_reader(peer.sock)
            else:
                self._loop.add_reader(peer.sock, self._serve_peer, peer)
        if waits and peer.hung_up():
            self._drop(peer, "its end of the socket was closed")
        elif peer.paused and not waits:
            self._serve_again(peer)

    def _serve_again(self, peer: Peer) -> None:
        if not peer.due:
            peer.due = True
            self._loop.call_soon(self._serve_peer, peer)

    def _resume(self, peer: Peer) -> None:
        """Goes on with a client of which an errand or a lookup has ended."""
        if peer.paused:
            self._serve_again(peer)

    def _answer(self, peer: Peer, message: m.ToStore) -> None:
        if isinstance(message, m.Bye):
            self._part(peer)
        elif isinstance(message, m.AskStats) and message.check:
            self._check(peer, message.call)
        elif isinstance(message, m.AskStats):
            self._send(peer, self.answers.stats(message.call))
        elif peer.session is not None:
            self._answer_engine(peer, peer.session, message)

    def _answer_engine(self, peer: Peer, session: Session, message: m.ToStore) -> None:
        if isinstance(message, m.Fetch):
            self._fetch(peer, session, message)
        elif isinstance(message, m.Clear):
            namespaces = self.store.namespaces_of(session, message.everything)  # now: a rename may be the next message
            count = self.store.clear(session, message.everything)
            self._errand(peer, self._clear(namespaces, m.Cleared(message.call, count)))
        elif isinstance(message, m.Discard):
            digests = m.split_digests(message.digests)
            self.store.discard(session, digests)
            keys = [key for side in session.sides for key in self.store.keys(side, digests)]
            peer.discards += len(keys)
            self.walk.tasks.start(self._discard(peer, keys))
        else:
            answer = self.answers.asked(session, message)
            if answer is not None:
                self._send(peer, answer)

    def _fetch(self, peer: Peer, session: Session, asked: m.Fetch) -> None:
        deadline_s = min(MAX_DEADLINE_S, max(0.0, asked.deadline_s))
        limits = FetchLimits(deadline_s, min(MAX_DEADLINE_S, asked.limit_s), asked.early)
        digests = m.split_digests(asked.digests)
        found = self.walk.fetches.at_once(session, digests, limits)
        if found is not None:
            self._send(peer, self.answers.matched(asked.call, found))
            return

        async def fetch() -> None:
            try:
                found = await self.walk.fetches.fetch(session, digests, limits)
                self._answer_late(peer, self.answers.matched(asked.call, found))
            finally:
                peer.fetches -= 1
                self._resume(peer)

        peer.fetches += 1
        self.walk.tasks.start(fetch(), owner=session)

    def _errand(self, peer: Peer, steps: Coroutine[None, None, m.FromStore]) -> None:
        """Does what takes longer than a round, then sends its answer."""
        peer.errands += 1

        async def do() -> None:
            try:
                self._answer_late(peer, await steps)
            finally:
                peer.errands -= 1
                self._resume(peer)

        self.walk.tasks.start(do())

    async def _discard(self, peer: Peer, keys: Sequence[bytes]) -> None:
        try:
            await self.walk.discard(keys)
        finally:
            peer.discards -= len(keys)
            self._resume(peer)

    async def _clear(self, namespaces: Sequence[bytes | None], answer: m.Cleared) -> m.Cleared:
        failures = [await self.walk.clear(namespace) for namespace in namespaces]
        return msgspec.structs.replace(answer, not_durable="; ".join(dict.fromkeys(filter(None, failures))))

    def _check(self, peer: Peer, call: int) -> None:
        def answer(stats: m.Stats) -> None:
            peer.errands -= 1
            self._answer_late(peer, msgspec.structs.replace(stats, call=call))
            self._resume(peer)

        peer.errands += 1
        self._checks.ask(answer)

    def _greet(self, peer: Peer, first: m.Hello | m.Control) -> None:
        fds, peer.fds = peer.fds, []
        if isinstance(first, m.Control):
            close_all(fds)
            peer.control = True
            self._send(peer, self._welcome(0))
            log.info("control session of %s (pid %d)", plain_name(first.name), peer.pid)
            return
        peer.holders = holders_of(fds, len(set(first.holders)))
        opening = opening_of(first, peer.pid)
        self._lingering.resume(first.resumes, peer.holders)
        peer.session = self.store.open(opening)
        welcome = self._welcome(peer.session.number)
        try:
            socket.send_fds(peer.sock, [framed(m.encoded(welcome))], [self.pool_fd, self._life[0]])
        except OSError as error:
            raise WireError(f"the pool could not be handed over: {error}") from error
        name = peer.session.opening.name
        log.info("session %d opened by %s (pid %d)", peer.session.number, name, peer.pid)
        if peer.holders.doubt:
            log.warning("session %d (%s): a process of it cannot be watched (no pidfd)", peer.session.number, name)
        if first.identity:
            self.answers.name(peer.session, first.identity)

    def _welcome(self, session: int) -> m.Welcome:
        return m.Welcome(boot=self.boot, session=session, pid=os.getpid(), pool_nbytes=self.store.pool_nbytes)

    def _part(self, peer: Peer) -> None:
        """Ends the session of a client that promises to touch none of its memory any more."""
        if peer.session is not None:
            self.walk.tasks.cancel(peer.session)
            self.store.close(peer.session)
            peer.session = None
        self._drop(peer, "it said goodbye")

    # ---- answers

    def _answer_late(self, peer: Peer, answer: m.FromStore) -> None:
        """Sends an answer that took longer than a round, if its client is still there."""
        if not peer.greeted:
            return
        try:
            self._send(peer, answer)
        except WireError as error:
            self._refuse(peer, error)

    def _send(self, peer: Peer, answer: m.FromStore) -> None:
        peer.unsent += framed(m.encoded(answer))
        self._flush(peer)
        if len(peer.unsent) > MAX_UNSENT_NBYTES:
            raise WireError("it does not read its answers")

    def _flush(self, peer: Peer) -> None:
        peer.send()
        if peer.writing != bool(peer.unsent):
            peer.writing = bool(peer.unsent)
            if peer.writing:
                self._loop.add_writer(peer.sock, self._serve_peer, peer)
            else:
                self._loop.remove_writer(peer.sock)

    def _refuse(self, peer: Peer, error: WireError) -> None:
        try:
            if not peer.unsent:  # else the client would read it as the rest of an answer that is half sent
                peer.sock.send(framed(m.encoded(m.Refused(error.code, str(error)))))
        except OSError as failure:
            log.debug("the refusal could not be sent: %s", failure)
        self._drop(peer, str(error))

    def _unwatch(self, peer: Peer) -> None:
        self._loop.remove_reader(peer.sock)
        self._loop.remove_writer(peer.sock)

    def _drop(self, peer: Peer, why: str) -> None:
        """Ends a client. Its session lingers until none of its processes can touch its memory any more."""
        log.info("client (pid %d) ended: %s", peer.pid, why)
        self._unwatch(peer)
        del self._peers[peer.sock.fileno()]
        holders, peer.holders = peer.holders, Holders()
        session, peer.session, peer.control = peer.session, None, False
        peer.close()
        if self.listener is None and not self._peers:
            self._over.set()
        if session is None:
            holders.close()
            return
        self.walk.tasks.cancel(session)
        self._lingering.add(session, holders)


def _is_too_much(peer: Peer, message: m.ToStore) -> bool:
    """Whether a message must wait until an earlier errand or lookup of its client has ended."""
    if isinstance(message, m.Fetch):
        return peer.fetches >= MAX_FETCHES
    if isinstance(message, m.Discard):
        return peer.discards >= MAX_DISCARDS
    heavy = isinstance(message, m.Clear) or (isinstance(message, m.AskStats) and message.check)
    return heavy and peer.errands >= MAX_ERRANDS
