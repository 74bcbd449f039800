"""A place that is a dict: the reference for what a `Place` must do, and a stand-in for one in tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvkeep.tiers.place import Get, Missing, Put
from kvkeep.tiers.tier import Bytes


@dataclass
class MemoryPlace:
    """Keeps up to `limit_nbytes` and drops nothing: what does not fit is not kept."""

    limit_nbytes: int = 1 << 30
    kept: dict[str, bytes] = field(default_factory=dict)

    async def sizes(self, names: Sequence[str]) -> list[int]:
        """As `Place.sizes`."""
        return [len(self.kept.get(name, b"")) for name in names]

    async def get(self, gets: Sequence[Get]) -> list[int | Missing]:
        """As `Place.get`."""
        return [self._get(get) for get in gets]

    async def put(self, puts: Sequence[Put]) -> list[bool]:
        """As `Place.put`."""
        return [self._put(put) for put in puts]

    async def delete(self, names: Sequence[str]) -> None:
        """As `Place.delete`."""
        for name in names:
            self.kept.pop(name, None)

    async def names(self, prefix: str) -> AsyncIterator[str]:
        """As `Place.names`."""
        for name in list(self.kept):
            if name.startswith(prefix):
                yield name

    async def aclose(self) -> None:
        """As `Place.aclose`."""

    def _get(self, get: Get) -> int | Missing:
        if get.name not in self.kept:
            return Missing.ABSENT
        octets = np.frombuffer(self.kept[get.name], np.uint8)
        start = 0
        for memory in get.into:
            part: Bytes = octets[start : start + memory.nbytes]
            memory[: part.nbytes] = part
            start += part.nbytes
        return start

    def _put(self, put: Put) -> bool:
        octets = b"".join([part.tobytes() for part in put.parts])
        others = sum(len(kept) for name, kept in self.kept.items() if name != put.name)
        if others + len(octets) > self.limit_nbytes:
            return False
        self.kept[put.name] = octets
        return True
