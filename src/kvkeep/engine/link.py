"""An engine's link to its store: starts or joins it, notices when it is lost, and finds it again.

After the first start nothing here waits: each call looks whether the next step of coming back is possible. A slow store
gets no more questions until it has answered the earlier ones. A store that is silent for long, or gone, is lost; the
link tries again after a pause that doubles, up to a minute. Knows nothing about requests.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from kvkeep.config import Config
from kvkeep.core.layout import ChunkLayout
from kvkeep.errors import ConfigError, KVKeepError, StoreGone
from kvkeep.memory.limits import read_limits, size_text
from kvkeep.wire.client import Client, Joining
from kvkeep.wire.messages import Hello
from kvkeep.wire.pool_socket import send_pool
from kvkeep.wire.start import DRAIN_S, Child, join_shared, start_private

log = logging.getLogger("kvkeep")

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
CONNECT_LIMIT_S = 1.0
START_PAUSE_S = 0.2
END_LIMIT_S = DRAIN_S + 2.0
SILENCE_LIMIT_S = 30.0


class StoreSource(Protocol):
    """Where an engine gets its store: by starting a process of its own, or by joining one that runs."""

    def connect(self) -> socket.socket:
        """A connected socket to a store that may still be starting; StoreGone if there is none."""

    def end(self, wait: bool) -> None:
        """Ends what `connect` started, if anything; with `wait` it has ended when this returns."""

    @property
    def outlived(self) -> bool:
        """Whether another engine, or a later start of this one, may find what the store keeps."""

    def patience_s(self) -> float | None:
        """How long an engine's start waits for the store before it goes on without; None: it fails instead."""


@dataclass
class PrivateSource:
    """Starts a store process as a child for each connection."""

    config: Config
    _child: Child | None = None

    def connect(self) -> socket.socket:
        """The socket of a new child; ConfigError if the machine has no room for its pool."""
        self.end(wait=False)
        self._child = start_private(self.config)
        return self._child.sock

    def end(self, wait: bool) -> None:
        """Ends the child."""
        child, self._child = self._child, None
        if child is not None and wait:
            child.end(END_LIMIT_S)
        elif child is not None:
            child.kill()

    @property
    def outlived(self) -> bool:
        """Whether it has a tier."""
        return bool(self.config.tiers)

    def patience_s(self) -> float | None:
        """None: a store of our own that does not start is a fault, to be shown at once."""
        return None


@dataclass
class SharedSource:
    """Joins the store that listens at `path`; an engine that starts waits `wait_s` for it."""

    path: str
    wait_s: float = 0.0

    def connect(self) -> socket.socket:
        """A connection, without waiting: a stopped store with a full backlog holds nobody up."""
        return join_shared(self.path, 0.0)

    def end(self, wait: bool) -> None:
        """The shared store outlives us."""

    @property
    def outlived(self) -> bool:
        """True: other engines use it."""
        return True

    def patience_s(self) -> float | None:
        """`wait_s`: it may start later than the engine."""
        return self.wait_s


def hello_of(
    name: str,
    named: tuple[bytes, str],
    layouts: tuple[ChunkLayout, ChunkLayout | None],
    holders: Sequence[int],
    *,
    verify_every: int = 0,
    resumes: int = 0,
) -> Hello:
    """What an engine says of itself to a store: `named` is its namespace and what that is for people.

    `layouts` are those of a chunk and, where the model has any, of a state. The rest is as in Hello.
    """
    (namespace, identity), (chunk, state) = named, layouts
    return Hello(
        name=name,
        namespace=namespace,
        identity=identity,
        chunk_nbytes=chunk.nbytes,
        holders=holders,
        verify_every=verify_every,
        resumes=resumes,
        sizes=chunk.sizes,
        state_sizes=state.sizes if state is not None else (),
    )


def source_of(config: Config, chunk_nbytes: int, chunk_tokens: int) -> StoreSource:
    """The configured source of the store; ConfigError if a private pool would hold no chunk."""
    if config.socket_path is not None:
        return SharedSource(config.socket_path, config.store_wait_s)
    nbytes = config.pool_nbytes(read_limits().available_nbytes)
    if nbytes < chunk_nbytes:
        raise ConfigError(
            f"pool_size: {nbytes} bytes hold no chunk of this model ({chunk_nbytes} bytes for {chunk_tokens} tokens); "
            f"set it to at least {2 * chunk_nbytes}"
        )
    return PrivateSource(msgspec.structs.replace(config, pool_size=nbytes))


