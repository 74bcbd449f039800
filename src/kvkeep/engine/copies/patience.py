"""How long a step's copies wait for chunks that a tier still reads: one limit for all of them together.

A word that does not move, since the store is gone or its tier hangs, costs a step no more than that. Knows nothing
about plans, tiers or what is copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from kvkeep.memory.pool import Lease

LOOK_S = 0.0002  # between two looks at a word: the reading thread of the store has to run meanwhile


class Patience:
    """`begin` sets the limit; from then on any thread may wait."""

    def __init__(self, clock: Callable[[], float], pause: Callable[[float], None] = time.sleep) -> None:
        self._clock = clock
        self._pause = pause
        self._until_s = 0.0

    def begin(self, wait_s: float) -> None:
        """A step begins, whose copies wait at most so long in all."""
        self._until_s = self._clock() + wait_s

    def arrived(self, lease: Lease, ranges: int) -> bool:
        """Waits until the first `ranges` ranges may be used; False if they do not come, or not in time."""
        arrival = lease.arrival
        if arrival is None:
            return True
        while not arrival.has(ranges):
            if arrival.failed or self._clock() >= self._until_s:
                return False
            self._pause(LOOK_S)
        return True
