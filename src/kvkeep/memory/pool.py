"""The pool as a worker sees it: a mapping of the store's memory, touched only through leases.

Knows nothing about keys, sessions or who decides; it lends the part of a chunk that a plan names.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from kvkeep.core.layout import ShardLayout
from kvkeep.errors import ConfigError, LeaseExpired, WireError
from kvkeep.memory.page_lock import PageLock, PinCalls
from kvkeep.memory.progress import Arrival, arrival_at
from kvkeep.memory.region import Region

Bytes = npt.NDArray[np.uint8]
POPULATE_PIECE_NBYTES = 16 << 20


class Lease:
    """The right to use one shard of one chunk until it is closed.

    `views` gives one uint8 array a range, padding included, in the layout's order. LeaseExpired after `close`.
    `pieces` are the offsets at which the memory's page-locked pieces begin; () where not all of it is page-locked.
    `arrival` says how much of it may be used yet; None: all.
    """

    def __init__(
        self,
        memory: Bytes,
        shard: ShardLayout,
        pieces: tuple[int, ...] = (),
        ended: Callable[[], None] | None = None,
        arrival: Arrival | None = None,
    ) -> None:
        self._memory: Bytes | None = memory
        self._shard = shard
        self._ended = ended
        self.pieces = pieces
        self.arrival = arrival
        self._given_up = False

    def views(self, layers: range | None = None) -> list[Bytes]:
        """One writable view a range (with its padding); `layers` are numbers of ranges, None all of them."""
        memory = self._memory
        if memory is None:
            raise LeaseExpired("this chunk's memory was given back")
        return [memory[one.offset : one.offset + one.padded_nbytes] for one in self._shard.chosen(layers)]

    @property
    def failed(self) -> bool:
        """Whether it was given up by whoever still filled it."""
        return self.arrival.failed if self.arrival is not None else self._given_up

    def close(self) -> None:
        """Ends the lease; idempotent. No copy may be under way in its memory."""
        ended, self._ended = self._ended, None
        self._given_up, self._memory, self.arrival = self.failed, None, None
        if ended is not None:
            ended()  # last: whoever unmaps the memory meets no view of ours


class Pool:
    """The store's pool mapped into this process; `boot` says of which start of the store.

    With `pin_calls` it is page-locked as well, as it is populated. It has a thread of its own, which populates it and,
    once it is closed and no lease is left, unlocks and unmaps it: either takes a while, and a device may still be
    copying. `populated` is set when it has done what it could.
    """

    def __init__(self, boot: bytes, region: Region, pin_calls: PinCalls | None = None) -> None:
        self.boot = boot
        self.pin = PageLock(region.array.ctypes.data, region.nbytes, pin_calls) if pin_calls is not None else None
        self._region = region
        self._changed = threading.Condition()
        self._closing = False
        self._ended = False
        self._leases = 0
        self.populated = threading.Event()
        threading.Thread(target=self._live, daemon=True, name="kvkeep-pool").start()

    @property
    def nbytes(self) -> int:
        """The pool's size."""
        return self._region.nbytes

    @contextmanager
    def lend(self, offset: int, shard: ShardLayout) -> Iterator[Lease]:
        """A lease on the shard whose bytes start at `offset` of the pool, closed with the block."""
        lease = self.lease(offset, shard)
        try:
            yield lease
        finally:
            lease.close()

    def lease(self, offset: int, shard: ShardLayout, word: int = 0) -> Lease:
        """The same for a use that outlives a block: whoever takes it closes it.

        `word` is where its progress word is (0: it has none). WireError for an offset outside of the pool. The
        mapping lives as long as its last lease.
        """
        if not 0 <= offset <= self._region.nbytes - shard.nbytes:
            raise WireError(f"offset {offset} is outside of the pool")
        with self._changed:
            if self._closing:
                raise LeaseExpired("the pool is closed")
            memory = self._region.array[offset : offset + shard.nbytes]
            arrival = arrival_at(self._region, word) if word else None
            self._leases += 1
        pieces = self.pin.pieces(offset, shard.nbytes) if self.pin is not None else ()
        return Lease(memory, shard, pieces, self._lease_ended, arrival)

    def close(self) -> None:
        """No lease is given any more; the mapping ends with the last one. Returns at once; idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def wait(self, limit_s: float) -> bool:
        """Waits at most `limit_s` for the end of the mapping, and not for leases; whether it has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._leases, limit_s)
            return self._ended

    def _lease_ended(self) -> None:
        with self._changed:
            self._leases -= 1
            self._changed.notify_all()

    def _live(self) -> None:
        self._populate()
        self.populated.set()
        with self._changed:
            self._changed.wait_for(lambda: self._closing and not self._leases)
        if self.pin is not None:
            self.pin.release()
        self._region.close()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _populate(self) -> None:
        """Fills this mapping's page table from the low end, in pieces and without the interpreter's lock."""
        region = self._region
        for start in range(0, region.nbytes, POPULATE_PIECE_NBYTES):
            if self._closing:
                return
            try:
                end = min(start + POPULATE_PIECE_NBYTES, region.nbytes)
                region.populate(start, end - start)
            except ConfigError:
                return  # the pages come one by one then, when they are touched
            if self.pin is not None:
                self.pin.grow(end)
