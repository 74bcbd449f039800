"""Eviction by rank: least often used first, or most recently used first.

Knows nothing about sizes, costs or memory.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush

_SLACK = 64  # stale ranks that are not worth a clean-up
_STAMP_BITS = 48  # a million stamps a second last for nine years
_SLOT_BITS = 32
_SLOT = (1 << _SLOT_BITS) - 1


class Ranked:
    """A policy by rank: the visible key with the lowest rank goes first.

    `next_order(order, stamp)` computes a key's order when it is inserted (order is 0) and at each touch. Stamps rise by
    one a call from 1; no two keys may ever get the same order. A rank is order and slot in one int, where
    `_keys[slot]` is its key.

    Ranks lie in a heap from which nothing is deleted. A rank that its key no longer has is skipped when it comes up; a
    rank whose key is hidden leaves the heap until the key is shown; the heap is rebuilt before stale ranks outnumber
    the others. So each operation is O(log keys) amortised however many keys are hidden. Takes 110 to 180 bytes a key,
    the key not counted.
    """

    __slots__ = ("_free_slots", "_heap", "_hidden", "_keys", "_next_order", "_ranks", "_stamp")

    def __init__(self, next_order: Callable[[int, int], int]) -> None:
        self._next_order = next_order
        self._stamp = 0
        self._ranks: dict[bytes, int] = {}
        self._keys: list[bytes | None] = []  # slot -> key
        self._free_slots: list[int] = []
        self._heap: list[int] = []
        self._hidden: dict[bytes, bool] = {}  # is its rank still in the heap?

    def insert(self, key: bytes, nbytes: int, cost: float) -> None:
        """As `EvictionPolicy.insert`; size and cost change nothing."""
        if key in self._ranks:
            raise AssertionError(f"{key.hex()} is inserted twice")
        self._stamp += 1
        if self._free_slots:
            slot = self._free_slots.pop()
            self._keys[slot] = key
        else:
            slot = len(self._keys)
            self._keys.append(key)
        rank = self._ranks[key] = self._next_order(0, self._stamp) << _SLOT_BITS | slot
        self._offer(rank)

    def touch(self, key: bytes) -> None:
        """As `EvictionPolicy.touch`."""
        old = self._rank(key)
        self._stamp += 1
        rank = self._next_order(old >> _SLOT_BITS, self._stamp) << _SLOT_BITS | old & _SLOT
        self._ranks[key] = rank
        if key in self._hidden:
            self._hidden[key] = False
        else:
            self._offer(rank)

    def missed(self, key: bytes) -> None:
        """As `EvictionPolicy.missed`: nothing depends on it."""

    def remove(self, key: bytes) -> None:
        """As `EvictionPolicy.remove`."""
        self._hidden.pop(key, None)
        self._forget(key, self._rank(key))

    def set_hidden(self, key: bytes, hidden: bool) -> None:
        """As `EvictionPolicy.set_hidden`."""
        rank = self._rank(key)
        if (key in self._hidden) is hidden:
            raise AssertionError(f"{key.hex()} is {'hidden already' if hidden else 'not hidden'}")
        if hidden:
            self._hidden[key] = True
        elif not self._hidden.pop(key):
            self._offer(rank)

    def evict(self) -> bytes | None:
        """As `EvictionPolicy.evict`."""
        while len(self._ranks) > len(self._hidden):
            rank = heappop(self._heap)
            key = self._keys[rank & _SLOT]
            if key is None or self._ranks[key] != rank:
                continue
            if key not in self._hidden:
                self._forget(key, rank)
                return key
            self._hidden[key] = False
        return None

    def _rank(self, key: bytes) -> int:
        rank = self._ranks.get(key)
        if rank is None:
            raise AssertionError(f"{key.hex()} was never inserted")
        return rank

    def _offer(self, rank: int) -> None:
        heappush(self._heap, rank)
        if len(self._heap) > 2 * len(self._ranks) + _SLACK:
            self._heap = [rank for key, rank in self._ranks.items() if self._hidden.get(key, True)]
            heapify(self._heap)

    def _forget(self, key: bytes, rank: int) -> None:
        slot = rank & _SLOT
        self._keys[slot] = None
        self._free_slots.append(slot)
        del self._ranks[key]


def lfu() -> Ranked:
    """Evict what was touched least often (an insert counts as one), among those the least recent."""
    return Ranked(lambda order, stamp: (order >> _STAMP_BITS) + 1 << _STAMP_BITS | stamp)


def mru() -> Ranked:
    """Evict what was touched most recently."""
    return Ranked(lambda order, stamp: -stamp)
