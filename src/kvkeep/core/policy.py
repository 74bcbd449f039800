"""Orders keys by who is to be evicted first.

It knows NOTHING about sizes, memory, clocks, locks, or why a key is hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Protocol

_SLACK = 64  # stale ranks that are not worth a clean-up
_MOST_ASIDE = 1024  # keys at a time: about 3 ms
_STAMP_BITS = 48  # a million stamps a second last for nine years
_SLOT_BITS = 32
_SLOT = (1 << _SLOT_BITS) - 1


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


class Queue:
    """A policy by one queue: keys enter at its end, and where `touch_moves` a touched key moves there again.

    The queue is a plain dict, which keeps the order of entry and is quick but for its head, since what has left there
    is skipped at each look. So evict looks there for many keys at a time: they go aside, numbered in the order of
    their places, which are before all that are still in the queue; the visible ones become candidates, and a
    hidden one does when it is shown. Each operation is O(1) amortised whatever is hidden, but for the heap of
    candidates. Takes 42 to 60 bytes a key, the key not counted.
    """

    __slots__ = ("_aside", "_candidates", "_hidden", "_last", "_queue", "_touch_moves")

    def __init__(self, touch_moves: bool) -> None:
        self._touch_moves = touch_moves
        self._queue: dict[bytes, None] = {}
        self._hidden: set[bytes] = set()
        self._aside: dict[bytes, int] = {}  # key -> its number; not in the queue
        self._last = 0  # number given
        self._candidates: list[tuple[int, bytes]] = []  # heap of visible keys aside, and of some that were

    def insert(self, key: bytes) -> None:
        """Add a key that is not there yet, visible."""
        assert key not in self._queue, f"{key.hex()} is inserted twice"
        assert key not in self._aside, f"{key.hex()} is inserted twice"
        self._queue[key] = None

    def touch(self, key: bytes) -> None:
        """Count one use of a key, hidden or not."""
        home = self._queue if key in self._queue else self._aside
        assert key in home, f"{key.hex()} was never inserted"
        if self._touch_moves:
            del home[key]
            self._queue[key] = None

    def remove(self, key: bytes) -> None:
        """Forget a key, hidden or not."""
        self._hidden.discard(key)
        if key in self._queue:
            del self._queue[key]
        else:
            assert key in self._aside, f"{key.hex()} was never inserted"
            del self._aside[key]

    def hide(self, key: bytes) -> None:
        """Take a visible key out of the candidates."""
        assert key in self._queue or key in self._aside, f"{key.hex()} was never inserted"
        assert key not in self._hidden, f"{key.hex()} is hidden already"
        self._hidden.add(key)

    def show(self, key: bytes) -> None:
        """Put a hidden key back at its place."""
        if key not in self._hidden:
            assert key in self._queue or key in self._aside, f"{key.hex()} was never inserted"
            raise AssertionError(f"{key.hex()} is not hidden")
        self._hidden.remove(key)
        number = self._aside.get(key)
        if number is not None:
            heappush(self._candidates, (number, key))
            if len(self._candidates) > 2 * len(self._aside) + _SLACK:
                self._candidates = [(number, key) for key, number in self._aside.items() if key not in self._hidden]
                heapify(self._candidates)

    def evict(self) -> bytes | None:
        """Forget and return the first candidate; None: there is none."""
        aside, hidden = self._aside, self._hidden
        while len(self._queue) + len(aside) > len(hidden):
            while self._candidates:
                _, key = heappop(self._candidates)
                if key in aside and key not in hidden:
                    del aside[key]
                    return key
            self._set_aside()
        return None

    def _set_aside(self) -> None:
        """Take keys from the queue's head; only while there is no candidate, whose number would become stale."""
        for key in list(islice(self._queue, min(len(self._queue) // 64, _MOST_ASIDE) + _SLACK)):
            del self._queue[key]
            self._last += 1
            self._aside[key] = self._last
            if key not in self._hidden:
                self._candidates.append((self._last, key))  # a heap, since numbers rise


class Ranked:
    """A policy by rank: the visible key with the lowest rank goes first.

    next_order(order, stamp) gives a key's order when it is inserted (order is 0) and at each touch; stamps rise
    by one a call from 1, and no two keys may ever get the same order. A rank is order and slot in one number, where
    _keys[slot] is its key. Ranks are in a heap from which nothing is deleted: one that its key no longer has is
    skipped when it comes up, one whose key is hidden goes aside until the key is shown, and the heap is rebuilt
    before stale ranks outnumber the others. So each operation is O(log keys) amortised whatever is hidden. Takes 110
    to 180 bytes a key, the key not counted.
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
        rank = self._ranks[key] = self._next_order(0, self._stamp) << _SLOT_BITS | slot
        self._offer(rank)

    def touch(self, key: bytes) -> None:
        """Count one use of a key, hidden or not."""
        old = self._rank(key)
        self._stamp += 1
        rank = self._next_order(old >> _SLOT_BITS, self._stamp) << _SLOT_BITS | old & _SLOT
        self._ranks[key] = rank
        if key in self._hidden:
            self._hidden[key] = False
        else:
            self._offer(rank)

    def remove(self, key: bytes) -> None:
        """Forget a key, hidden or not."""
        self._hidden.pop(key, None)
        self._forget(key, self._rank(key))

    def hide(self, key: bytes) -> None:
        """Take a visible key out of the candidates."""
        self._rank(key)
        assert key not in self._hidden, f"{key.hex()} is hidden already"
        self._hidden[key] = True

    def show(self, key: bytes) -> None:
        """Put a hidden key back at its place."""
        rank = self._rank(key)
        assert key in self._hidden, f"{key.hex()} is not hidden"
        if not self._hidden.pop(key):
            self._offer(rank)

    def evict(self) -> bytes | None:
        """Forget and return the first candidate; None: there is none."""
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
        assert rank is not None, f"{key.hex()} was never inserted"
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


def fifo() -> Queue:
    """Evict what was inserted first."""
    return Queue(touch_moves=False)


def lru() -> Queue:
    """Evict what was touched least recently."""
    return Queue(touch_moves=True)


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
