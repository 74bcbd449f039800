"""The store's pool in this process: mapped when it comes, page-locked where a device copies by itself, and let go.

Knows nothing about plans, keys or copies. Every start of the store has a pool of its own. That of an earlier one is not
lent again, and is unmapped when its last lease ends; so is that of a store that has ended, for the next one needs its
room. Both go a moment later, since a plan may still name them. An engine's thread does none of that: to free a pool
takes 0.2 to 0.3 s a GiB.
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

LATE_S = 2.0  # a plan that was made before the planner knew of the store's end may come so much later
END_LIMIT_S = 5.0


class MappedPool:
    """Pools come through `door`, or by `put`; `pin_calls` page-lock each of them (None: nothing needs to).

    A thread takes what comes and lets go of what has ended, whether or not the engine makes steps. A pool is asked for
    `late_s` after its store has ended, or until the one that came after it is asked for.
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
        self._before: tuple[Pool, float] | None = (
            None  # the pool of before, and when it came to an end or was asked for
        )
        self._life = -1
        self._ended_s: float | None = None  # when the pool's store had ended, or the pool was last asked for since then
        self._unused: list[int] = []  # descriptors that the thread closes: one may be the last of a pool
        self._turn = threading.Lock()
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="kvkeep-mapped")
        self._thread.start()

    def put(self, handed: HandedPool, nbytes: int) -> None:
        """Maps a pool, and owns its descriptors from here on; KVKeepError unless it can be, and has `nbytes`."""
        with self._turn:
            self._swap(handed, nbytes)

    def has(self, boot: bytes) -> bool:
        """Whether that boot's pool is mapped."""
        with self._turn:
            return self._pool is not None and self._pool.boot == boot

    def lease(self, boot: bytes, offset: int, shard: ShardLayout, word: int = 0) -> Lease | None:
        """A lease on the shard at `offset` of that boot's pool, to be closed; None if that pool is not here.

        `word` is where its progress word is (0: it has none).
        """
        with self._turn:
            if self._pool is None or self._pool.boot != boot:
                self._look()  # it may have come a moment before the plan that names it
            if self._before is not None and self._before[0].boot == boot:
                self._before = (self._before[0], self._clock())
                return self._before[0].lease(offset, shard, word)
            if self._pool is None or self._pool.boot != boot:
                return None
            self._let_before_go()  # plans name the new one by now
            if self._ended_s is not None:
                self._ended_s = self._clock()
            return self._pool.lease(offset, shard, word)

    def close(self) -> None:
        """Closes the door and ends the mapping, for which it waits a moment; idempotent. Leases keep the mapping."""
        with self._turn:
            if self._closing:
                return
            self._closing = True
            pools = [pool for pool in (self._pool, self._before[0] if self._before is not None else None) if pool]
            self._let_go()
            self._let_before_go()
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
            with self._turn:
                self._look()
                left_s = self._left_s()
                if left_s == 0:
                    log.info("kvkeep: the store has ended: its pool is given back")
                    self._let_go()
                    left_s = math.inf
                left_s = min(left_s, self._before_left_s())
                unused, self._unused = self._unused, []
                life = self._life if self._ended_s is None else -1
                doors = self._door.fds if self._door is not None else []
                closing = self._closing
            close_all(unused)
            if closing:
                return
            _wait(self._wake, doors, life, left_s)

    def _look(self) -> None:
        """Takes what is at the door; the newest is mapped."""
        for handed in self._door.take() if self._door is not None and not self._closing else ():
            try:
                self._swap(handed)
            except KVKeepError as error:
                log.error("kvkeep: the pool cannot be used here: %s", error)

    def _left_s(self) -> float:
        """How long the pool is still asked for; 0: no more, infinite: its store lives."""
        if self._life < 0 or not _hung_up(self._life):
            return math.inf
        if self._ended_s is None:
            self._ended_s = self._clock()
        return max(0.0, self._ended_s + self._late_s - self._clock())

    def _before_left_s(self) -> float:
        """How long the pool of before is still asked for; infinite: there is none."""
        if self._before is None:
            return math.inf
        left_s = self._before[1] + self._late_s - self._clock()
        if left_s > 0:
            return left_s
        self._let_before_go()
        return math.inf

    def _swap(self, handed: HandedPool, nbytes: int | None = None) -> None:
        if self._closing:
            handed.close()
            return
        if self._pool is not None and self._pool.boot == handed.boot:
            self._unused += [handed.fd, handed.life]  # the same pool again: a session was resumed
        else:
            self._set_aside()
            self._life = handed.life
            self._pool = Pool(handed.boot, Region.attach(handed.fd, nbytes), self._pin_calls)
        self._wake_up()

    def _set_aside(self) -> None:
        """Another pool comes; a plan that was made before may still name the one that is here."""
        pool, self._pool = self._pool, None
        self._let_go()
        if pool is not None:
            self._let_before_go()
            self._before = (pool, self._clock())

    def _let_before_go(self) -> None:
        if self._before is not None:
            self._before[0].close()
            self._before = None

    def _let_go(self) -> None:
        """The pool is not lent any more; it ends with its last lease, on a thread of its own."""
        if self._pool is not None:
            self._pool.close()
        if self._life >= 0:
            self._unused.append(self._life)
        self._pool, self._life, self._ended_s = None, -1, None

    def _wake_up(self) -> None:
        os.eventfd_write(self._wake, 1)


def _wait(wake: int, readable: Iterable[int], life: int, limit_s: float) -> None:
    """Until one of these is readable, or `life` (-1: none) hung up, at most for `limit_s`; `wake` is drained."""
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
