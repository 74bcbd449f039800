"""What a tier is: it keeps chunks by key below the pool, on disk or elsewhere. The caller brings all memory.

Batches in, an answer for each chunk. A tier that as a whole does not work raises a TierError; a chunk that is absent,
torn, foreign or of another shape is None, never an error. A chunk's payload is its ranges one after the other, each
padded to ALIGN_NBYTES; its sums are 16 bytes (xxh3-128) a range, taken over the padded range when it was gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvkeep.errors import TierError

OPENING = "it is still being opened"  # why a tier is not there yet, while nothing is known to be in its way

Bytes = npt.NDArray[np.uint8]


class Read(NamedTuple):
    """A chunk to read: `into` takes all its ranges of `sizes` (padded bytes each), in order.

    `arrived`: read the first ranges of all such chunks of a batch before the later ones of any, and call this, from any
    thread, with how many ranges of the chunk are there: verified, of the right record, and not written to again. The
    call may come late, or never. `gone` is called where the chunk has no record any more; that call may never come.
    """

    key: bytes
    sizes: Sequence[int]
    into: Bytes
    arrived: Callable[[int], None] | None = None
    gone: Callable[[], None] | None = None


class Write(NamedTuple):
    """A chunk to keep: `payload` is all its ranges of `sizes` in order, `sums` theirs.

    `tokens`: how many tokens it has, 0 for as many as its namespace says.
    """

    key: bytes
    sizes: Sequence[int]
    payload: Bytes
    sums: bytes
    tokens: int = 0


class Stored(Enum):
    """The answer to a write."""

    STORED = "stored"
    PRESENT = "present"  # a good record of this key was there already, and stays
    REFUSED = "refused"  # no room within the limit, or an error of this chunk alone


class Tier(Protocol):
    """Five verbs and the end. Memory given to a verb is not touched after the verb returned, raised or was cancelled.

    `clear` forgets every chunk of a namespace (None: of all). What was being written when it began is not found
    afterwards either, also not after a crash.
    """

    async def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Which keys are here as far as is known; a load may still find nothing."""

    async def load(self, reads: Sequence[Read]) -> list[bytes | None]:
        """Fill each read's memory, verified; its sums, or None if it is not here, or was bad and is deleted now."""

    async def store(self, writes: Sequence[Write]) -> list[Stored]:
        """Keep chunks; they are readable once this returns."""

    async def delete(self, keys: Sequence[bytes]) -> None:
        """Forget chunks; absent keys are no error."""

    async def clear(self, namespace: bytes | None) -> None:
        """Forget a namespace, or everything, durably."""

    async def aclose(self) -> None:
        """End the tier: nothing touches lent memory any more. This does not wait for a device that hangs."""


@contextmanager
def operation(tier: str, verb: str) -> Iterator[None]:
    """Write the tier's name and the verb into every TierError that leaves the block."""
    try:
        yield
    except TierError as error:
        error.tier, error.operation = error.tier or tier, error.operation or verb
        raise
