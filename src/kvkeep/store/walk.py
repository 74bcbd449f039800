"""All that lies below the pool of one store: its tiers in order, the fetches down them, the writes to each.

Knows nothing about sockets, or what kinds of tiers there are.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from kvkeep.core.index import Entry
from kvkeep.errors import TierError
from kvkeep.store.fetch import Promotions
from kvkeep.store.flush import Flush, FlushOptions
from kvkeep.store.loads import Loads
from kvkeep.store.sessions import Session
from kvkeep.store.store import Store
from kvkeep.tiers.tier import Bytes, Tier

log = logging.getLogger("kvkeep.store")

BATCH_NBYTES = 32 << 20
HELD_SHARE = 8  # flushes may hold an eighth of the pool
CLOSE_LIMIT_S = 2.0


@dataclass
class TierWalk:
    """The pool's `store` and the tiers below it, the best first; `add` may come late, when a tier was in use before."""

    store: Store
    memory: Bytes
    lines: list[Loads] = field(default_factory=list)
    flushes: list[Flush] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.promotions = Promotions(self.store, self.lines, self._promoted)

    def add(self, name: str, tier: Tier) -> None:
        """Takes in a tier below all others."""
        held_nbytes = self.store.pool_nbytes // HELD_SHARE
        options = FlushOptions(min(BATCH_NBYTES, held_nbytes // 2), held_nbytes)
        line = Loads(name, tier, self.memory, self.promotions.settle)
        self.lines.append(line)
        self.flushes.append(Flush(self.store.index, line, options))

    def committed(self, session: Session, entries: Sequence[Entry | None]) -> None:
        """These became readable in the pool: every tier gets them."""
        sizes = session.opening.sizes
        for flush in self.flushes if sizes else ():
            for entry in entries:
                if entry is not None:
                    flush.submit(entry, sizes)

    async def discard(self, session: Session, digests: Sequence[bytes]) -> None:
        """Takes chunks out of every tier (the pool has lost them already)."""
        keys = self.store.keys(session, digests)
        await self._each(lambda tier: tier.delete(keys))

    async def clear(self, namespace: bytes | None) -> None:
        """Drops a namespace, or everything, from every tier (the pool has lost it already)."""
        await self._each(lambda tier: tier.clear(namespace))

    async def aclose(self, drain_s: float) -> int:
        """Writes what waits, at most for `drain_s`, and ends the tiers; how many chunks were not written."""
        left = sum(await asyncio.gather(*(flush.drain(drain_s) for flush in self.flushes)))
        for line in self.lines:
            try:
                await asyncio.wait_for(line.tier.aclose(), CLOSE_LIMIT_S)
            except (TierError, TimeoutError) as error:
                log.warning("tier %s did not end well: %s", line.name, error or "it does not answer")
        return left

    def figures(self) -> dict[str, int]:
        """What happened below the pool, by tier."""
        figures = dict(self.promotions.figures)
        for line, flush in zip(self.lines, self.flushes, strict=True):
            counts = {f"flush_{name}": count for name, count in flush.figures.items()}
            counts |= {"flush_waiting": flush.waiting, "failures": line.breaker.failures}
            counts |= {"under_way_nbytes": line.under_way_nbytes, "quarantined_nbytes": line.quarantined_nbytes}
            figures |= {f"{line.name}_{name}": count for name, count in counts.items()}
        return figures

    def _promoted(self, entry: Entry, sizes: Sequence[int], number: int) -> None:
        """A chunk came from tier `number`: those above it get it too."""
        for flush in self.flushes[:number]:
            flush.submit(entry, sizes)

    async def _each(self, verb: Callable[[Tier], Awaitable[None]]) -> None:
        for line in self.lines:
            try:
                await verb(line.tier)
            except TierError as error:
                line.overdue((), str(error))
