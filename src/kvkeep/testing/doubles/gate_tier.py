"""Plays a tier whose every verb can be held up, and an event loop with a clock of its own.

Knows nothing about the store. Nothing here sleeps or looks at a real clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvkeep.errors import TierUnavailable
from kvkeep.tiers.tier import Read, Stored, Write

ROUNDS = 30


class ManualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time stands still until `advance`; `turn` runs what is ready and raises what a task did."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self._tasks: list[asyncio.Task[Any]] = []
        self.set_task_factory(self._noted)

    def time(self) -> float:
        """Seconds since it was made, as told by `advance`."""
        return self.now_s

    def turn(self) -> None:
        """Runs what is ready and what that makes ready, for a bounded number of rounds."""
        for _ in range(ROUNDS):
            self.call_soon(self.stop)
            self.run_forever()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            if not task.done():
                self._tasks.append(task)
            elif not task.cancelled() and (failure := task.exception()) is not None:
                raise failure

    def _noted(self, loop: asyncio.AbstractEventLoop, steps: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(steps, loop=loop, **options)
        self._tasks.append(task)
        return task

    def advance(self, seconds: float) -> None:
        """Lets time pass and runs what is due then."""
        self.now_s += seconds
        self.turn()


@dataclass(eq=False)
class GateTier:
    """A tier in memory. A verb named in `shut` waits until `open` is called for it; one in `broken` raises.

    "range" is no verb of a tier: a load passes it before each range of the reads that want their first ones first.
    """

    chunks: dict[bytes, tuple[bytes, bytes]] = field(default_factory=dict)
    shut: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    calls: list[tuple[str, tuple[bytes, ...]]] = field(default_factory=list)
    closed: bool = False
    _epochs: dict[bytes, int] = field(default_factory=dict)
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
        epochs = [self._epoch(read.key) for read in reads]
        await self._pass("load", [read.key for read in reads])
        await self._by_range([(read, epoch) for read, epoch in zip(reads, epochs, strict=True) if read.arrived])
        return [
            self._filled(read) if self._epoch(read.key) == epoch else None
            for read, epoch in zip(reads, epochs, strict=True)
        ]

    async def store(self, writes: Sequence[Write]) -> list[Stored]:
        """As `Tier.store`."""
        epochs = [self._epoch(write.key) for write in writes]
        await self._pass("store", [write.key for write in writes])
        return [
            self._stored(write) if self._epoch(write.key) == epoch else Stored.REFUSED
            for write, epoch in zip(writes, epochs, strict=True)
        ]

    async def delete(self, keys: Sequence[bytes]) -> None:
        """As `Tier.delete`."""
        await self._pass("delete", keys)
        for key in keys:
            self.chunks.pop(key, None)

    async def clear(self, namespace: bytes | None) -> None:
        """As `Tier.clear`."""
        name = namespace or b""
        self._epochs[name] = self._epochs.get(name, 0) + 1
        await self._pass("clear", [name])
        for key in [key for key in self.chunks if key.startswith(name)]:
            del self.chunks[key]

    async def aclose(self) -> None:
        """As `Tier.aclose`."""
        await self._pass("aclose", [])
        self.closed = True

    async def _by_range(self, reads: Sequence[tuple[Read, int]]) -> None:
        for number in range(max((len(read.sizes) for read, _ in reads), default=0)):
            await self._pass("range", [read.key for read, _ in reads])
            for read, epoch in reads:
                payload, _ = self.chunks.get(read.key, (b"", b""))
                if read.arrived is None or len(payload) != sum(read.sizes) or self._epoch(read.key) != epoch:
                    continue
                start = sum(read.sizes[:number])
                end = start + read.sizes[number]
                read.into[start:end] = np.frombuffer(payload[start:end], dtype=np.uint8)
                read.arrived(number + 1)

    def _epoch(self, key: bytes) -> int:
        return sum(count for name, count in self._epochs.items() if key.startswith(name))

    def _filled(self, read: Read) -> bytes | None:
        payload, sums = self.chunks.get(read.key, (b"", b""))
        if not payload and read.gone is not None:
            read.gone()
        if len(payload) != sum(read.sizes):
            return None
        if read.arrived is None:
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