@dataclass
class Link:
    """`hello` makes the first message of a connection, from the session that it resumes (0: none).

    Each new start of the store hands its pool to every worker: `doors` are where these listen.
    """

    source: StoreSource
    hello: Callable[[int], Hello]
    doors: Sequence[str]
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep
    client: Client | None = None
    _silent_since_s: float | None = None
    _joining: Joining | None = None
    _retry_at_s: float = 0.0
    _pause_s: float = FIRST_PAUSE_S
    _last_session: int = field(default=0)
    _anew: bool = False

    def start(self, limit_s: float) -> None:
        """Starts or joins the store and waits at most `limit_s` for its welcome; raises KVKeepError if that fails.

        Waits for a shared store as long as its source says; after that `live` looks for it.
        """
        patience_s = self.source.patience_s()
        end_s = self.clock() + (patience_s or 0.0)
        while True:
            try:
                joining = Joining(self.source.connect(), self.hello(0))
                self._take_in(joining.wait(limit_s, self.clock))
            except KVKeepError as error:
                if patience_s is None or isinstance(error, ConfigError):
                    self.source.end(wait=True)
                    raise
                if self.clock() >= end_s:
                    self._wait_longer(str(error))
                    return
                self.pause(min(START_PAUSE_S, max(0.0, end_s - self.clock())))
            else:
                return

    def live(self, idle: bool) -> Client | None:
        """The client if the store may be asked; else None, and each call tries to come back.

        `idle`: no step is under way, so that a new session may resume the leases of the last one.
        """
        if self.client is not None:
            if self.client.alive and self._answers(self.client):
                return self.client
            if self.client.alive:
                return None
            self._lose(self.client)
        if self._joining is not None:
            self._look(self._joining)
        elif idle and self.clock() >= self._retry_at_s:
            self._try()
        return self.client

    @property
    def slow(self) -> bool:
        """Whether the store is there and still owes the answer that overran a deadline."""
        return self.client is not None and self._silent_since_s is not None

    def suspend(self) -> None:
        """Asks a store that overran a deadline nothing more until it has answered everything."""
        if self._silent_since_s is None:
            self._silent_since_s = self.clock()
            log.warning("kvkeep: the store is slow; the engine goes on without it until it answers")

    def begin_anew(self, namespace: bytes, identity: str) -> None:
        """Puts all keys from here on into a namespace that nobody else has, or will have.

        Drops the chunks of the one before only where nobody else can find them.
        """
        outlived = self.source.outlived
        log.info(
            "kvkeep: the cache was reset: this engine gets nothing that was kept so far (%s); what it keeps from here "
            "on goes to no disk and ends with it",
            "which stays for other engines and for the next start" if outlived else "which is dropped",
        )
        self._anew = True
        if self.client is not None:
            if not outlived:
                self.client.clear()
            self.client.rename(namespace, identity, lasting=False)

    def _answers(self, client: Client) -> bool:
        """Whether the store may be asked: it is not slow, or has caught up. Gives up one that stays silent."""
        if self._silent_since_s is None:
            return True
        client.pump()
        if not client.open_calls:
            self._silent_since_s = None
            return client.alive
        if self.clock() - self._silent_since_s > SILENCE_LIMIT_S:
            client.lose(f"no answer for {SILENCE_LIMIT_S:.0f} s")
        return False

    def close(self) -> None:
        """Says goodbye, and ends a store of our own."""
        if self.client is not None:
            self.client.close()
            self.client = None
        self._give_up_joining()
        self.source.end(wait=True)

    def _give_up_joining(self) -> None:
        if self._joining is not None:
            self._joining.close()
            self._joining = None

    def _try(self) -> None:
        try:
            self._joining = Joining(self.source.connect(), self.hello(self._last_session))
        except KVKeepError as error:
            self._wait_longer(str(error))

    def _look(self, joining: Joining) -> None:
        try:
            client = joining.poll()
            if client is not None:
                self._take_in(client)
            elif self.clock() > self._retry_at_s + LONGEST_PAUSE_S:
                raise StoreGone("no welcome came")
        except KVKeepError as error:
            self._wait_longer(str(error))

    def _take_in(self, client: Client) -> None:
        self._joining = None
        self._pause_s = FIRST_PAUSE_S
        self._last_session = client.welcome.session
        now = self.hello(0)
        # the engine may have been reset between our hello and this welcome
        client.rename(now.namespace, now.identity, lasting=not self._anew)
        try:
            self._hand_out(client)
        except StoreGone:
            client.drop()
            raise
        self.client = client
        log.info("kvkeep: store process %d, pool of %s", client.welcome.pid, size_text(client.welcome.pool_nbytes))

    def _hand_out(self, client: Client) -> None:
        """Hands the pool to the workers; without workers it stays with the client, for the client's user."""
        if not self.doors:
            return
        pool = client.take_pool()
        try:
            for door in self.doors:
                send_pool(door, pool, CONNECT_LIMIT_S)
        finally:
            pool.close()

    def _lose(self, client: Client) -> None:
        self._silent_since_s = None
        log.error("kvkeep: the store is lost (%s); the engine goes on without it", client.why_gone)
        client.drop()
        self.client = None
        self._wait_longer(client.why_gone)

    def _wait_longer(self, why: str) -> None:
        self._give_up_joining()
        self.source.end(wait=False)
        self._retry_at_s = self.clock() + self._pause_s
        log.warning("kvkeep: no store (%s); trying again in %.0f s", why, self._pause_s)
        self._pause_s = min(LONGEST_PAUSE_S, self._pause_s * 2)
