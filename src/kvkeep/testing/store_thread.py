"""A real store and its server in a thread of the test, so that a test can look into the store and needs no process.

Knows nothing about engines. An engine must never do this: a busy thread beside it would take its interpreter.
"""

from __future__ import annotations

import secrets
import socket
import threading
from dataclasses import dataclass, field

from kvkeep.core.allocator import FreeList
from kvkeep.core.index import Index
from kvkeep.core.policy import policy_by_name
from kvkeep.memory.region import Region
from kvkeep.store.store import Store
from kvkeep.wire.server import Server

END_LIMIT_S = 10.0


@dataclass
class RunningStore:
    """One boot of a store: its parts, and the thread that owns them until the connection has ended."""

    region: Region
    store: Store
    server: Server
    thread: threading.Thread

    def join(self) -> None:
        """Waits for the end of the thread and gives the pool's memory back."""
        self.thread.join(END_LIMIT_S)
        assert not self.thread.is_alive(), "the server's loop has not ended"
        self.region.close()


@dataclass
class ThreadSource:
    """A `Source` (see `kvkeep.engine.link`): each connection gets a store of its own, a new boot with a new pool.

    `running` is the newest one; it may be looked into while its thread is idle. The client's goodbye or end of file
    ends it, as with a private store.
    """

    pool_nbytes: int
    policy: str = "lru"
    max_pinned_share: float = 0.5
    boots: list[RunningStore] = field(default_factory=list)

    @property
    def running(self) -> RunningStore:
        """The newest boot."""
        return self.boots[-1]

    def connect(self) -> socket.socket:
        """A socket to a new store."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        region = Region.create(self.pool_nbytes)
        index = Index(FreeList(self.pool_nbytes), policy_by_name(self.policy))
        store = Store(index, self.pool_nbytes, self.max_pinned_share)
        server = Server(store, secrets.token_bytes(16), region.fd, private=theirs)
        thread = threading.Thread(target=server.serve, daemon=True, name="kvkeep-test-store")
        self.boots.append(RunningStore(region, store, server, thread))
        thread.start()
        return ours

    def end(self, wait: bool) -> None:
        """Waits for every store whose client has gone; without `wait` nothing is done."""
        if not wait:
            return
        for one in self.boots:
            one.join()
