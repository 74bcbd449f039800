"""Runs a real store and its server in a thread of the test, so that a test can look into the store without a process.

An engine must never do this: the busy thread would take its interpreter. Knows nothing about engines.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kvkeep.config import Config
from kvkeep.core.allocator import FreeList
from kvkeep.core.index import Index
from kvkeep.core.policies.registry import policy_by_name
from kvkeep.core.units import BOOT_NBYTES
from kvkeep.memory.progress import region_nbytes, table_of
from kvkeep.memory.region import Region
from kvkeep.store.below.tiers import TierWalk
from kvkeep.store.server.listening import listen
from kvkeep.store.server.server import Server
from kvkeep.store.store import Store

END_LIMIT_S = 10.0


@dataclass
class RunningStore:
    """One boot of a store: its parts, and the thread that owns them until its server's loop has ended.

    Look into `store` only while the thread is idle.
    """

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

    The client's goodbye or end of file ends it, as with a private store.
    """

    pool_nbytes: int
    policy: str = "lru"
    max_pinned_share: float = 0.5
    outlived: bool = False
    boots: list[RunningStore] = field(default_factory=list)

    @property
    def running(self) -> RunningStore:
        """The newest boot."""
        return self.boots[-1]

    def connect(self) -> socket.socket:
        """A socket to a new store."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        config = Config(pool_size=self.pool_nbytes, policy=self.policy, max_pinned_share=self.max_pinned_share)
        self.boots.append(_started(config, theirs, None))
        return ours

    def end(self, wait: bool) -> None:
        """Waits for every store whose client has gone; without `wait` nothing is done."""
        if wait:
            for boot in self.boots:
                boot.join()

    def patience_s(self) -> float | None:
        """It always starts."""
        return None


@contextmanager
def shared_store(path: Path, config: Config) -> Iterator[RunningStore]:
    """A store that listens at `path` for any number of clients, as long as the context lasts."""
    with listen(path) as listener:
        running = _started(config, None, listener)
        try:
            yield running
        finally:
            running.server.stop()
            running.join()


def _started(config: Config, private: socket.socket | None, listener: socket.socket | None) -> RunningStore:
    pool_nbytes = config.pool_nbytes(0)
    region = Region.create(region_nbytes(pool_nbytes))
    index = Index(FreeList(pool_nbytes), policy_by_name(config.policy))
    store = Store(index, pool_nbytes, config.max_pinned_share, config.lease_time_s)
    walk = TierWalk(store, region.array, table_of(region))
    server = Server(walk, secrets.token_bytes(BOOT_NBYTES), region.fd, private, listener=listener)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True, name="kvkeep-test-store")
    thread.start()
    return RunningStore(region, store, server, thread)
