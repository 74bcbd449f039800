"""The epochs of a tier whose records are in a `Place`: kept there too, under the name `epochs`.

Epochs rise in memory first, then in the place, and only then is anything deleted. Where a place has lost them, or never
had any, all that is there is of an older epoch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kvkeep.core.units import NAMESPACE_NBYTES
from kvkeep.errors import CorruptChunk, TierUnavailable
from kvkeep.tiers.epochs import VERSION, Epochs, decode_epochs, encode_epochs, first_epochs
from kvkeep.tiers.place import Get, Missing, Place, Put

NAME = "epochs"
_MAX_NBYTES = 1 << 20


@dataclass(eq=False)
class PlaceEpochs:
    """The epochs of now. `durable`: the place has them too."""

    place: Place
    now: Epochs
    clock_ns: Callable[[], int]
    durable: bool = True
    _keeping: asyncio.Lock = field(default_factory=asyncio.Lock)

    def of(self, key: bytes) -> int:
        """The epoch that the record of a key must carry."""
        return self.now.of(key[:NAMESPACE_NBYTES])

    async def advance(self, namespace: bytes | None) -> None:
        """Raise the epoch of a namespace, or of everything; TierUnavailable where the place does not keep it.

        The new epoch holds all the same, until this process ends.
        """
        self.now = self.now.raised(namespace, self.clock_ns())
        self.durable = False
        await self.keep()

    async def settle(self) -> None:
        """Note that no record of an older epoch is left; losing this note costs one more look."""
        self.now = self.now.settled()
        self.durable = False
        await self.keep()

    async def keep(self) -> None:
        """Put the epochs of now into the place, if it does not have them; one put at a time, so that they only rise."""
        async with self._keeping:
            while not self.durable:
                kept = self.now
                if not all(await self.place.put([Put(NAME, [np.frombuffer(encode_epochs(kept), np.uint8)])])):
                    raise TierUnavailable(
                        "what was cleared may be found again after a restart: the place keeps no epochs"
                    )
                self.durable = kept is self.now


async def read_epochs(place: Place, clock_ns: Callable[[], int]) -> PlaceEpochs:
    """The epochs that a place has; where it has none that can be read, new ones, which it has then."""
    memory = np.empty(_MAX_NBYTES, np.uint8)
    [got] = await place.get([Get(NAME, [memory])])
    if got is Missing.FAILED:
        raise TierUnavailable("the place does not give its epochs")
    try:
        found = decode_epochs(memory[:got].tobytes() if isinstance(got, int) else b"")
        if found.version == VERSION:
            return PlaceEpochs(place, found, clock_ns)
        found = found.raised(None, clock_ns())
    except CorruptChunk:
        found = first_epochs(clock_ns())
    epochs = PlaceEpochs(place, found, clock_ns, durable=False)
    await epochs.keep()
    return epochs
