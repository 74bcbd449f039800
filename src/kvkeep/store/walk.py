"""All that lies below the pool of one store: its tiers in order, the fetches down them, the writes to each.

Knows nothing about sockets, or what kinds of tiers there are.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field

from kvkeep.core.index import Entry
from kvkeep.errors import TierError
from kvkeep.store.fetch import Promotions
from kvkeep.store.flush import Flush, FlushOptions
from kvkeep.store.loads import Loads
from kvkeep.store.sessions import Session
from kvkeep.store.store import SUM_NBYTES, Store
from kvkeep.tiers.tier import Bytes, Tier

log = logging.getLogger("kvkeep.store")

BATCH_NBYTES = 32 << 20
HELD_SHARE = 8  # flushes may hold an eighth of the pool
VERB_LIMIT_S = 5.0  # of a clear or a delete
CLOSE_LIMIT_S = 2.0


@dataclass
class TierWalk:
    """The pool's `store` and the tiers below it, the best first; `add` may come late, when a tier was in use before."""

    store: Store
    memory: Bytes
    loads: list[Loads] = field(default_factory=list)
    flushes: list[Flush] = field(default_factory=list)
    _told: list[Callable[[], Mapping[str, int]]] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.promotions = Promotions(self.store, self.loads, self._promoted)

    def add(self, name: str, tier: Tier, figures: Callable[[], Mapping[str, int]] = dict) -> None:
        """Takes in a tier below all others; `figures` tells its own numbers."""
        held_nbytes = self.store.pool_nbytes // HELD_SHARE
        options = FlushOptions(min(BATCH_NBYTES, held_nbytes // 2), held_nbytes)
        one = Loads(name, tier, self.memory, self.promotions.settle)
        self.loads.append(one)
        self._told.append(figures)
        self.flushes.append(Flush(self.store.index, one, options))

    def committed(self, session: Session, entries: Sequence[Entry | None]) -> None:
        """These became readable in the pool: every tier gets them."""
        sizes = session.opening.sizes
        for flush in self.flushes if sizes else ():
            for entry in entries:
                # a client's sums of another number than its ranges could not be verified later
                if entry is not None and len(entry.sums or b"") == SUM_NBYTES * len(sizes):
                    flush.submit(entry, sizes)

    async def discard(self, keys: Sequence[bytes]) -> None:
        """Takes chunks out of every tier (the pool has lost them already)."""
        await self._each(lambda tier: tier.delete(keys))

    async def clear(self, namespace: bytes | None) -> None:
        """Drops a namespace, or everything, from every tier (the pool has lost it already)."""
        await self._each(lambda tier: tier.clear(namespace))

    async def aclose(self, drain_s: float) -> int:
        """Writes what waits, at most for `drain_s`, and ends the tiers; how many chunks were not written."""
        left = sum(await asyncio.gather(*(flush.drain(drain_s) for flush in self.flushes)))
        for one in self.loads:
            task = asyncio.get_running_loop().create_task(one.tier.aclose())
            await asyncio.wait({task}, timeout=CLOSE_LIMIT_S)  # not wait_for, which waits for what it cancels
            if not task.done():
                log.warning("tier %s did not end within %.0f s", one.name, CLOSE_LIMIT_S)
        return left

    def figures(self) -> dict[str, int]:
        """What happened below the pool, by tier."""
        figures = dict(self.promotions.figures)
        for one, flush, told in zip(self.loads, self.flushes, self._told, strict=True):
            counts = dict(told()) | {f"flush_{name}": count for name, count in flush.figures.items()}
            counts |= {"flush_waiting": flush.waiting, "failures": one.breaker.failures}
            counts |= {"under_way_nbytes": one.under_way_nbytes, "quarantined_nbytes": one.quarantined_nbytes}
            figures |= {f"{one.name}_{name}": count for name, count in counts.items()}
        return figures

    def _promoted(self, entry: Entry, sizes: Sequence[int], number: int) -> None:
        """A chunk came from tier `number`: those above it get it too."""
        for flush in self.flushes[:number]:
            flush.submit(entry, sizes)

    async def _each(self, verb: Callable[[Tier], Coroutine[None, None, None]]) -> None:
        """Every tier, one after the other; one that fails or does not answer in `VERB_LIMIT_S` is left alone."""
        for one in self.loads:
            task = asyncio.get_running_loop().create_task(verb(one.tier))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await asyncio.wait({task}, timeout=VERB_LIMIT_S)
            failure = task.exception() if task.done() else None
            if isinstance(failure, TierError) or not task.done():
                one.overdue((), str(failure or "no answer within its limit"))
            elif failure is not None:
                raise failure
