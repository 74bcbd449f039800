"""Page-locks the pool's mapping piece by piece, so that a device can read and write it by itself.

The caller brings the calls that lock and unlock. Knows nothing about devices, torch or what is copied.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

log = logging.getLogger("kvkeep")

PIECE_NBYTES = 256 << 20  # some 0.1 s each: the end need not wait for the whole pool
LOG_EVERY_NBYTES = 16 << 30  # some 6 s


class PinCalls(NamedTuple):
    """Locks (address, bytes) and unlocks (address); each returns "", or why it failed."""

    lock: Callable[[int, int], str]
    unlock: Callable[[int], str]


class PageLock:
    """The page-locked part of a mapping, from its start on; it grows by pieces and ends with `release`.

    `grow` runs in one thread; others may ask `pieces` and `pinned_nbytes` meanwhile.
    """

    def __init__(self, address: int, nbytes: int, calls: PinCalls, piece_nbytes: int = PIECE_NBYTES) -> None:
        self._address = address
        self._nbytes = nbytes
        self._calls = calls
        self._piece_nbytes = piece_nbytes
        self._pieces = 0
        self._lock = threading.Lock()
        self._released = False
        self.refusal = ""

    @property
    def pinned_nbytes(self) -> int:
        """Bytes that are locked, from the mapping's start on."""
        return min(self._pieces * self._piece_nbytes, self._nbytes)

    def grow(self, populated_nbytes: int) -> None:
        """Page-lock the next populated pieces; a no-op after a refusal or release(). Logs progress.

        A refusal (usually `ulimit -l`) is logged once with what it costs, and is no error: the pool works without.
        """
        if self.refusal or self.pinned_nbytes == self._nbytes:
            return
        while (start := self.pinned_nbytes) < self._nbytes:
            nbytes = min(self._piece_nbytes, self._nbytes - start)
            if start + nbytes > populated_nbytes:
                return
            with self._lock:
                if self._released:
                    return
                self.refusal = self._calls.lock(self._address + start, nbytes)
                self._pieces += not self.refusal
            if self.refusal:
                log.warning("kvkeep: %s", self)
                return
            if self.pinned_nbytes // LOG_EVERY_NBYTES > start // LOG_EVERY_NBYTES and self.pinned_nbytes < self._nbytes:
                log.info("kvkeep: %s so far", self)
        log.info("kvkeep: %s", self)

    def pieces(self, offset: int, nbytes: int) -> tuple[int, ...]:
        """Where each locked piece begins in [offset, offset + nbytes), counted from `offset`; () if not all is locked.

        A copy engine refuses a copy that crosses from one piece to the next.
        """
        if offset + nbytes > self.pinned_nbytes:
            return ()
        first = -(-(offset + 1) // self._piece_nbytes) * self._piece_nbytes
        return (0, *(edge - offset for edge in range(first, offset + nbytes, self._piece_nbytes)))

    def release(self) -> None:
        """Unlocks every piece, the last one first; idempotent. All copies must have ended."""
        with self._lock:
            self._released = True
            while self._pieces:
                self._pieces -= 1
                if why := self._calls.unlock(self._address + self._pieces * self._piece_nbytes):
                    log.warning("kvkeep: the pool was not unlocked: %s", why)

    def __str__(self) -> str:
        share = f"{self.pinned_nbytes >> 20} of {self._nbytes >> 20} MiB of the pool are page-locked"
        if not self.refusal:
            return share
        return (
            f"{share} ({self.refusal}): each copy of the rest goes through a staging buffer and stops the step for it"
        )
