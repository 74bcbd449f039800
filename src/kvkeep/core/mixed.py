"""Allocators made of allocators: whole chunks beside other sizes, and a space that grows only as it is needed.

Knows nothing about the bytes behind an offset or about who asks. Not thread-safe: one thread owns it.
"""

from __future__ import annotations

from kvkeep.core.allocator import Allocator, Extent, FreeList
from kvkeep.core.units import ALIGN_NBYTES


class Mixed:
    """One space for whole chunks of `slot_nbytes` and for extents of other sizes.

    A free list lends both, but a whole chunk that comes back is kept as it is and lent again in O(1), last in, first
    out. Only when another size finds no hole are the idle chunks merged with the holes beside them. So no byte is set
    aside for either kind; each merge was paid for by a free.
    """

    def __init__(self, slot_nbytes: int, nbytes: int = 0, alignment: int = ALIGN_NBYTES) -> None:
        self._list = FreeList(nbytes, alignment)
        self._slot_nbytes = self._list.extent_nbytes(slot_nbytes)
        self._idle: dict[int, Extent] = {}  # offset -> a slot that the list lends, but we do not

    @property
    def free_nbytes(self) -> int:
        """Bytes in holes and idle slots."""
        return self._list.free_nbytes + len(self._idle) * self._slot_nbytes

    @property
    def used_nbytes(self) -> int:
        """Bytes lent, in multiples of the alignment."""
        return self._list.used_nbytes - len(self._idle) * self._slot_nbytes

    def extent_nbytes(self, nbytes: int) -> int:
        """Round nbytes up to the alignment; what comes to a slot's size is a slot."""
        return self._list.extent_nbytes(nbytes)

    def allocate(self, nbytes: int) -> Extent | None:
        """Lend an idle slot, or the low end of the smallest hole that is large enough; None: there is no room."""
        size = self._list.extent_nbytes(nbytes)
        if size == self._slot_nbytes and self._idle:
            return self._idle.popitem()[1]
        extent = self._list.allocate(size)
        if extent is None and self._idle:
            for idle in self._idle.values():
                self._list.free(idle)
            self._idle.clear()
            extent = self._list.allocate(size)
        return extent

    def free(self, extent: Extent) -> None:
        """Take a lent extent back; a double or foreign free is an assertion."""
        if extent.offset in self._idle:
            raise AssertionError(f"free of {extent}, which is not lent")
        if extent.nbytes != self._slot_nbytes:
            self._list.free(extent)
            return
        if not self._list.lends(extent):
            raise AssertionError(f"free of {extent}, which is not lent")
        self._idle[extent.offset] = extent

    def grow(self, nbytes: int) -> None:
        """Append nbytes, a positive multiple of the alignment."""
        self._list.grow(nbytes)

    def check(self) -> str:
        """Say why the list does not add up, or which idle slot is none that it lends; empty where all is well."""
        for offset, extent in self._idle.items():
            if extent != (offset, self._slot_nbytes) or not self._list.lends(extent):
                return f"{extent} is idle, but no slot at {offset} that is lent"
        return self._list.check()


class SlotSteps:
    """An allocator whose space grows by steps, up to `limit_nbytes`, when it has no room: never before.

    What is not grown yet counts as free, so nobody evicts for what a step would give. `nbytes` is how far the space
    reaches now: what lies above has never been lent, so it need not be populated.
    """

    def __init__(self, inner: Allocator, step_nbytes: int, limit_nbytes: int) -> None:
        if inner.free_nbytes + inner.used_nbytes:
            raise ValueError("the space below the first step is not empty")
        if not 0 < step_nbytes <= limit_nbytes:
            raise ValueError(f"steps of {step_nbytes} bytes up to {limit_nbytes}")
        self._inner = inner
        self._step_nbytes = step_nbytes
        self._limit_nbytes = limit_nbytes
        self.nbytes = 0

    @property
    def free_nbytes(self) -> int:
        """Bytes that are not lent, those that are still to come included."""
        return self._limit_nbytes - self._inner.used_nbytes

    @property
    def used_nbytes(self) -> int:
        """Bytes that are lent."""
        return self._inner.used_nbytes

    def extent_nbytes(self, nbytes: int) -> int | None:
        """Bytes that an extent for nbytes takes; None: no extent can ever hold them."""
        return self._inner.extent_nbytes(nbytes)

    def allocate(self, nbytes: int) -> Extent | None:
        """Lend an extent, after as many steps as it takes; None: there is no room below the limit."""
        size = self._inner.extent_nbytes(nbytes)
        if size is None or size > self.free_nbytes:
            return None
        while (extent := self._inner.allocate(size)) is None and self.nbytes < self._limit_nbytes:
            step = min(self._step_nbytes, self._limit_nbytes - self.nbytes)
            self._inner.grow(step)
            self.nbytes += step
        return extent

    def free(self, extent: Extent) -> None:
        """Take a lent extent back; a double or foreign free is an assertion."""
        self._inner.free(extent)

    def grow(self, nbytes: int) -> None:
        """Move the limit up by nbytes."""
        if nbytes <= 0:
            raise ValueError(f"cannot grow by {nbytes} bytes")
        self._limit_nbytes += nbytes
