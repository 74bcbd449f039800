"""The chunks that wait to be written to one tier, first come, first written; the pool evicts the first of them last.

They hold nothing: where the pool needs their room they go. Knows nothing about tiers, or when a chunk is written.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvkeep.core.index import Index


class Due(NamedTuple):
    """A chunk that waits: its key, its ranges, since when."""

    key: bytes
    sizes: Sequence[int]
    since_s: float


@dataclass(eq=False)
class DueChunks:
    """Of those that wait the first are spared, `most_spared_nbytes` in all: what is used most needs room as well."""

    index: Index
    most_spared_nbytes: int
    _due: OrderedDict[bytes, Due] = field(default_factory=OrderedDict)
    _spared: dict[bytes, int] = field(default_factory=dict)
    _spared_nbytes: int = 0
    _others: deque[bytes] = field(default_factory=deque)  # waiting ones that are not spared yet, and some that were

    def __len__(self) -> int:
        return len(self._due)

    @property
    def since_s(self) -> float:
        """How long the first one has been waiting; there must be one."""
        return next(iter(self._due.values())).since_s

    def add(self, due: Due) -> None:
        """One more; of one that waits already the place stays, and the pool may have made it anew."""
        self._unspare(due.key)
        self._due[due.key] = due
        self._others.append(due.key)
        self._spare()

    def pop(self) -> Due:
        """Takes the first one; there must be one."""
        _, due = self._due.popitem(last=False)
        self._unspare(due.key)
        self._spare()
        return due

    def clear(self) -> None:
        """Forgets all of them."""
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
