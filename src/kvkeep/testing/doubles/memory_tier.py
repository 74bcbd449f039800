"""A tier that is a dict: the smallest thing that keeps the contract of `Tier`, and a stand-in for one in tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvkeep.core.units import NAMESPACE_NBYTES
from kvkeep.errors import TierUnavailable
from kvkeep.tiers.record import first_bad_range
from kvkeep.tiers.tier import Bytes, Read, Stored, Write


@dataclass(frozen=True)
class Kept:
    """A chunk as it was given."""

    sizes: tuple[int, ...]
    payload: Bytes
    sums: bytes


@dataclass
class MemoryTier:
    """Keeps up to `limit_nbytes` of payload and evicts nothing: what does not fit is refused."""

    limit_nbytes: int = 1 << 30
    chunks: dict[bytes, Kept] = field(default_factory=dict)
    closed: bool = False

    async def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """As `Tier.contains`."""
        self._check()
        return [key in self.chunks for key in keys]

    async def load(self, reads: Sequence[Read]) -> list[bytes | None]:
        """As `Tier.load`."""
        self._check()
        return [self._load(read) for read in reads]

    async def store(self, writes: Sequence[Write]) -> list[Stored]:
        """As `Tier.store`."""
        self._check()
        return [self._store(write) for write in writes]

    async def delete(self, keys: Sequence[bytes]) -> None:
        """As `Tier.delete`."""
        self._check()
        for key in keys:
            self.chunks.pop(key, None)

    async def clear(self, namespace: bytes | None) -> None:
        """As `Tier.clear`; nothing of it outlives the process anyway."""
        self._check()
        for key in list(self.chunks):
            if namespace is None or key[:NAMESPACE_NBYTES] == namespace:
                del self.chunks[key]

    async def aclose(self) -> None:
        """As `Tier.aclose`."""
        self.closed = True

    def _load(self, read: Read) -> bytes | None:
        kept = self.chunks.get(read.key)
        if kept is None:
            if read.gone is not None:
                read.gone()
            return None
        if kept.sizes != tuple(read.sizes) or first_bad_range(kept.payload, kept.sizes, kept.sums) is not None:
            del self.chunks[read.key]
            return None
        read.into[:] = kept.payload
        return kept.sums

    def _store(self, write: Write) -> Stored:
        if write.key in self.chunks:
            return Stored.PRESENT
        if sum(one.payload.nbytes for one in self.chunks.values()) + write.payload.nbytes > self.limit_nbytes:
            return Stored.REFUSED
        self.chunks[write.key] = Kept(tuple(write.sizes), write.payload.copy(), write.sums)
        return Stored.STORED

    def _check(self) -> None:
        if self.closed:
            raise TierUnavailable("the tier is closed")
