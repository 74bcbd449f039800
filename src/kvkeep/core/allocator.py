"""Allocates extents in one address space, such as the pool.

Knows nothing about the bytes behind an offset (memory or a file), keys, leases, or who asks. Not thread-safe: one
thread owns it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import NamedTuple, Protocol

from kvkeep.core.units import ALIGN_NBYTES

_SLACK = 64  # stale records that are not worth a clean-up


class Extent(NamedTuple):
    """Offset and length in an address space, both in bytes."""

    offset: int
    nbytes: int


class Allocator(Protocol):
    """Lends extents that never overlap, low addresses first, since memory is populated from there."""

    @property
    def free_nbytes(self) -> int:
        """Bytes that are not lent; holes may be too small for a request all the same."""
        ...

    @property
    def used_nbytes(self) -> int:
        """Bytes that are lent, rounding included."""
        ...

    def extent_nbytes(self, nbytes: int) -> int:
        """Bytes that an extent for nbytes takes."""
        ...

    def allocate(self, nbytes: int) -> Extent | None:
        """Lend an extent of extent_nbytes(nbytes) bytes; None: there is no room."""
        ...

    def free(self, extent: Extent) -> None:
        """Take a lent extent back; a double or foreign free is an AssertionError, also where asserts are off."""
        ...

    def grow(self, nbytes: int) -> None:
        """Append nbytes at the end of the address space."""
        ...


class FreeList:
    """Extents of any size: best fit, the lowest address among equal holes, split and coalesced at once.

    Holes are found by their two ends (dicts), and by size: a sorted list of the distinct sizes, and for each a
    heap of starts. A hole that its neighbour swallows leaves its start in a heap; that is dropped when it comes
    up, and the heaps are rebuilt before leavings outnumber the holes. allocate and free take O(log holes)
    amortised, an allocate that must fail O(log sizes). (Inserting into a plain list is linear, but distinct sizes
    grow only with the root of the space, and moving 64 KiB of pointers costs less than a tree.)
    """

    def __init__(self, nbytes: int = 0, alignment: int = ALIGN_NBYTES) -> None:
        if alignment.bit_count() != 1:
            raise ValueError(f"alignment {alignment} is no power of two")
        self._alignment = alignment
        self._nbytes = 0
        self._used_nbytes = 0
        self._lent: dict[int, int] = {}  # start -> nbytes
        self._holes: dict[int, int] = {}  # start -> nbytes
        self._hole_starts: dict[int, int] = {}  # end -> start
        self._sizes: list[int] = []  # distinct sizes, ascending
        self._starts: dict[int, list[int]] = {}  # size -> heap of starts, some of them stale
        self._listed = 0  # starts in all heaps
        if nbytes:
            self.grow(nbytes)

    @property
    def free_nbytes(self) -> int:
        """Bytes in holes."""
        return self._nbytes - self._used_nbytes

    @property
    def used_nbytes(self) -> int:
        """Bytes lent, in multiples of the alignment."""
        return self._used_nbytes

    def extent_nbytes(self, nbytes: int) -> int:
        """Round nbytes up to the alignment; the same object where that changes nothing (a million extents share it)."""
        if nbytes <= 0:
            raise ValueError(f"an extent holds at least one byte, not {nbytes}")
        rounded = (nbytes + self._alignment - 1) & -self._alignment
        return nbytes if rounded == nbytes else rounded

    def allocate(self, nbytes: int) -> Extent | None:
        """Lend the low end of the smallest hole that is large enough; None: there is none."""
        need = self.extent_nbytes(nbytes)
        sizes, holes = self._sizes, self._holes
        at = bisect_left(sizes, need)
        while at < len(sizes):
            size = sizes[at]
            starts = self._starts[size]
            while starts:
                start = heappop(starts)
                self._listed -= 1
                if holes.get(start) == size:
                    del holes[start], self._hole_starts[start + size]
                    if size > need:
                        self._add_hole(start + need, start + size)
                    self._lent[start] = need
                    self._used_nbytes += need
                    return Extent(start, need)
            del sizes[at], self._starts[size]  # only now: a size whose last hole is taken often comes back at once
        return None

    def free(self, extent: Extent) -> None:
        """Take extent back and merge it with the holes beside it."""
        start, nbytes = extent
        lent = self._lent.pop(start, None)
        if lent != nbytes:
            if lent is not None:
                self._lent[start] = lent
            raise AssertionError(f"free of {extent}, which is not lent (at this offset: {lent})")
        self._used_nbytes -= nbytes
        end = start + nbytes
        below = self._hole_starts.pop(start, None)
        if below is not None:
            del self._holes[below]
            start = below
        above = self._holes.pop(end, None)
        if above is not None:
            end += above  # its end is overwritten
        self._add_hole(start, end)

    def grow(self, nbytes: int) -> None:
        """Append nbytes, a positive multiple of the alignment; a hole at the end grows with it."""
        if self.extent_nbytes(nbytes) != nbytes:
            raise ValueError(f"cannot grow by {nbytes} bytes: not aligned")
        start = self._nbytes
        self._nbytes += nbytes
        self._lent[start] = nbytes
        self._used_nbytes += nbytes
        self.free(Extent(start, nbytes))

    def check(self) -> str:
        """Say why holes and lent extents do not tile the space, or a hole cannot be found; empty where all is well."""
        return next(self._problems(), "")

    def _problems(self) -> Iterator[str]:
        end, after_hole = 0, False
        for start, nbytes in sorted([*self._lent.items(), *self._holes.items()]):
            is_hole = start in self._holes
            if start != end:
                yield f"bytes {end} to {start} are lent twice or lost"
            if is_hole and after_hole:
                yield f"two holes meet at {start}"
            end, after_hole = start + nbytes, is_hole
        proofs = {
            f"the space ends at {self._nbytes}, its parts at {end}": end == self._nbytes,
            "used bytes do not add up": sum(self._lent.values()) == self._used_nbytes,
            "hole ends differ": self._hole_starts == {start + size: start for start, size in self._holes.items()},
            "a hole cannot be found": all(start in self._starts[size] for start, size in self._holes.items()),
            "sizes differ from heaps": self._sizes == sorted(self._starts),
            "listed starts do not add up": self._listed == sum(map(len, self._starts.values())),
        }
        yield from (problem for problem, holds in proofs.items() if not holds)

    def _add_hole(self, start: int, end: int) -> None:
        """Link the hole from start to end, which meets no other hole."""
        size = end - start
        self._holes[start] = size
        self._hole_starts[end] = start
        starts = self._starts.get(size)
        if starts is None:
            self._starts[size] = [start]
            insort(self._sizes, size)
        else:
            heappush(starts, start)
        self._listed += 1
        if self._listed + len(self._sizes) > 3 * len(self._holes) + _SLACK:
            self._relist()

    def _relist(self) -> None:
        """Build the index by size anew, without leavings."""
        self._starts = {}
        for start, size in self._holes.items():
            self._starts.setdefault(size, []).append(start)
        for starts in self._starts.values():
            heapify(starts)
        self._sizes = sorted(self._starts)
        self._listed = len(self._holes)
