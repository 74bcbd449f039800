"""Doubles for what lies below the pool: a tier whose every verb can be held up, and an event loop with its own time.

Knows nothing about the store. Nothing here sleeps or looks at a real clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvkeep.errors import TierUnavailable
from kvkeep.tiers.tier import Read, Stored, Write

ROUNDS = 30


class ManualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time stands still until `advance`; `turn` runs all that is ready."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def time(self) -> float:
        """Seconds since it was made, as told by `advance`."""
        return self.now_s

    def turn(self) -> None:
        """Runs what is ready and what that makes ready, for a bounded number of rounds."""
        for _ in range(ROUNDS):
            self.call_soon(self.stop)
            self.run_forever()

    def advance(self, seconds: float) -> None:
        """Lets time pass and runs what is due then."""
        self.now_s += seconds
        self.turn()


@dataclass(eq=False)
class GateTier:
    """A tier in memory. A verb named in `shut` waits until `open` is called for it; one in `broken` raises."""

    chunks: dict[bytes, tuple[bytes, bytes]] = field(default_factory=dict)
    shut: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    calls: list[tuple[str, tuple[bytes, ...]]] = field(default_factory=list)
    closed: bool = False
    _gates: dict[str, list[asyncio.Future[None]]] = field(default_factory=dict)

    def open(self, verb: str) -> None:
        """Lets all go on that wait at `verb`, and whoever comes."""
        self.shut.discard(verb)
        for gate in self._gates.pop(verb, []):
            if not gate.done():
                gate.set_result(None)

    def keep(self, key: bytes, payload: bytes, sums: bytes) -> None:
        """Puts a chunk there."""
        self.chunks[key] = payload, sums

    async def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """As `Tier.contains`."""
        await self._pass("contains", keys)
        return [key in self.chunks for key in keys]

    async def load(self, reads: Sequence[Read]) -> list[bytes | None]:
        """As `Tier.load`; it writes to the memory only after its gate, as a device that is late would."""
        await self._pass("load", [read.key for read in reads])
        return [self._filled(read) for read in reads]

    async def store(self, writes: Sequence[Write]) -> list[Stored]:
        """As `Tier.store`."""
        await self._pass("store", [write.key for write in writes])
        return [self._stored(write) for write in writes]

    async def delete(self, keys: Sequence[bytes]) -> None:
        """As `Tier.delete`."""
        await self._pass("delete", keys)
        for key in keys:
            self.chunks.pop(key, None)

    async def clear(self, namespace: bytes | None) -> None:
        """As `Tier.clear`."""
        await self._pass("clear", [namespace or b""])
        for key in [key for key in self.chunks if key.startswith(namespace or b"")]:
            del self.chunks[key]

    async def aclose(self) -> None:
        """As `Tier.aclose`."""
        await self._pass("aclose", [])
        self.closed = True

    def _filled(self, read: Read) -> bytes | None:
        payload, sums = self.chunks.get(read.key, (b"", b""))
        if len(payload) != sum(read.sizes):
            return None
        read.into[:] = np.frombuffer(payload, dtype=np.uint8)
        return sums

    def _stored(self, write: Write) -> Stored:
        if write.key in self.chunks:
            return Stored.PRESENT
        self.keep(write.key, bytes(write.payload), write.sums)
        return Stored.STORED

    async def _pass(self, verb: str, keys: Sequence[bytes]) -> None:
        self.calls.append((verb, tuple(keys)))
        if verb in self.shut:
            gate = asyncio.get_running_loop().create_future()
            self._gates.setdefault(verb, []).append(gate)
            await gate
        if verb in self.broken:
            raise TierUnavailable(f"{verb} is broken")
