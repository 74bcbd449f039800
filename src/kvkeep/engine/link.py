"""The planner's line to its store: started or joined, lost, and found again, without ever making the engine wait.

Knows nothing about requests. After the first start every step of coming back is a look, never a wait. A store that is
slow is not asked until it has answered what it was asked; one that is silent for long, or gone, is lost and tried again
after a pause that doubles, up to a minute.
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
    """Where stores come from: a new connected socket, and the end of what was made for it."""

    def connect(self) -> socket.socket:
        """A socket to a store that may still be starting; StoreGone if there is none."""

    def end(self, wait: bool) -> None:
        """The connection is over; with `wait` what was started has ended when this returns."""

    @property
    def outlived(self) -> bool:
        """Whether what its store keeps may be found by others, or after us."""

    def patience_s(self) -> float | None:
        """How long a start waits for a store that is not there before it goes on without; None: it does not go on."""


@dataclass
class PrivateSource:
    """Starts a store process as a child for each connection."""

    config: Config
    _child: Child | None = None

    def connect(self) -> socket.socket:
        """A new child's socket; ConfigError if the machine has no room for its pool."""
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
        """A store of our own that does not start is a fault that is best known at once."""
        return None


@dataclass
class SharedSource:
    """Joins the store that listens at `path`; an engine that starts waits `wait_s` for it."""

    path: str
    wait_s: float = 0.0

    def connect(self) -> socket.socket:
        """A connection to it, at once: a store that is stopped and has a full backlog holds nobody up."""
        return join_shared(self.path, 0.0)

    def end(self, wait: bool) -> None:
        """The shared store outlives us."""

    @property
    def outlived(self) -> bool:
        """It is for others too."""
        return True

    def patience_s(self) -> float | None:
        """It may come later than we do, and come back."""
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
    """Where the store comes from that is configured; ConfigError if a private pool would hold no chunk."""
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
    """`hello` says who we are at each connection; the pool is handed to every door of `doors` once a boot."""

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

        A store that may come later is waited for as long as its source says; after that it is looked for by `live`.
        """
        patience_s = self.source.patience_s()
        end_s = self.clock() + (patience_s or 0.0)
        while True:
            try:
                joining = Joining(self.source.connect(), self.hello(0))
                self._welcomed(joining.wait(limit_s, self.clock))
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
        """The client if the store may be asked. While it may not, each call looks on; `idle`: no step is under way."""
        if self.client is not None:
            if self.client.alive and self._answers(self.client):
                return self.client
            if self.client.alive:
                return None
            self._lost(self.client.why_gone)
        if self._joining is not None:
            self._look()
        elif idle and self.clock() >= self._retry_at_s:
            self._try()
        return self.client

    @property
    def slow(self) -> bool:
        """Whether the store is there and has not yet answered what overran a deadline."""
        return self.client is not None and self._silent_since_s is not None

    def suspend(self) -> None:
        """The store overran a deadline: nobody asks it until it has answered everything, and nothing is thrown away."""
        if self._silent_since_s is None:
            self._silent_since_s = self.clock()
            log.warning("kvkeep: the store is slow; the engine goes on without it until it answers")

    def begin_anew(self, namespace: bytes, identity: str) -> None:
        """From here on all keys are in a namespace that nobody else has, or will have.

        What is in the one before is dropped only where nobody can find it any more.
        """
        outlived = self.source.outlived
        log.info(
            "kvkeep: the cache was reset: nothing kept so far is given to this engine (%s); what it keeps from here on "
            "goes to no disk and ends with it",
            "it stays for other engines and for the next start" if outlived else "it is dropped",
        )
        self._anew = True
        if self.client is not None:
            if not outlived:
                self.client.clear()
            self.client.rename(namespace, identity, lasting=False)

    def _answers(self, client: Client) -> bool:
        """Whether a store that was slow has caught up; one that stays silent is given up."""
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
        """Says goodbye and ends a store of our own."""
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

    def _look(self) -> None:
        assert self._joining is not None
        try:
            client = self._joining.poll()
            if client is not None:
                self._welcomed(client)
            elif self.clock() > self._retry_at_s + LONGEST_PAUSE_S:
                raise StoreGone("no welcome came")
        except KVKeepError as error:
            self._wait_longer(str(error))

    def _welcomed(self, client: Client) -> None:
        self._joining = None
        self._pause_s = FIRST_PAUSE_S
        self._last_session = client.welcome.session
        now = self.hello(0)
        # a reset may have come between our hello and its welcome
        client.rename(now.namespace, now.identity, lasting=not self._anew)
        try:
            self._hand_out(client)
        except StoreGone:
            client.drop()
            raise
        self.client = client
        log.info("kvkeep: store process %d, pool of %s", client.welcome.pid, size_text(client.welcome.pool_nbytes))

    def _hand_out(self, client: Client) -> None:
        """The pool goes to the workers; without any it stays with the client, for its user."""
        if not self.doors:
            return
        pool = client.take_pool()
        try:
            for door in self.doors:
                send_pool(door, pool, CONNECT_LIMIT_S)
        finally:
            pool.close()

    def _lost(self, why: str) -> None:
        self._silent_since_s = None
        log.error("kvkeep: the store is lost (%s); the engine goes on without it", why)
        assert self.client is not None
        self.client.drop()
        self.client = None
        self._wait_longer(why)

    def _wait_longer(self, why: str) -> None:
        self._give_up_joining()
        self.source.end(wait=False)
        self._retry_at_s = self.clock() + self._pause_s
        log.warning("kvkeep: no store (%s); trying again in %.0f s", why, self._pause_s)
        self._pause_s = min(LONGEST_PAUSE_S, self._pause_s * 2)
