"""A chunk that is lent while a tier still reads it: its progress word says how many ranges may be used.

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
    """The loan of `entry`, which has `ranges` ranges and is being read, to `leases` leases.

    `give_back` takes its progress word when the read and all leases have ended.
    """

    entry: IndexEntry
    ranges: int
    progress: ProgressWriter
    give_back: Callable[[ProgressWriter], None]
    leases: int = 0
    _reading: bool = True
    _pinned: bool = False

    def fail_late(self) -> None:
        """Tell the borrowers not to wait any longer; nothing where the read has ended."""
        if self._reading:
            self.progress.fail()

    def settle(self, index: Index, sums: bytes | None) -> bool:
        """End the read: commit the chunk, pinned for each lease; False if it did not come or was cleared meanwhile.

        Then its memory stays as it is until the last lease has ended.
        """
        self._reading = False
        key = self.entry.key
        readable = sums is not None and self.entry in index.writing([key])
        if readable:
            index.commit(self.entry, sums or b"")
            for _ in range(self.leases):
                index.hold(key)
            self._pinned = True
            self.progress.advance(self.ranges)
        else:
            index.revoke(self.entry)
            self.progress.fail()
        if not self.leases:
            self._end(index)
        return readable

    def release(self, index: Index) -> None:
        """End one lease on it."""
        self.leases -= 1
        if self._pinned:
            index.unpin([self.entry])
        if not self.leases and not self._reading:
            self._end(index)

    def _end(self, index: Index) -> None:
        if not self._pinned:
            index.abandon(self.entry)
        self.give_back(self.progress)
