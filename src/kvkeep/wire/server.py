"""The store's end of the channel: one event loop over sockets, one reader of frames a client.

Any bytes from any client are a typed error for that client and nothing for the others; a client that does not read is
disconnected once its unsent answers are over a bound. Knows nothing about pools or keys beyond handing them on.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field

from kvkeep.core.index import Outcome
from kvkeep.core.key import NAMESPACE_NBYTES
from kvkeep.errors import WireError
from kvkeep.store.sessions import Opening, Session
from kvkeep.store.states import FoundState, StateFetches
from kvkeep.store.store import Store
from kvkeep.store.waiting import Found, Limits
from kvkeep.store.walk import TierWalk
from kvkeep.wire import messages as m
from kvkeep.wire.frames import READ_NBYTES, FrameReader, framed
from kvkeep.wire.holders import MAX_HOLDERS, Holders, holders_of

log = logging.getLogger("kvkeep.store")

MAX_UNSENT_NBYTES = 8 << 20
MAX_CLIENTS = 256
MAX_DEADLINE_S = 3600.0
MAX_PID = 2**22  # the kernel's own limit
_OUTCOMES = {Outcome.PRESENT: m.PRESENT, Outcome.BUSY: m.BUSY, Outcome.NO_ROOM: m.NO_ROOM}


@dataclass
class Peer:
    """One connected client: its socket, what it sent, what it has not read yet, its session once it said hello.

    `fds` are descriptors that came before its hello, `holders` what they are after it.
    """

    sock: socket.socket
    pid: int
    frames: FrameReader = field(default_factory=FrameReader)
    unsent: bytearray = field(default_factory=bytearray)
    session: Session | None = None
    fds: list[int] = field(default_factory=list)
    holders: Holders = field(default_factory=Holders)
    writing: bool = False


@dataclass
class Server:
    """Serves `store` until `stop` is called, or until the private client's end of file when there is no listener.

    The event loop's thread owns it and the store; only `stop` may be called from another.
    """

    walk: TierWalk
    boot: bytes
    pool_fd: int
    private: socket.socket | None = None
    listener: socket.socket | None = None
    _peers: dict[int, Peer] = field(default_factory=dict)
    _graves: dict[int, Holders] = field(default_factory=dict)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _wake: Callable[[], object] = lambda: None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.states = StateFetches(self.walk.promotions)

    @property
    def store(self) -> Store:
        """The pool's own store."""
        return self.walk.store

    async def serve(self) -> None:
        """Runs until it is told to stop or its only client is gone."""
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self._wake = lambda: self._loop.call_soon_threadsafe(self._over.set)
        if self.private is not None:
            self._accept(self.private)
        if self.listener is not None:
            self.listener.setblocking(False)
            self._loop.add_reader(self.listener, self._welcome_client)
        if not self._stopping.is_set() and (self.listener is not None or self._peers):
            await self._over.wait()
        self._close()

    def stop(self) -> None:
        """Ends `serve`; also from another thread, and before it has begun."""
        self._stopping.set()
        self._wake()

    def _close(self) -> None:
        self._wake = lambda: None
        if self.listener is not None:
            self._loop.remove_reader(self.listener)
        for peer in self._peers.values():
            self._unwatch(peer)
            self._forget(peer)
        for grave in self._graves.values():
            self._unwatch_all(grave)

    def _welcome_client(self) -> None:
        assert self.listener is not None
        try:
            sock, _ = self.listener.accept()
        except OSError as error:  # the client is gone again, or descriptors are short: the others are served on
            log.warning("a client could not be taken: %s", error)
            return
        if len(self._peers) >= MAX_CLIENTS:
            sock.close()
            return
        self._accept(sock)

    def _accept(self, sock: socket.socket) -> None:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, _ = struct.unpack("3i", credentials)
        if uid not in (os.getuid(), 0):
            log.warning("refused a client of user %d: the pool belongs to user %d", uid, os.getuid())
            sock.close()
            return
        sock.setblocking(False)
        peer = Peer(sock, pid)
        self._peers[sock.fileno()] = peer
        self._loop.add_reader(sock, self._turn, peer)

    def _turn(self, peer: Peer) -> None:
        """Reads what one client sent and answers it; an error ends that client only."""
        try:
            if peer.unsent:
                self._flush(peer)
            data = self._received(peer)
            if data == b"":
                self._drop(peer, "its end of the socket was closed")
                return
            for payload in peer.frames.feed(data or b""):
                self._answer(peer, m.decoded_by_store(payload))
                if peer.sock.fileno() < 0:
                    return
        except WireError as error:
            self._refuse(peer, error)

    def _received(self, peer: Peer) -> bytes | None:
        try:
            if peer.session is not None:
                return peer.sock.recv(READ_NBYTES)
            data, fds, _, _ = socket.recv_fds(peer.sock, READ_NBYTES, MAX_HOLDERS, socket.MSG_CMSG_CLOEXEC)
            peer.fds += fds
            if len(peer.fds) > MAX_HOLDERS:
                raise WireError(f"more than {MAX_HOLDERS} descriptors")
            return data
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            return b""

    def _answer(self, peer: Peer, message: m.ToStore) -> None:
        if isinstance(message, m.Hello):
            self._hello(peer, message)
            return
        session = peer.session
        if session is None:
            raise WireError("the first message must be a hello")
        if isinstance(message, m.Bye):
            self.states.forget(session)
            self.store.close(session)
            peer.session = None
            self._drop(peer, "it said goodbye")
        elif isinstance(message, m.Fetch):
            self._fetch(peer, session, message)
        elif isinstance(message, m.Clear):
            namespaces = self.store.namespaces_of(session, message.everything)  # now: a rename may be the next message
            count = self.store.clear(session, message.everything)
            self._go(self._clear(peer, session, namespaces, m.Cleared(message.call, count)))
        else:
            answer = self._asked(session, message)
            if answer is not None:
                self._send(peer, answer)

    def _fetch(self, peer: Peer, session: Session, asked: m.Fetch) -> None:
        def answer(found: Found, state: m.HeldState | None = None) -> None:
            why = found.why.value if found.why is not None else ""
            try:
                fetched, words = found.fetched, dict(found.words)
                matched = m.Matched(asked.call, *fetched, found.sources, why, found.took_s, state, words, *self._fill())
                self._send(peer, matched)
            except WireError as error:
                self._refuse(peer, error)

        deadline_s = min(MAX_DEADLINE_S, max(0.0, asked.deadline_s))
        limits = Limits(deadline_s, min(MAX_DEADLINE_S, asked.limit_s), asked.early)
        digests = m.split_digests(asked.digests)
        if session.states is None:
            self.walk.promotions.fetch(session, digests, limits, answer)
        else:
            self.states.fetch(session, digests, limits, lambda found: answer(found.run, _state_of(found)))

    async def _clear(self, peer: Peer, session: Session, namespaces: Sequence[bytes | None], answer: m.Cleared) -> None:
        for namespace in namespaces:
            await self.walk.clear(namespace)
        if peer.session is session:
            try:
                self._send(peer, answer)
            except WireError as error:
                self._refuse(peer, error)

    def _hello(self, peer: Peer, hello: m.Hello) -> None:
        if hello.version != m.VERSION:
            raise WireError(f"protocol version {hello.version} is not {m.VERSION}: use the same kvkeep on both sides")
        if peer.session is not None or len(hello.holders) > MAX_HOLDERS:
            raise WireError(f"a session says hello once and names at most {MAX_HOLDERS} processes")
        if not all(0 < pid <= MAX_PID for pid in hello.holders):
            raise WireError("a holder is no process id")
        fds, peer.fds = peer.fds, []
        peer.holders = holders_of(fds, len(set(hello.holders)))
        old = self._graves.get(hello.resumes)
        if old is not None and old.within(peer.holders):
            self._bury(self.store.lingering[hello.resumes])
        opening = Opening(
            hello.name,
            hello.namespace,
            hello.identity,
            hello.chunk_nbytes,
            tuple(hello.holders),
            hello.verify_every,
            tuple(hello.sizes),
            tuple(hello.state_sizes),
        )
        peer.session = self.store.open(opening)
        welcome = m.Welcome(m.VERSION, self.boot, peer.session.number, os.getpid(), self.store.pool_nbytes)
        try:
            socket.send_fds(peer.sock, [framed(m.encoded(welcome))], [self.pool_fd])
        except OSError as error:
            raise WireError(f"the pool could not be handed over: {error}") from error
        log.info("session %d opened by %s (pid %d)", peer.session.number, hello.name, peer.pid)
        if hello.identity:
            self._named(peer.session, hello.identity)

    def _asked(self, session: Session, message: m.ToStore) -> m.FromStore | None:
        """The answer to a message of an open session, None where it has none."""
        store = self.store
        match message:
            case m.Reserve():
                side = session.states if message.states else session
                if side is None:
                    raise WireError("it has no states")
                lease, places = store.reserve(side, m.split_digests(message.digests))
                offsets = [_OUTCOMES[one] if isinstance(one, Outcome) else one for one in places]
                return m.Granted(message.call, lease, offsets)
            case m.Commit():
                side = session.side_of(message.lease)
                entries = store.written(side, message.lease, message.places)
                done = store.commit(side, message.lease, message.places, message.sums)
                self.walk.committed(side, list(itertools.compress(entries, done)))
                return m.Committed(message.call, done, *self._fill())
            case m.Release():
                store.release(session.side_of(message.lease), message.lease)
            case m.Discard():
                digests = m.split_digests(message.digests)
                store.discard(session, digests)
                self._go(self.walk.discard([key for side in session.sides for key in store.keys(side, digests)]))
            case m.Rename():
                self._rename(session, message)
            case m.AskStats():
                figures = store.figures() | self.walk.figures()
                return m.Stats(message.call, figures, *((store.index.check(), self._known()) if message.check else ()))
        return None

    def _rename(self, session: Session, asked: m.Rename) -> None:
        if asked.namespace != session.namespace:
            log.info(
                "session %d (%s) is in a namespace of its own from here on%s; what it leaves behind stays for others",
                session.number,
                session.opening.name,
                "" if asked.lasting else ", which ends with it and goes to no disk",
            )
        self.store.rename(session, asked.namespace, asked.lasting)
        self.store.namespaces.name(session.namespace, session.opening.name, asked.identity)

    def _fill(self) -> tuple[int, int]:
        """The bytes of the pool that hold chunks, and those that leases hold."""
        stats = self.store.index.stats()
        return stats.committed_nbytes + stats.writing_nbytes + stats.dead_nbytes, stats.pinned_nbytes

    def _named(self, session: Session, identity: str) -> None:
        """Notes what a session's namespace is; an engine that will not find another's chunks is told why."""
        apart = self.store.namespaces.name(session.namespace, session.opening.name, identity)
        if apart:
            log.info("session %d shares nothing with the one before: %s", session.number, "; ".join(apart))

    def _known(self) -> list[m.Known]:
        counts = self.store.index.prefixes(NAMESPACE_NBYTES)
        return [m.Known(one, *named, counts[one]) for one, named in self.store.namespaces.known.items()]

    def _send(self, peer: Peer, answer: m.FromStore) -> None:
        peer.unsent += framed(m.encoded(answer))
        self._flush(peer)
        if len(peer.unsent) > MAX_UNSENT_NBYTES:
            raise WireError("it does not read its answers")

    def _flush(self, peer: Peer) -> None:
        try:
            sent = peer.sock.send(peer.unsent)
            del peer.unsent[:sent]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            raise WireError(f"its socket failed: {error}") from error
        if peer.writing != bool(peer.unsent):
            peer.writing = bool(peer.unsent)
            if peer.writing:
                self._loop.add_writer(peer.sock, self._turn, peer)
            else:
                self._loop.remove_writer(peer.sock)

    def _refuse(self, peer: Peer, error: WireError) -> None:
        try:
            if not peer.unsent:  # else it would be taken for the rest of an answer that is half sent
                peer.sock.send(framed(m.encoded(m.Refused(error.code, str(error)))))
        except OSError as failure:
            log.debug("the refusal could not be sent: %s", failure)
        self._drop(peer, str(error))

    def _go(self, steps: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(steps)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _unwatch(self, peer: Peer) -> None:
        self._loop.remove_reader(peer.sock)
        self._loop.remove_writer(peer.sock)

    def _drop(self, peer: Peer, why: str) -> None:
        """Ends a client; memory that its processes may still touch is kept until they are gone."""
        log.info("client (pid %d) ended: %s", peer.pid, why)
        self._unwatch(peer)
        del self._peers[peer.sock.fileno()]
        holders, peer.holders = peer.holders, Holders()
        session, peer.session = peer.session, None
        self._forget(peer)
        if self.listener is None and not self._peers:
            self._over.set()
        if session is None:
            holders.close()
            return
        self.states.forget(session)
        self.store.linger(session)
        self._await_deaths(session, holders)

    def _forget(self, peer: Peer) -> None:
        """Gives back what a client that is gone had open."""
        peer.sock.close()
        peer.holders.close()
        for fd in peer.fds:
            os.close(fd)
        peer.fds.clear()

    def _await_deaths(self, session: Session, holders: Holders) -> None:
        """Gives a lingering session's memory back when every process that may touch it has ended."""
        self._graves[session.number] = holders
        for pidfd in holders.alive:
            self._loop.add_reader(pidfd, self._died, session, pidfd)
        if holders.gone or not any(side.leases for side in session.sides):
            self._bury(session)

    def _died(self, session: Session, pidfd: int) -> None:
        holders = self._graves[session.number]  # a session that was resumed in the same turn is not called any more
        self._loop.remove_reader(pidfd)
        holders.died(pidfd)
        if holders.gone:
            self._bury(session)

    def _bury(self, session: Session) -> None:
        self._unwatch_all(self._graves.pop(session.number))
        self.store.close(session)

    def _unwatch_all(self, holders: Holders) -> None:
        for pidfd in holders.alive:
            self._loop.remove_reader(pidfd)
        holders.close()


def _state_of(found: FoundState) -> m.HeldState | None:
    if found.state is None:
        return None
    lease, offsets, sums = found.state.fetched
    return m.HeldState(lease, offsets[0], sums.get(0, b""), next(iter(found.state.sources)))
