"""Progress of chunks that are still being read: how much of each may be used. An aligned uint32 each, behind the pool.

The store writes them and workers read them; no message is sent. The number counts the chunk's ranges, from the first
on, that are read and verified; FAILED is for good. Knows nothing about tiers, leases or who waits.

An aligned uint32 is read and written in one piece. What it counts was written before it, and is read after it: a
processor that does not keep this order by itself (x86 does) keeps it across a lock that is released and taken again.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from kvkeep.core.layout import padded_nbytes
from kvkeep.errors import WireError
from kvkeep.memory.region import Region

TABLE_NBYTES = 4096
FAILED = 0xFFFFFFFF
_NBYTES = 4

U32 = npt.NDArray[np.uint32]


def region_nbytes(pool_nbytes: int) -> int:
    """The size of a pool with the progress table behind it."""
    return padded_nbytes(pool_nbytes) + TABLE_NBYTES


class ProgressWriter:
    """One chunk's progress, as the store writes it; `offset` is its byte in the region.

    Any thread may report at any time, also late: the number never falls, and is not touched once `end` was called.
    """

    def __init__(self, number: U32, offset: int, lock: threading.Lock) -> None:
        self.offset = offset
        self._number: U32 | None = number
        self._lock = lock
        number[0] = 0

    @property
    def failed(self) -> bool:
        """Whether `fail` was called, and `end` was not."""
        return self._number is not None and int(self._number[0]) == FAILED

    def advance(self, ranges: int) -> None:
        """The first `ranges` ranges are in their memory and verified, and stay there until `end`."""
        with self._lock:
            pass  # what is counted is written by now; see the module
        self._raise(ranges)

    def fail(self) -> None:
        """Nothing more of this chunk may be used."""
        self._raise(FAILED)

    def end(self) -> None:
        """Frees the number; later `advance` and `fail` are ignored."""
        with self._lock:
            self._number = None

    def _raise(self, value: int) -> None:
        with self._lock:
            if self._number is not None and value > int(self._number[0]):
                self._number[0] = value


class ProgressTable:
    """The store's numbers: `memory` (the whole region) from byte `start` on."""

    def __init__(self, memory: npt.NDArray[np.uint8], start: int) -> None:
        self._numbers: U32 = memory[start:].view(np.uint32)
        self._start = start
        self._free = list(range(len(self._numbers)))
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        """How many numbers are free."""
        return len(self._free)

    def take(self) -> ProgressWriter:
        """A free number, set to 0; there must be one."""
        index = self._free.pop()
        return ProgressWriter(self._numbers[index : index + 1], self._start + index * _NBYTES, self._lock)

    def give_back(self, writer: ProgressWriter) -> None:
        """Frees a number that nobody looks at any more."""
        writer.end()
        self._free.append((writer.offset - self._start) // _NBYTES)


def table_of(region: Region) -> ProgressTable:
    """The progress table of a store's region."""
    return ProgressTable(region.array, region.nbytes - TABLE_NBYTES)


class Progress:
    """One chunk's progress, as a worker reads it."""

    def __init__(self, number: U32) -> None:
        self._number = number
        self._lock = threading.Lock()

    @property
    def failed(self) -> bool:
        """Whether the chunk will not come, or not in time."""
        return self._value() == FAILED

    def has(self, ranges: int) -> bool:
        """Whether the first `ranges` ranges may be used."""
        return ranges <= self._value() < FAILED

    def _value(self) -> int:
        value = int(self._number[0])
        for _ in range(2):  # what is read of the chunk after this was not read before; see the module
            with self._lock:
                pass
        return value


def progress_at(region: Region, offset: int) -> Progress:
    """The progress at byte `offset` of a store's region; WireError if there is none."""
    start = region.nbytes - TABLE_NBYTES
    if not start <= offset < region.nbytes or offset % _NBYTES:
        raise WireError(f"byte {offset} is outside of the progress table")
    return Progress(region.array[offset : offset + _NBYTES].view(np.uint32))
