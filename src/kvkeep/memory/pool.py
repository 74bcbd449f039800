"""The pool as a worker sees it: a mapping of the store's memory, used only through leases.

A plan names a chunk, and the pool lends the worker's part of it. Knows nothing about keys, sessions or who decides.
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
from kvkeep.memory.progress import Progress
from kvkeep.memory.progress import progress_at as progress_of
from kvkeep.memory.region import Region

Bytes = npt.NDArray[np.uint8]
POPULATE_PIECE_NBYTES = 16 << 20


class Lease:
    """The right to use one shard of one chunk until it is closed.

    `views` gives one uint8 array a range, padding included, in the layout's order. LeaseExpired after `close`.
    `pieces` are the offsets at which the memory's page-locked pieces begin; () where not all of it is page-locked.
    `progress` says how much of it has been read and may be used; None: all of it.
    """

    def __init__(
        self,
        memory: Bytes,
        shard: ShardLayout,
        pieces: tuple[int, ...] = (),
        ended: Callable[[], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._memory: Bytes | None = memory
        self._shard = shard
        self._ended = ended
        self.pieces = pieces
        self.progress = progress
        self._given_up = False

    def views(self, layers: range | None = None) -> list[Bytes]:
        """One writable view for each range, padding included; `layers` are the ranges' numbers (None: all)."""
        memory = self._memory
        if memory is None:
            raise LeaseExpired("this chunk's memory was given back")
        ranges = self._shard.chosen(layers)
        return [memory[range_.offset : range_.offset + range_.padded_nbytes] for range_ in ranges]

    @property
    def failed(self) -> bool:
        """Whether the store gave it up while it was still being read."""
        return self.progress.failed if self.progress is not None else self._given_up

    def close(self) -> None:
        """Ends the lease; idempotent. No copy may be under way in its memory."""
        ended, self._ended = self._ended, None
        self._given_up, self._memory, self.progress = self.failed, None, None
        if ended is not None:
            ended()  # last: whoever unmaps the memory meets no view of ours


class Pool:
    """The pool of one start of the store (`boot`), mapped into this process; with `pin_calls` page-locked as well.

    A thread of its own populates and locks it and, once it is closed and no lease is left, unlocks and unmaps it: both
    take a while, and a device may still be copying. `populated` is set when the thread has done what it could.
    """

    def __init__(self, boot: bytes, region: Region, pin_calls: PinCalls | None = None) -> None:
        self.boot = boot
        self.page_lock = PageLock(region.array.ctypes.data, region.nbytes, pin_calls) if pin_calls is not None else None
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

    def lease(self, offset: int, shard: ShardLayout, progress_at: int = 0) -> Lease:
        """As `lend`, for a use that outlives a block: the caller closes the lease.

        `progress_at` is the byte of its progress in the region (0: all of it is there). WireError for an offset outside
        of the pool. The mapping lives as long as its last lease.
        """
        if not 0 <= offset <= self._region.nbytes - shard.nbytes:
            raise WireError(f"offset {offset} is outside of the pool")
        with self._changed:
            if self._closing:
                raise LeaseExpired("the pool is closed")
            memory = self._region.array[offset : offset + shard.nbytes]
            progress = progress_of(self._region, progress_at) if progress_at else None
            self._leases += 1
        pieces = self.page_lock.pieces(offset, shard.nbytes) if self.page_lock is not None else ()
        return Lease(memory, shard, pieces, self._lease_ended, progress=progress)

    def close(self) -> None:
        """Gives no more leases; the mapping ends with the last one. Returns at once; idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def wait(self, limit_s: float) -> bool:
        """Waits at most `limit_s` for the mapping to end, unless leases are left; whether it has ended."""
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
        if self.page_lock is not None:
            self.page_lock.release()
        self._region.close()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _populate(self) -> None:
        """Fills this mapping's page table from its start, in pieces, without the interpreter's lock."""
        region = self._region
        for start in range(0, region.nbytes, POPULATE_PIECE_NBYTES):
            if self._closing:
                return
            try:
                end = min(start + POPULATE_PIECE_NBYTES, region.nbytes)
                region.populate(start, end - start)
            except ConfigError:
                return  # each page comes when it is touched first
            if self.page_lock is not None:
                self.page_lock.grow(end)
