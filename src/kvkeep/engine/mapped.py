"""The store's pool in a rank's process: mapped when it is handed over, page-locked where a device copies by itself.

Knows nothing about plans, keys or copies. Every start of the store has a pool of its own; that of an earlier one is not
lent again, and ends with its last lease.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from kvkeep.core.layout import ShardLayout
from kvkeep.errors import KVKeepError
from kvkeep.memory.pin import PinCalls
from kvkeep.memory.pool import Lease, Pool
from kvkeep.memory.region import Region
from kvkeep.wire.handoff import HandedPool, PoolDoor

log = logging.getLogger("kvkeep")

WATCH_S, LOOK_S = 600.0, 0.05


class MappedPool:
    """Pools come through `door`; `pin_calls` page-lock each of them (None: nothing needs to).

    A pool that another one replaces is unlocked by a thread: the caller is an engine's own.
    """

    def __init__(self, door: PoolDoor, pin_calls: PinCalls | None = None) -> None:
        self._door = door
        self._pin_calls = pin_calls
        self._pool: Pool | None = None
        self._turn = threading.Lock()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    def watch(self) -> None:
        """Takes the first pool when it comes, and not only when a step needs it: locking it takes a while."""
        self._beside(self._watch)

    def lease(self, boot: bytes, offset: int, shard: ShardLayout, word: int = 0) -> Lease | None:
        """A lease on the shard at `offset` of that boot's pool, to be closed; None if that pool is not here.

        `word` is where its progress word is (0: it has none).
        """
        if self._pool is None or self._pool.boot != boot:
            self._look()
        if self._pool is None or self._pool.boot != boot:
            return None
        return self._pool.lease(offset, shard, word)

    def close(self) -> None:
        """Closes the door and ends the mapping; idempotent. Leases keep their part of it."""
        self._closing.set()
        for thread in self._threads:
            thread.join(timeout=5.0)
        self._door.close()
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _watch(self) -> None:
        for _ in range(int(WATCH_S / LOOK_S)):
            if self._pool is None:
                self._look()
            if self._pool is not None or self._closing.wait(LOOK_S):
                return

    def _look(self) -> None:
        with self._turn:
            handed = self._door.take()
            if handed is not None:
                self._swap(handed)

    def _beside(self, call: Callable[[], None]) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(threading.Thread(target=call, daemon=True, name="kvkeep-pool"))
        self._threads[-1].start()

    def _swap(self, handed: HandedPool) -> None:
        old, self._pool = self._pool, None
        if old is not None and old.pin is not None:
            self._beside(old.close)
        elif old is not None:
            old.close()
        try:
            self._pool = Pool(handed.boot, Region.attach(handed.fd), self._pin_calls)
        except KVKeepError as error:
            log.error("kvkeep: the pool cannot be used here: %s", error)
