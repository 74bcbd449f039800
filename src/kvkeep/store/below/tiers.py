"""Everything below the pool of one store: its tiers in order, the fetches that read them, the flushes to each.

Knows nothing about sockets, or what kinds of tiers there are.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvkeep.core.index import IndexEntry
from kvkeep.core.units import NAMESPACE_NBYTES, SUM_NBYTES
from kvkeep.errors import TierBusy, TierError, TierUnavailable
from kvkeep.memory.progress import ProgressTable
from kvkeep.store.below.fetches import Fetches
from kvkeep.store.below.filler import Filler
from kvkeep.store.below.flush import Flush, FlushOptions
from kvkeep.store.below.promotions import Promotion, Promotions
from kvkeep.store.below.reads import TierReads
from kvkeep.store.sessions import Session
from kvkeep.store.store import Store
from kvkeep.store.tasks import Tasks
from kvkeep.telemetry import POOL, SOURCE_PATTERN, Figure
from kvkeep.tiers.tier import OPENING, Bytes, Tier

log = logging.getLogger("kvkeep.store")

BATCH_NBYTES = 32 << 20
HELD_SHARE = 8  # flushes may pin an eighth of the pool
SPARED_SHARE = 2  # chunks that wait to be written are evicted last, up to half of the pool
VERB_LIMIT_S = 5.0  # for a clear or a delete
CLOSE_LIMIT_S = 2.0
SILENT = "tier %s does not say what it has, which counts as nothing: %s"
MAX_NAMESPACES = 256  # whose ranges, and whose clears, are remembered for tiers that come late


class Left(NamedTuple):
    """How many chunks of the pool no tier has at the end; `lost` are those that a tier could have kept."""

    no_tier: int
    lost: int


@dataclass
class TierWalk:
    """The pool's `store` and the tiers below it, the best first; a tier may come late, if another store still owned it.

    `table` is behind the pool: each chunk that is lent early gets a progress word of it.
    """

    store: Store
    memory: Bytes
    table: ProgressTable | None = None
    out: dict[str, str] = field(default_factory=dict)  # tiers that are not there, and why
    reads: list[TierReads] = field(default_factory=list)
    flushes: list[Flush] = field(default_factory=list)
    tasks: Tasks = field(default_factory=Tasks)
    _told: list[Callable[[], Mapping[str, int]]] = field(default_factory=list)
    _sizes: dict[bytes, Sequence[int]] = field(default_factory=dict)  # of a chunk's ranges, by namespace
    _cleared: set[bytes | None] = field(default_factory=set)  # namespaces; None: everything

    _unwanted: list[bytes] = field(default_factory=list)  # keys of chunks to discard
    _discarding: asyncio.Lock = field(default_factory=asyncio.Lock)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)  # `out` has

    def __post_init__(self) -> None:
        self.promotions = Promotions(self.store, self._promoted)
        self.filler = Filler(self.promotions, self.reads, self.table)
        self.fetches = Fetches(self.store, self.filler)

    async def admit(
        self, name: str, tier: Tier, figures: Callable[[], Mapping[str, int]] = dict, max_reads: int = 1
    ) -> None:
        """Add a tier once it has forgotten what was cleared before it came; close it if it cannot."""
        forgotten: set[bytes | None] = set()
        while missing := list(self._cleared - forgotten):
            failure = await self._within(VERB_LIMIT_S, tier.clear(missing[0]))
            if failure is not None:
                log.error("tier %s is left out, it may hold what was cleared: %s", name, failure)
                self.left_out(name, f"it may hold what was cleared: {failure}")
                await self._within(CLOSE_LIMIT_S, tier.aclose())
                return
            forgotten.add(missing[0])
        self.add(name, tier, figures, max_reads)
        self.left_out(name, "")

    def left_out(self, name: str, why: str) -> None:
        """Note why a configured tier is not there: OPENING until the reason is known; "": it is there."""
        self.out.pop(name, None)
        if why:
            self.out[name] = why
        self._changed.set()
        self._changed = asyncio.Event()

    async def _opened(self) -> None:
        while OPENING in self.out.values():
            await self._changed.wait()

    def add(self, name: str, tier: Tier, figures: Callable[[], Mapping[str, int]] = dict, max_reads: int = 1) -> None:
        """Add a tier below all others, and write to it what the pool has.

        `figures` reads its own counts; `max_reads` is how many reads it does at once. ValueError for a name that cannot
        be a label of metrics.
        """
        if name == POOL or re.fullmatch(SOURCE_PATTERN, name) is None:
            raise ValueError(f"a tier's name matches {SOURCE_PATTERN} and is not {POOL}: {name!r}")
        held_nbytes = self.store.pool_nbytes // HELD_SHARE
        spared_nbytes = self.store.pool_nbytes // SPARED_SHARE
        options = FlushOptions(min(BATCH_NBYTES, held_nbytes // 2), held_nbytes, spared_nbytes)
        reads = TierReads(
            name,
            tier,
            number=len(self.reads),
            memory=self.memory,
            promotions=self.promotions,
            tasks=self.tasks,
            max_reads=max_reads,
        )
        self.reads.append(reads)
        self._told.append(figures)
        self.flushes.append(Flush(self.store.index, reads, options))
        self.flushes[-1].catch_up(self._kept())

    def _kept(self) -> Iterator[tuple[bytes, Sequence[int]]]:
        """The keys of the chunks in the pool that a tier can keep, each with the sizes of its ranges."""
        for entry in self.store.index.committed():
            sizes = self._sizes.get(entry.key[:NAMESPACE_NBYTES], ())
            if _is_whole(entry, sizes):
                yield entry.key, sizes

    def committed(self, session: Session, entries: Sequence[IndexEntry | None]) -> None:
        """Write to every tier what became readable in the pool, if others can find it after the session.

        Chunks of a session that does not say the sizes of their ranges stay in the pool.
        """
        if not session.lasting or not session.opening.sizes:
            return
        sizes = session.opening.sizes
        self._sizes.pop(session.namespace, None)
        self._sizes[session.namespace] = sizes
        if len(self._sizes) > MAX_NAMESPACES:
            del self._sizes[next(iter(self._sizes))]
        for flush in self.flushes:
            for entry in entries:
                if entry is not None and _is_whole(entry, sizes):
                    flush.submit(entry, sizes)

    async def discard(self, keys: Sequence[bytes]) -> None:
        """Take chunks out of every tier (the pool has lost them already); what comes meanwhile goes in one call."""
        self._unwanted += keys
        async with self._discarding:
            unwanted, self._unwanted = self._unwanted, []
            if unwanted:
                await self._each(lambda tier: tier.delete(unwanted))
                self.store.index.discard(unwanted)  # what a tier gave before its turn came

    async def clear(self, namespace: bytes | None) -> str:
        """Drop a namespace, or everything, from every tier, also from later ones (the pool has lost it already).

        Returns why it may be there again after a restart: a tier failed, did not answer, is not there. "": it is gone.
        """
        self._cleared.add(namespace if len(self._cleared) < MAX_NAMESPACES else None)
        await self._within(VERB_LIMIT_S, self._opened())
        failed = {name: str(failure) for name, failure in await self._each(lambda tier: tier.clear(namespace))}
        self.store.index.clear(namespace)  # what a tier gave before its turn to forget came
        return "; ".join(f"tier {name}: {why}" for name, why in {**self.out, **failed}.items())

    async def aclose(self, drain_s: float) -> Left:
        """Write what waits, for at most `drain_s`, and close the tiers; how many chunks of the pool they lack."""
        await asyncio.gather(*(flush.drain(drain_s) for flush in self.flushes))
        left = await self._left()
        for reads in self.reads:
            failure = await self._within(CLOSE_LIMIT_S, reads.tier.aclose())
            if failure is not None:
                log.warning("tier %s did not end well: %s", reads.name, failure)
        return left

    async def _left(self) -> Left:
        keys = [entry.key for entry in self.store.index.committed()]
        held: set[bytes] = set()

        async def ask(reads: TierReads) -> None:
            try:
                held.update(itertools.compress(keys, await reads.tier.contains(keys)))
            except TierError as error:
                log.warning(SILENT, reads.name, error)

        for reads in self.reads:
            failure = await self._within(CLOSE_LIMIT_S, ask(reads))
            if failure is not None:
                log.warning(SILENT, reads.name, failure)
        lost = sum(key not in held for key, _ in self._kept()) if self.reads else 0
        return Left(sum(key not in held for key in keys), lost)

    def figures(self) -> list[Figure]:
        """What happened below the pool, in all and by tier."""
        figures = [Figure(name, "", count) for name, count in self.promotions.figures.items()]
        for reads, flush, told in zip(self.reads, self.flushes, self._told, strict=True):
            counts = dict(told()) | {f"flush_{name}": count for name, count in flush.figures.items()}
            counts |= {"flush_waiting": flush.waiting, "failures": reads.breaker.failures}
            counts |= {"under_way_nbytes": reads.under_way_nbytes, "quarantined_nbytes": reads.quarantined_nbytes}
            figures += [Figure(name, reads.name, count) for name, count in counts.items()]
        return figures

    def _promoted(self, promotion: Promotion) -> None:
        """Write a chunk that came from a tier to those above it."""
        for flush in self.flushes[: promotion.tier]:
            flush.submit(promotion.entry, promotion.sizes)

    async def _each(self, verb: Callable[[Tier], Coroutine[None, None, None]]) -> list[tuple[str, TierError]]:
        """Ask every tier, one after the other; leave alone one that fails or does not answer in `VERB_LIMIT_S`.

        Returns the names of those that did not do it, each with what went wrong.
        """
        failures = []
        for reads in self.reads:
            failure = await self._within(VERB_LIMIT_S, verb(reads.tier))
            if failure is not None:
                failures.append((reads.name, failure))
                if not isinstance(failure, TierBusy):
                    reads.overdue(str(failure))
        return failures

    async def _within(self, limit_s: float, verb: Coroutine[None, None, None]) -> TierError | None:
        """Wait for a verb for at most `limit_s`, then leave it to itself; what went wrong."""
        task = await self.tasks.wait(_failure(verb), limit_s)
        if not task.done():
            return TierUnavailable(f"no answer within {limit_s:.0f} s")
        bug = task.exception()  # which is in the log
        return task.result() if bug is None else TierUnavailable(f"a bug: {bug!r}")


async def _failure(verb: Coroutine[None, None, None]) -> TierError | None:
    try:
        await verb
    except TierError as error:
        return error
    return None


def _is_whole(entry: IndexEntry, sizes: Sequence[int]) -> bool:
    """Whether a tier can verify a chunk: a client may have sent another number of sums than it has ranges."""
    return bool(sizes) and len(entry.sums or b"") == SUM_NBYTES * len(sizes)
