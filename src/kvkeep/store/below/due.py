"""The queue of chunks to be written to one tier; the pool evicts the first of them last.

They are not pinned: if the pool has nothing else to evict, they go. Knows nothing about tiers, or when writes happen.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvkeep.core.index import Index


class Due(NamedTuple):
    """A chunk to be written: its key, the sizes of its ranges, and since when it waits."""

    key: bytes
    sizes: Sequence[int]
    since_s: float


@dataclass(eq=False)
class DueChunks:
    """The first chunks, up to `most_spared_nbytes`, are evicted last; not all, for chunks in use need room too."""

    index: Index
    most_spared_nbytes: int
    _due: OrderedDict[bytes, Due] = field(default_factory=OrderedDict)
    _spared: dict[bytes, int] = field(default_factory=dict)
    _spared_nbytes: int = 0
    _others: deque[bytes] = field(
        default_factory=deque
    )  # keys that are not spared yet, and some that were or have left

    def __len__(self) -> int:
        return len(self._due)

    @property
    def since_s(self) -> float:
        """Since when the first chunk waits; there must be one."""
        return next(iter(self._due.values())).since_s

    def add(self, due: Due) -> None:
        """Add a chunk at the end; one that waits already keeps its position, also if the pool has it anew."""
        self._unspare(due.key)
        self._due[due.key] = due
        self._others.append(due.key)
        self._spare()

    def pop(self) -> Due:
        """Remove and return the first chunk; there must be one."""
        _, due = self._due.popitem(last=False)
        self._unspare(due.key)
        self._spare()
        return due

    def clear(self) -> None:
        """Remove all chunks."""
        self._due.clear()
        self._others.clear()
        for key in list(self._spared):
            self._unspare(key)

    def _spare(self) -> None:
        while self._others:
            due = self._due.get(self._others[0])
            nbytes = sum(due.sizes) if due is not None else 0
            if self._spared_nbytes + nbytes > self.most_spared_nbytes:
                return
            self._others.popleft()
            if due is not None and due.key not in self._spared and self.index.spare(due.key):
                self._spared[due.key] = nbytes
                self._spared_nbytes += nbytes

    def _unspare(self, key: bytes) -> None:
        nbytes = self._spared.pop(key, None)
        if nbytes is not None:
            self._spared_nbytes -= nbytes
            self.index.unspare(key)
