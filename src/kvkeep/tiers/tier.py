"""What a tier is: a place below the pool that keeps chunks by key. The caller brings all memory.

Interfaces only. Knows nothing about the index, sessions, engines, or what kind of place it is.

Batches in, one answer a chunk, and a partial answer is an answer. A tier that as a whole does not work raises a
TierError; a chunk that is absent, torn, foreign or of another shape is None, never an error. A chunk's payload is its
ranges one after the other, each padded to ALIGN_NBYTES (`core.layout`); its sums are 16 bytes (xxh3-128) a range, taken
over the padded range by whoever gathered it and carried unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvkeep.errors import TierError

OPENING = "it is still being opened"  # why a tier is not there, for as long as nothing is known to be in its way

Bytes = npt.NDArray[np.uint8]


class Read(NamedTuple):
    """One chunk to read: `into` takes its ranges of `sizes` (padded bytes each), all of them, in order.

    With `arrived` the first ranges of all such chunks of a batch are wanted before their later ones, and it is told,
    from any thread, how many of this chunk's are there: verified, of the right record, and not written to again. It may
    be told late, or never. `gone` is told where no record of this chunk is there any more; it may never be told.
    """

    key: bytes
    sizes: Sequence[int]
    into: Bytes
    arrived: Callable[[int], None] | None = None
    gone: Callable[[], None] | None = None


class Write(NamedTuple):
    """One chunk to keep: `payload` is all its ranges of `sizes` in order, `sums` theirs.

    `tokens`: how many tokens it has, 0 for as many as its namespace says.
    """

    key: bytes
    sizes: Sequence[int]
    payload: Bytes
    sums: bytes
    tokens: int = 0


class Stored(Enum):
    """What became of a write."""

    STORED = "stored"
    PRESENT = "present"  # a good record of this key is there already and was kept
    REFUSED = "refused"  # no room within the limit, or an error of this chunk alone


class Tier(Protocol):
    """Five verbs and the end. Memory given to a verb is not touched after it returned, raised or was cancelled.

    `clear` forgets every chunk of a namespace (None: of all); what was being written or read when it began is not
    found afterwards either, also not after a crash.
    """

    async def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Which keys are here as far as is known; promises nothing."""

    async def load(self, reads: Sequence[Read]) -> list[bytes | None]:
        """Fills each read's memory, verified; its sums, or None if it is not here or was bad (then it is gone)."""

    async def store(self, writes: Sequence[Write]) -> list[Stored]:
        """Keeps chunks; readable once this returns."""

    async def delete(self, keys: Sequence[bytes]) -> None:
        """Forgets chunks; absent ones are no error."""

    async def clear(self, namespace: bytes | None) -> None:
        """Forgets a namespace, or everything, durably."""

    async def aclose(self) -> None:
        """Ends the tier: nothing touches lent memory any more, and it is not waited for a device that hangs."""


@contextmanager
def operation(tier: str, verb: str) -> Iterator[None]:
    """Every TierError that leaves this block names the tier and what was asked of it."""
    try:
        yield
    except TierError as error:
        error.tier, error.operation = error.tier or tier, error.operation or verb
        raise
