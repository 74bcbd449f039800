"""Maps the store's pool into this process, page-locks it where a device copies by itself, and unmaps it in time.

Every start of the store has a pool of its own. When the store has ended, or another pool has come, a pool is lent for a
moment longer, since a plan may still name it; then it is unmapped with its last lease, for the next one needs its room.
No engine's thread does that: to free a pool takes 0.2 to 0.3 s a GiB. Knows nothing about plans, keys or copies.
"""

from __future__ import annotations

import logging
import math
import os
import select
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from kvkeep.core.layout import ShardLayout
from kvkeep.errors import KVKeepError
from kvkeep.memory.page_lock import PinCalls
from kvkeep.memory.pool import Lease, Pool
from kvkeep.memory.region import Region
from kvkeep.wire.pool_socket import HandedPool, PoolDoor, close_all

log = logging.getLogger("kvkeep")

LATE_S = 2.0  # how much later a plan may come that was made before the planner knew of the store's end
END_LIMIT_S = 5.0


class MappedPool:
    """Pools come through `door`, or by `put`; `pin_calls` page-lock each of them (None: nothing needs to).

    A thread maps pools that come and unmaps those that have ended, whether or not the engine makes steps. A pool whose
    store has ended is lent until nobody asked for it for `late_s`; one that was replaced, until the new one is lent.
    """

    def __init__(
        self,
        door: PoolDoor | None = None,
        pin_calls: PinCalls | None = None,
        late_s: float = LATE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._door = door
        self._pin_calls = pin_calls
        self._late_s = late_s
        self._clock = clock
        self._pool: Pool | None = None
        self._replaced: tuple[Pool, float] | None = None  # the pool before it, and when it was replaced or last lent
        self._life = -1
        self._ended_s: float | None = None  # when the pool's store had ended, or the pool was last lent since then
        self._unused: list[int] = []  # descriptors for the thread to close: the last one of a pool frees it
        self._lock = threading.Lock()
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="kvkeep-mapped")
        self._thread.start()

    def put(self, handed: HandedPool, nbytes: int) -> None:
        """Maps a pool, and owns its descriptors from here on; KVKeepError unless it can be, and has `nbytes`."""
        with self._lock:
            self._swap(handed, nbytes)

    def has(self, boot: bytes) -> bool:
        """Whether that boot's pool is mapped."""
        with self._lock:
            return self._pool is not None and self._pool.boot == boot

    def lease(self, boot: bytes, offset: int, shard: ShardLayout, progress_at: int = 0) -> Lease | None:
        """A lease on the shard at `offset` of that boot's pool; the caller closes it. None if that pool is not here.

        `progress_at` is the byte of the chunk's progress (0: all of the chunk is there).
        """
        with self._lock:
            if self._pool is None or self._pool.boot != boot:
                self._take()  # it may have come a moment before the plan that names it
            if self._replaced is not None and self._replaced[0].boot == boot:
                self._replaced = (self._replaced[0], self._clock())
                return self._replaced[0].lease(offset, shard, progress_at)
            if self._pool is None or self._pool.boot != boot:
                return None
            self._close_replaced()  # plans name the new one by now
            if self._ended_s is not None:
                self._ended_s = self._clock()
            return self._pool.lease(offset, shard, progress_at)

    def close(self) -> None:
        """Closes the door and unmaps the pools, for which it waits a moment; idempotent. Leases keep their mapping."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            pools = [pool for pool in (self._pool, self._replaced[0] if self._replaced is not None else None) if pool]
            self._close_pool()
            self._close_replaced()
            self._wake_up()
        self._thread.join(END_LIMIT_S)
        if self._door is not None:
            self._door.close()
        for pool in pools:
            pool.wait(END_LIMIT_S)
        if not self._thread.is_alive():
            os.close(self._wake)

    def _watch(self) -> None:
        while True:
            with self._lock:
                self._take()
                left_s = self._left_s()
                if left_s == 0:
                    log.info("kvkeep: the store has ended: its pool is unmapped")
                    self._close_pool()
                    left_s = math.inf
                left_s = min(left_s, self._replaced_left_s())
                unused, self._unused = self._unused, []
                life = self._life if self._ended_s is None else -1
                doors = self._door.fds if self._door is not None else []
                closing = self._closing
            close_all(unused)
            if closing:
                return
            _wait(self._wake, doors, life, left_s)

    def _take(self) -> None:
        """Takes the pools that are at the door and maps the newest."""
        for handed in self._door.take() if self._door is not None and not self._closing else ():
            try:
                self._swap(handed)
            except KVKeepError as error:
                log.error("kvkeep: the pool cannot be used here: %s", error)

    def _left_s(self) -> float:
        """How long the pool will still be lent; 0: no longer, infinite: its store lives."""
        if self._life < 0 or not _hung_up(self._life):
            return math.inf
        if self._ended_s is None:
            self._ended_s = self._clock()
        return max(0.0, self._ended_s + self._late_s - self._clock())

    def _replaced_left_s(self) -> float:
        """How long the replaced pool will still be lent; infinite: there is none."""
        if self._replaced is None:
            return math.inf
        left_s = self._replaced[1] + self._late_s - self._clock()
        if left_s > 0:
            return left_s
        self._close_replaced()
        return math.inf

    def _swap(self, handed: HandedPool, nbytes: int | None = None) -> None:
        if self._closing:
            handed.close()
            return
        if self._pool is not None and self._pool.boot == handed.boot:
            self._unused += [handed.fd, handed.life]  # the same pool again: a session was resumed
        else:
            self._replace()
            self._life = handed.life
            self._pool = Pool(handed.boot, Region.attach(handed.fd, nbytes), self._pin_calls)
        self._wake_up()

    def _replace(self) -> None:
        """Keeps the pool for a moment after another one has come: an earlier plan may still name it."""
        pool, self._pool = self._pool, None
        self._close_pool()
        if pool is not None:
            self._close_replaced()
            self._replaced = (pool, self._clock())

    def _close_replaced(self) -> None:
        if self._replaced is not None:
            self._replaced[0].close()
            self._replaced = None

    def _close_pool(self) -> None:
        """Lends the pool no more; it is unmapped with its last lease, by a thread of its own."""
        if self._pool is not None:
            self._pool.close()
        if self._life >= 0:
            self._unused.append(self._life)
        self._pool, self._life, self._ended_s = None, -1, None

    def _wake_up(self) -> None:
        os.eventfd_write(self._wake, 1)


def _wait(wake: int, readable: Iterable[int], life: int, limit_s: float) -> None:
    """Waits until one of these is readable, or `life` (-1: none) hung up, at most for `limit_s`; drains `wake`."""
    poll = select.poll()
    for fd in (wake, *readable):
        poll.register(fd, select.POLLIN)
    if life >= 0:
        poll.register(life, 0)
    poll.poll(None if math.isinf(limit_s) else math.ceil(1000 * limit_s))
    with suppress(BlockingIOError):
        os.eventfd_read(wake)


def _hung_up(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))
