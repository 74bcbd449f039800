"""Orders keys by who is to be evicted first.

It knows NOTHING about sizes, memory, clocks, locks, or why a key is hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Protocol

_SLACK = 64  # stale ranks that are not worth a clean-up
_STAMP_BITS = 48  # a million stamps a second last for nine years
_HIDDEN = 1
_ORDER_SHIFT = 32
_SLOT_AND_HIDDEN = (1 << _ORDER_SHIFT) - 1


class EvictionPolicy(Protocol):
    """An order over keys. A hidden key keeps its place (and may be touched or removed) but is not evicted."""

    def insert(self, key: bytes) -> None:
        """Add a key that is not there yet, visible."""
        ...

    def touch(self, key: bytes) -> None:
        """Count one use of a key, hidden or not."""
        ...

    def remove(self, key: bytes) -> None:
        """Forget a key, hidden or not."""
        ...

    def hide(self, key: bytes) -> None:
        """Take a visible key out of the candidates."""
        ...

    def show(self, key: bytes) -> None:
        """Put a hidden key back at its place."""
        ...

    def evict(self) -> bytes | None:
        """Forget and return the first candidate; None: there is none."""
        ...


class Ranked:
    """A policy by rank: the visible key with the lowest rank goes first.

    next_order(order, stamp) gives a key's order when it is inserted (order is 0) and at each touch; stamps rise
    by one a call from 1, and no two keys may ever get the same order. A rank is (order, slot, hidden) in one
    number, where _keys[slot] is its key. The ranks of visible keys are in a heap from which nothing is deleted: a
    rank that its key no longer has is skipped when it comes up, and the heap is rebuilt before such ranks
    outnumber the others. So each operation is O(log keys) amortised whatever is hidden, and O(1) where orders
    rise, as with fifo and lru. Takes 100 to 180 bytes a key, the key not counted.
    """

    __slots__ = ("_free_slots", "_heap", "_keys", "_next_order", "_ranks", "_stamp", "_visible")

    def __init__(self, next_order: Callable[[int, int], int]) -> None:
        self._next_order = next_order
        self._stamp = 0
        self._ranks: dict[bytes, int] = {}
        self._keys: list[bytes | None] = []  # slot -> key
        self._free_slots: list[int] = []
        self._heap: list[int] = []
        self._visible = 0

    def insert(self, key: bytes) -> None:
        """Add a key that is not there yet, visible."""
        assert key not in self._ranks, f"{key.hex()} is inserted twice"
        self._stamp += 1
        if self._free_slots:
            slot = self._free_slots.pop()
            self._keys[slot] = key
        else:
            slot = len(self._keys)
            self._keys.append(key)
        rank = self._next_order(0, self._stamp) << _ORDER_SHIFT | slot << 1
        self._visible += 1
        self._offer(key, rank)

    def touch(self, key: bytes) -> None:
        """Count one use of a key, hidden or not."""
        old = self._rank(key)
        self._stamp += 1
        order = old >> _ORDER_SHIFT
        touched = self._next_order(order, self._stamp)
        if touched == order:
            return
        rank = touched << _ORDER_SHIFT | old & _SLOT_AND_HIDDEN
        if rank & _HIDDEN:
            self._ranks[key] = rank
        else:
            self._offer(key, rank)

    def remove(self, key: bytes) -> None:
        """Forget a key, hidden or not."""
        rank = self._rank(key)
        if not rank & _HIDDEN:
            self._visible -= 1
        self._forget(key, rank)

    def hide(self, key: bytes) -> None:
        """Take a visible key out of the candidates."""
        rank = self._rank(key)
        assert not rank & _HIDDEN, f"{key.hex()} is hidden already"
        self._ranks[key] = rank | _HIDDEN
        self._visible -= 1

    def show(self, key: bytes) -> None:
        """Put a hidden key back at its place."""
        rank = self._rank(key)
        assert rank & _HIDDEN, f"{key.hex()} is not hidden"
        self._visible += 1
        self._offer(key, rank ^ _HIDDEN)

    def evict(self) -> bytes | None:
        """Forget and return the first candidate; None: there is none."""
        while self._visible:
            rank = heappop(self._heap)
            key = self._keys[(rank & _SLOT_AND_HIDDEN) >> 1]
            if key is not None and self._ranks[key] == rank:
                self._visible -= 1
                self._forget(key, rank)
                return key
        return None

    def _rank(self, key: bytes) -> int:
        rank = self._ranks.get(key)
        assert rank is not None, f"{key.hex()} was never inserted"
        return rank

    def _offer(self, key: bytes, rank: int) -> None:
        self._ranks[key] = rank
        heappush(self._heap, rank)
        if len(self._heap) > 2 * self._visible + _SLACK:
            self._heap = [rank for rank in self._ranks.values() if not rank & _HIDDEN]
            heapify(self._heap)

    def _forget(self, key: bytes, rank: int) -> None:
        slot = (rank & _SLOT_AND_HIDDEN) >> 1
        self._keys[slot] = None
        self._free_slots.append(slot)
        del self._ranks[key]


def fifo() -> Ranked:
    """Evict what was inserted first."""
    return Ranked(lambda order, stamp: order or stamp)


def lru() -> Ranked:
    """Evict what was touched least recently."""
    return Ranked(lambda order, stamp: stamp)


def lfu() -> Ranked:
    """Evict what was touched least often (an insert counts as one), among those the least recent."""
    return Ranked(lambda order, stamp: (order >> _STAMP_BITS) + 1 << _STAMP_BITS | stamp)


def mru() -> Ranked:
    """Evict what was touched most recently."""
    return Ranked(lambda order, stamp: -stamp)


def policy_by_name(name: str) -> EvictionPolicy:
    """Make the policy of that name, upper or lower case; ValueError names the known ones."""
    known: dict[str, Callable[[], EvictionPolicy]] = {"fifo": fifo, "lfu": lfu, "lru": lru, "mru": mru}
    make = known.get(name.lower())
    if make is None:
        raise ValueError(f"no eviction policy {name!r}: choose one of {', '.join(known)}")
    return make()
