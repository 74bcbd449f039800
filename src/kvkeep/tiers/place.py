"""What a place is: names and bytes below the pool. This is what a plugin writes; `RecordTier` makes a tier of it.

A place knows no chunks, keys, checksums or epochs. Batches in, an answer for each. A place that as a whole does not
work raises TierUnavailable, or TierBusy if too much waits already; an absent name is no error. A name has at most 128
characters of `[a-z0-9/]`. `testing/suites/places.py` checks a place.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from kvkeep.tiers.tier import Bytes


class Get(NamedTuple):
    """Bytes to read: the memories of `into` are filled one after the other, from the first byte of `name` on."""

    name: str
    into: Sequence[Bytes]


class Put(NamedTuple):
    """Bytes to keep under `name`, at least one: those of `parts`, one after the other."""

    name: str
    parts: Sequence[Bytes]


class Missing(Enum):
    """Why a get filled nothing."""

    ABSENT = "absent"  # nothing has this name
    FAILED = "failed"  # the place did not give it this time; it may be there


class Place(Protocol):
    """Keeps bytes by name. Memory given to a verb is not touched after the verb returned, raised or was cancelled.

    What a verb sees was put whole: never a part of a put, nor a mixture of two. A place may drop names to make room.
    """

    async def sizes(self, names: Sequence[str]) -> list[int]:
        """How many bytes each name has; 0 where nothing has it."""

    async def get(self, gets: Sequence[Get]) -> list[int | Missing]:
        """Fill each get's memory; how many bytes it got: fewer than it takes where the name has no more."""

    async def put(self, puts: Sequence[Put]) -> list[bool]:
        """Keep bytes, in place of whatever had the name; False: there was no room, or the place failed for this name.

        When this returns, every later get sees what was put, also one of another process.
        """

    async def delete(self, names: Sequence[str]) -> None:
        """Forget names; absent ones are no error. When this returns no get sees them."""

    def names(self, prefix: str) -> AsyncIterator[str]:
        """Every name that begins so, in any order; one that comes or goes meanwhile may be missing or there."""

    async def aclose(self) -> None:
        """End the place; whatever it was asked has ended when this returns. A second call does nothing."""
