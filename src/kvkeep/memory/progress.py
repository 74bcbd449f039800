"""Progress words: how much of a chunk that is still being read may be used; an aligned uint32 each, behind the pool.

The store writes them, workers read them; no message is sent for it. A word counts the chunk's ranges, from the first
on, that are read and verified; FAILED is for good. Knows nothing about chunks, tiers, leases or who waits.

An aligned word is read and written in one piece. What it counts was written before it, and is read after it: a
processor that does not keep this order by itself (x86 does) keeps it across a lock that is given back and taken again.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from kvkeep.core.layout import padded_nbytes
from kvkeep.errors import WireError
from kvkeep.memory.region import Region

WORDS_NBYTES = 4096
FAILED = 0xFFFFFFFF
_WORD_NBYTES = 4

U32 = npt.NDArray[np.uint32]


def region_nbytes(pool_nbytes: int) -> int:
    """What a pool takes with the words behind it."""
    return padded_nbytes(pool_nbytes) + WORDS_NBYTES


class Word:
    """One chunk's word, as the store sees it; `offset` is where it is in the region.

    Any thread may tell it anything at any time, also late: it never goes back, and once given back it is not touched.
    """

    def __init__(self, word: U32, offset: int, turn: threading.Lock) -> None:
        self.offset = offset
        self._word: U32 | None = word
        self._turn = turn
        word[0] = 0

    @property
    def failed(self) -> bool:
        """Whether it said so, and was not given back since."""
        return self._word is not None and int(self._word[0]) == FAILED

    def advance(self, ranges: int) -> None:
        """The first `ranges` ranges are in their memory and verified, and stay there until the word is given back."""
        with self._turn:
            pass  # what it counts is written by now; see the module
        self._raise(ranges)

    def fail(self) -> None:
        """Nothing more of this chunk may be used."""
        self._raise(FAILED)

    def end(self) -> None:
        """It is given back: what is still told is told to nobody."""
        with self._turn:
            self._word = None

    def _raise(self, value: int) -> None:
        with self._turn:
            if self._word is not None and value > int(self._word[0]):
                self._word[0] = value


class Words:
    """The store's words: those in `memory` (the whole region) from byte `start` on, if there are any."""

    def __init__(self, memory: npt.NDArray[np.uint8], start: int) -> None:
        self._words: U32 = memory[start:].view(np.uint32)
        self._start = start
        self._free = list(range(len(self._words)))
        self._turn = threading.Lock()

    @property
    def free(self) -> int:
        """How many can be taken."""
        return len(self._free)

    def take(self) -> Word:
        """A word that nobody has, at 0; there must be one."""
        number = self._free.pop()
        return Word(self._words[number : number + 1], self._start + number * _WORD_NBYTES, self._turn)

    def give_back(self, word: Word) -> None:
        """The word may be taken again: nobody looks at it any more."""
        word.end()
        self._free.append((word.offset - self._start) // _WORD_NBYTES)


def words_behind(region: Region) -> Words:
    """The words of a store's region."""
    return Words(region.array, region.nbytes - WORDS_NBYTES)


class Arrival:
    """One chunk's word, as a worker sees it."""

    def __init__(self, word: U32) -> None:
        self._word = word
        self._turn = threading.Lock()

    @property
    def failed(self) -> bool:
        """Whether the chunk will not come, or not in time."""
        return self._value() == FAILED

    def has(self, ranges: int) -> bool:
        """Whether the first `ranges` ranges may be used."""
        return ranges <= self._value() < FAILED

    def _value(self) -> int:
        value = int(self._word[0])
        for _ in range(2):  # what is read of the chunk after this was not read before; see the module
            with self._turn:
                pass
        return value


def arrival_at(region: Region, offset: int) -> Arrival:
    """The word at `offset` of a store's region; WireError if there is none."""
    start = region.nbytes - WORDS_NBYTES
    if not start <= offset < region.nbytes or offset % _WORD_NBYTES:
        raise WireError(f"byte {offset} is no progress word")
    return Arrival(region.array[offset : offset + _WORD_NBYTES].view(np.uint32))
