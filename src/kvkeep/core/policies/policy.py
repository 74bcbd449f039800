"""What every eviction policy does: it keeps keys in an order and names the one that goes first.

Knows nothing about memory, files, clocks or locks, or why a key is hidden.
"""

from __future__ import annotations

from typing import Protocol

UNKNOWN_COST = 1.0
"""The cost of a key of which nobody knows more: that of one chunk computed again."""


class EvictionPolicy(Protocol):
    """An order over keys. A hidden key keeps its place, may be touched or removed, and is never evicted.

    A call that breaks the order of calls (a key inserted twice, one that was never inserted) raises AssertionError,
    also under `python -O`.
    """

    def insert(self, key: bytes, nbytes: int, cost: float) -> None:
        """Add a key that is not there yet, visible.

        `nbytes` is what evicting it frees. `cost` is what a miss of it costs, in chunks computed again.
        """
        ...

    def touch(self, key: bytes) -> None:
        """Count one use of a key, hidden or not."""
        ...

    def missed(self, key: bytes) -> None:
        """Count one lookup of a key that is not there."""
        ...

    def remove(self, key: bytes) -> None:
        """Forget a key, hidden or not."""
        ...

    def set_hidden(self, key: bytes, hidden: bool) -> None:
        """Hide a visible key, or show a hidden one, which returns to its place."""
        ...

    def evict(self) -> bytes | None:
        """Forget and return the first visible key; None: there is none."""
        ...
