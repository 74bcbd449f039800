"""Eviction in the order of a queue: first in, first out; or least recently used first.

Knows nothing about sizes, costs or memory.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Any

_SLACK = 64  # stale candidates that are not worth a clean-up
_MOST_ASIDE = 1024  # keys at a time: about 3 ms


class Queue:
    """A policy by one queue: keys enter at its end, and where `touch_moves` a touched key moves there again.

    The queue is a plain dict. It keeps the order of entry, but reading its head is slow: Python steps over every key
    that has left there. So `evict` takes many keys from the head at once and sets them aside, ranked in their order;
    all of them come before what is still in the queue. The visible ones become candidates at once, a hidden one when
    it is shown. Each operation is O(1) amortised however many keys are hidden, but for the heap of candidates. Takes
    42 to 60 bytes a key, the key not counted.
    """

    __slots__ = ("_aside", "_candidates", "_hidden", "_last", "_queue", "_touch_moves")

    def __init__(self, touch_moves: bool) -> None:
        self._touch_moves = touch_moves
        self._queue: dict[bytes, None] = {}
        self._hidden: set[bytes] = set()
        self._aside: dict[bytes, int] = {}  # key -> its rank; not in the queue
        self._last = 0  # the last rank given
        self._candidates: list[tuple[int, bytes]] = []  # heap of visible keys aside, and of some that were

    def insert(self, key: bytes, nbytes: int, cost: float) -> None:
        """As `EvictionPolicy.insert`; size and cost change nothing."""
        if key in self._queue or key in self._aside:
            raise AssertionError(f"{key.hex()} is inserted twice")
        self._queue[key] = None

    def touch(self, key: bytes) -> None:
        """As `EvictionPolicy.touch`."""
        if key in self._queue:
            home: dict[bytes, Any] = self._queue
        elif key in self._aside:
            home = self._aside
        else:
            raise AssertionError(f"{key.hex()} was never inserted")
        if self._touch_moves:
            del home[key]
            self._queue[key] = None

    def missed(self, key: bytes) -> None:
        """As `EvictionPolicy.missed`: nothing depends on it."""

    def remove(self, key: bytes) -> None:
        """As `EvictionPolicy.remove`."""
        self._hidden.discard(key)
        if key in self._queue:
            del self._queue[key]
        elif key in self._aside:
            del self._aside[key]
        else:
            raise AssertionError(f"{key.hex()} was never inserted")

    def set_hidden(self, key: bytes, hidden: bool) -> None:
        """As `EvictionPolicy.set_hidden`."""
        if not hidden:
            self._show(key)
        elif key in self._hidden or not (key in self._queue or key in self._aside):
            raise AssertionError(self._why_not(key))
        else:
            self._hidden.add(key)

    def evict(self) -> bytes | None:
        """As `EvictionPolicy.evict`."""
        aside, hidden = self._aside, self._hidden
        while len(self._queue) + len(aside) > len(hidden):
            while self._candidates:
                _, key = heappop(self._candidates)
                if key in aside and key not in hidden:
                    del aside[key]
                    return key
            self._set_aside()
        return None

    def _show(self, key: bytes) -> None:
        try:
            self._hidden.remove(key)
        except KeyError:
            raise AssertionError(self._why_not(key)) from None
        rank = self._aside.get(key)
        if rank is not None:
            heappush(self._candidates, (rank, key))
            if len(self._candidates) > 2 * len(self._aside) + _SLACK:
                self._candidates = [(rank, key) for key, rank in self._aside.items() if key not in self._hidden]
                heapify(self._candidates)

    def _set_aside(self) -> None:
        """Take keys from the queue's head; only while there is no candidate, whose rank would become stale."""
        for key in list(islice(self._queue, min(len(self._queue) // 64, _MOST_ASIDE) + _SLACK)):
            del self._queue[key]
            self._last += 1
            self._aside[key] = self._last
            if key not in self._hidden:
                self._candidates.append((self._last, key))  # a heap, since ranks rise

    def _why_not(self, key: bytes) -> str:
        """Say why a key can be neither hidden nor shown."""
        if key not in self._queue and key not in self._aside:
            return f"{key.hex()} was never inserted"
        return f"{key.hex()} is {'hidden already' if key in self._hidden else 'not hidden'}"


def fifo() -> Queue:
    """Evict what was inserted first."""
    return Queue(touch_moves=False)


def lru() -> Queue:
    """Evict what was touched least recently."""
    return Queue(touch_moves=True)
