"""Orders keys by who is to be evicted first.

It knows NOTHING about sizes, memory, clocks, locks, or why a key is hidden.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Protocol

_SLACK = 64  # stale ranks that are not worth a clean-up
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
    """A policy by one queue: keys enter at its end, and where `touch_moves` a touched key enters it again.

    Nothing is taken out of the middle. A key's place is how many entered before it; what stands in the queue at
    another place than its key has is skipped when it comes up, and the queue is closed up before such places
    outnumber the others. A hidden key that comes up goes aside (_passed) and, once it is shown, before all that
    stand in the queue (_returned, by place). So each operation is O(1) amortised whatever is hidden, but for keys
    that were both passed and shown: O(log) of their number. Takes 80 to 110 bytes a key, the key not counted.
    """

    __slots__ = ("_first", "_passed", "_places", "_queue", "_returned", "_touch_moves", "_visible")

    def __init__(self, touch_moves: bool) -> None:
        self._touch_moves = touch_moves
        self._places: dict[bytes, int] = {}  # ~place (which is negative) while the key is hidden
        self._queue: deque[bytes] = deque()
        self._first = 0  # the place of the queue's head
        self._passed: dict[int, bytes] = {}  # place, below _first -> key
        self._returned: list[int] = []  # heap of places in _passed whose keys are visible, some of them stale
        self._visible = 0

    def insert(self, key: bytes) -> None:
        """Add a key that is not there yet, visible."""
        assert key not in self._places, f"{key.hex()} is inserted twice"
        self._visible += 1
        self._places[key] = self._first + len(self._queue)
        self._enter(key)

    def touch(self, key: bytes) -> None:
        """Count one use of a key, hidden or not."""
        held = self._held(key)
        if not self._touch_moves:
            return
        place = self._first + len(self._queue)
        if held < 0:
            self._places[key] = ~place
            held = ~held
        else:
            self._places[key] = place
        if held < self._first:
            del self._passed[held]
        self._enter(key)

    def remove(self, key: bytes) -> None:
        """Forget a key, hidden or not."""
        held = self._held(key)
        if held < 0:
            held = ~held
        else:
            self._visible -= 1
        if held < self._first:
            del self._passed[held]
        del self._places[key]

    def hide(self, key: bytes) -> None:
        """Take a visible key out of the candidates."""
        held = self._held(key)
        assert held >= 0, f"{key.hex()} is hidden already"
        self._places[key] = ~held
        self._visible -= 1

    def show(self, key: bytes) -> None:
        """Put a hidden key back at its place."""
        held = self._held(key)
        assert held < 0, f"{key.hex()} is not hidden"
        place = self._places[key] = ~held
        self._visible += 1
        if place < self._first:
            heappush(self._returned, place)
            if len(self._returned) > 2 * len(self._passed) + _SLACK:
                self._returned = [place for place, key in self._passed.items() if self._places[key] == place]
                heapify(self._returned)

    def evict(self) -> bytes | None:
        """Forget and return the first candidate; None: there is none."""
        while self._visible:
            if self._returned:
                place = heappop(self._returned)
                passed = self._passed.get(place)
                if passed is None or self._places[passed] != place:
                    continue
                del self._passed[place]
                key = passed
            else:
                key, place = self._queue.popleft(), self._first
                self._first += 1
                held = self._places.get(key)
                if held != place:
                    if held == ~place:
                        self._passed[place] = key
                    continue
            del self._places[key]
            self._visible -= 1
            return key
        return None

    def _held(self, key: bytes) -> int:
        """The place of a key, or ~place."""
        held = self._places.get(key)
        assert held is not None, f"{key.hex()} was never inserted"
        return held

    def _enter(self, key: bytes) -> None:
        """Put a key whose place is the end of the queue there."""
        self._queue.append(key)
        if len(self._queue) > 2 * len(self._places) + _SLACK:
            self._close_up()

    def _close_up(self) -> None:
        """Number all keys anew in their order, those that were passed first, and queue them without gaps."""
        order = [key for _, key in sorted(self._passed.items())]
        order += [key for place, key in enumerate(self._queue, self._first) if self._places.get(key) in (place, ~place)]
        self._places = {key: ~place if self._places[key] < 0 else place for place, key in enumerate(order)}
        self._queue = deque(order)
        self._first = 0
        self._passed, self._returned = {}, []


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
