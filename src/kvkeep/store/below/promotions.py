"""Promotions: chunks on their way from a tier into the pool, each read once whoever wants it.

Each has its room in the pool from the beginning. When its tier is done with that memory the chunk becomes readable,
with a pin for every lookup that waits for it, or the room is free again. Knows nothing about how a tier is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvkeep.core.index import Index, IndexEntry, Outcome
from kvkeep.store.lent import Early
from kvkeep.store.store import Store
from kvkeep.tiers.tier import Bytes, Read

FIGURES = ("promoted", "not_loaded", "lent_early", "failed_early")


@dataclass(eq=False)
class Promotion:
    """One chunk on its way: its uncommitted `entry`, the sizes of its ranges, the number of its tier.

    `outcome` is True once the chunk is readable, False once nobody shall wait for it. Until then `waiting` counts the
    lookups that wait. `early`: it is lent already. `whole`: not range by range, for its borrower needs all of it at
    once. `gone`: the tier has no record of it any more.
    """

    entry: IndexEntry
    sizes: Sequence[int]
    tier: int
    outcome: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    waiting: int = 0
    early: Early | None = None
    whole: bool = False
    gone: bool = False

    def read(self, memory: Bytes) -> Read:
        """What to ask the tier for."""
        into = memory[self.entry.offset : self.entry.offset + self.entry.nbytes]
        arrived = self.early.progress.advance if self.early is not None and not self.whole else None
        return Read(self.entry.key, self.sizes, into, arrived, gone=self._vanished)

    def leave(self, index: Index) -> None:
        """A lookup that waits goes away; if the chunk is readable its pin goes too."""
        if not self.outcome.done():
            self.waiting -= 1
        elif self.outcome.result():
            index.unpin([self.entry])

    def give_up(self) -> None:
        """Send all away that wait, with or without a lease; the tier may still be at work on the memory."""
        if self.early is not None:
            self.early.fail_late()
        self._end(readable=False)

    def arrive(self, index: Index) -> None:
        """The chunk is readable: pin it for everyone who waits."""
        for _ in range(self.waiting):
            index.hold(self.entry.key)
        self._end(readable=True)

    def _end(self, readable: bool) -> None:
        if not self.outcome.done():
            self.waiting = 0
            self.outcome.set_result(readable)

    def _vanished(self) -> None:
        self.gone = True


@dataclass
class Promotions:
    """All promotions into the pool of `store`; `promoted` gets each one that became readable."""

    store: Store
    promoted: Callable[[Promotion], None] = lambda promotion: None
    figures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FIGURES, 0))
    _under_way: dict[bytes, Promotion] = field(default_factory=dict)

    def get(self, key: bytes) -> Promotion | None:
        """The promotion of this chunk, if it is under way."""
        return self._under_way.get(key)

    def reserve(
        self, keys: Sequence[bytes], sizes: Sequence[int], tiers: Sequence[int]
    ) -> tuple[list[Promotion], Outcome | None]:
        """Room for chunks that the pool lacks, each from its tier: for the first ones, and why not for the next."""
        if not keys:
            return [], None
        index = self.store.index
        self.store.revoke_overdue(keys)
        promotions: list[Promotion] = []
        refused: Outcome | None = None
        for entry, tier in zip(index.reserve(keys, sum(sizes), self.store.next_lease()), tiers, strict=True):
            if not isinstance(entry, IndexEntry):
                refused = refused or entry
            elif refused is not None:
                index.abandon(entry)
            else:
                promotion = self._under_way[entry.key] = Promotion(entry, sizes, tier)
                promotions.append(promotion)
        return promotions, refused

    def late(self, promotion: Promotion) -> None:
        """Its read has outlived its limit: nobody waits for it, another may write this chunk meanwhile."""
        self.store.late.add(promotion.entry)

    def is_late(self, promotion: Promotion) -> bool:
        """Whether its read has outlived its limit."""
        return promotion.entry in self.store.late

    def settle(self, promotion: Promotion, sums: bytes | None) -> None:
        """The tier is done with its memory: commit the chunk, or (sums None: it did not come) free the room."""
        self._under_way.pop(promotion.entry.key, None)
        self.store.late.discard(promotion.entry)
        self.figures["not_loaded"] += sums is None
        if self._readable(promotion, sums):
            self.figures["promoted"] += 1
            promotion.arrive(self.store.index)
            self.promoted(promotion)
        else:
            promotion.give_up()

    def _readable(self, promotion: Promotion, sums: bytes | None) -> bool:
        """End the making of a chunk; False if it did not come, or was cleared meanwhile."""
        index = self.store.index
        if promotion.early is not None:
            lent = promotion.early.leases
            readable = promotion.early.settle(index, sums)
            self.figures["failed_early"] += bool(lent and not readable)
            return readable
        if sums is None:
            index.abandon(promotion.entry)
            return False
        return index.commit(promotion.entry, sums)
