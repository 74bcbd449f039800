"""A chunk that is lent while a tier still reads it: a word says how much of it may be used.

Whatever becomes of the read, the memory stays as it is until every lease on it has ended. Knows nothing about tiers,
requests or time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvkeep.core.index import Index, IndexEntry
from kvkeep.memory.progress import ProgressWriter


@dataclass(eq=False)
class Early:
    """`entry` is being read, `ranges` ranges in all; `leases` hold it. `give_back` takes its word in the end."""

    entry: IndexEntry
    ranges: int
    word: ProgressWriter
    give_back: Callable[[ProgressWriter], None]
    leases: int = 0
    _reading: bool = True
    _pinned: bool = False

    def told(self, entry: IndexEntry | None) -> None:
        """It is readable, or it does not come (in time): then nobody may use the rest of it."""
        if entry is None:
            self.word.fail()

    def late(self) -> None:
        """Whoever has waited until now does not wait any longer."""
        if self._reading:
            self.word.fail()

    def settle(self, index: Index, sums: bytes | None) -> bool:
        """The tier is done with its memory; whether it is readable now. If not, those who hold it keep the memory."""
        self._reading = False
        key = self.entry.key
        readable = sums is not None and self.entry in index.writing([key])  # else it was cleared meanwhile
        if readable:
            index.commit(self.entry, sums or b"")
            for _ in range(self.leases):
                index.hold(key)
            self._pinned = True
            self.word.advance(self.ranges)
        else:
            index.revoke(self.entry)
            self.word.fail()
        if not self.leases:
            self._over(index)
        return readable

    def end(self, index: Index) -> None:
        """A lease on it has ended."""
        self.leases -= 1
        if self._pinned:
            index.unpin([self.entry])
        if not self.leases and not self._reading:
            self._over(index)

    def _over(self, index: Index) -> None:
        if not self._pinned:
            index.abandon(self.entry)
        self.give_back(self.word)
