"""How a run is filled: from the pool, then from the tiers below it, which are asked only for what the pool lacks.

Room is reserved only for what a tier has, in the order of the prefix, and never waited for. What has come by the
deadline is the answer; the rest comes later, for others. Knows nothing about sessions that have states.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from kvkeep.core.index import Outcome
from kvkeep.memory.progress import ProgressTable
from kvkeep.store.below.breaker import Gate
from kvkeep.store.below.promotions import Promotion, Promotions
from kvkeep.store.below.reads import TierReads, Until
from kvkeep.store.below.run import Run
from kvkeep.store.lent import Early
from kvkeep.store.sessions import Session
from kvkeep.telemetry import Miss

REFUSED = {Outcome.NO_ROOM: Miss.POOL_FULL, Outcome.BUSY: Miss.WRITING, Outcome.PRESENT: Miss.NOT_STORED}


@dataclass
class Filler:
    """Fills runs from `tiers`, the best first.

    `table` has the progress words of chunks that are lent while they are read; without it none is lent so. `opening`:
    more tiers will come.
    """

    promotions: Promotions
    tiers: Sequence[TierReads] = ()
    table: ProgressTable | None = None
    opening: bool = False

    def may_help(self, session: Session, wait_s: float) -> bool:
        """Whether a tier could have what the pool lacks."""
        return bool(self.tiers) and bool(session.opening.sizes) and wait_s > 0

    def absent(self, session: Session) -> Miss:
        """Why a chunk is missed that no tier says it has: a tier that cannot be asked now may have it."""
        if not session.opening.sizes:
            return Miss.NOT_STORED
        if any(tier.gate() is not Gate.CLOSED for tier in self.tiers):
            return Miss.TIER_LEFT_ALONE
        return Miss.TIER_OPENING if self.opening else Miss.NOT_STORED

    async def fill(self, run: Run, until: Until, early: bool = False) -> None:
        """Pin the longest run that the pool has, or gets by the end of `until`; `early`: lend what is on its way."""
        run.pin_present()
        if run.missing and self.may_help(run.session, until.left_s):
            await self._fill_from_tiers(run, until, early)
        elif run.missing:
            run.why = self.absent(run.session) if until.left_s else Miss.NOT_STORED

    async def _fill_from_tiers(self, run: Run, until: Until, early: bool) -> None:
        where, in_time = await self.locate(run.session, run.missing, until)
        if in_time:
            await self._bring(run, where, until, early)
        else:
            run.why = Miss.TIER_LATE
        run.touch()  # in either case: what was discarded while a tier was asked is given to nobody

    async def _bring(self, run: Run, where: Sequence[int | None], until: Until, early: bool) -> None:
        """Have read what a tier has, as `where` says, and wait for it, or lend it early."""
        promotions = self._promote(run, where)
        lent = early and self._lend_early(run, until.limit_s)
        for tier in self.tiers:
            tier.add([chunk for chunk in promotions if chunk.tier == tier.number], until.limit_s)
        if not lent:
            await self._arrive(run, until)

    async def locate(self, session: Session, keys: Sequence[bytes], until: Until) -> tuple[list[int | None], bool]:
        """For each key the first working tier that has it, as far as is known; whether all have said so in time."""
        where: list[int | None] = [None] * len(keys)
        in_time = True
        for tier in self.tiers:
            open_indexes = [index for index, found in enumerate(where) if found is None]
            asked = [keys[index] for index in open_indexes]
            gate = tier.gate()
            if gate is Gate.HALF_OPEN and asked:
                tier.probe(asked, session.opening.sizes, until.limit_s)
            if gate is not Gate.CLOSED or not asked:
                continue
            try:
                has = await tier.contains(asked, until)
            except TimeoutError:
                in_time = False
                break
            for index, there in zip(open_indexes, has, strict=True):
                where[index] = tier.number if there else None
        # a tier may have failed while another was asked
        return [None if at is None or self.tiers[at].gate() is not Gate.CLOSED else at for at in where], in_time

    def _promote(self, run: Run, where: Sequence[int | None]) -> list[Promotion]:
        """Pin what the pool has by now, join what is on its way, and reserve room for what a tier has."""
        wanted: list[tuple[int, bytes, int]] = []  # index in the run, key, tier
        for key, tier in zip(run.missing, where, strict=True):
            promotion = self.promotions.get(key)
            if run.pin(key):
                continue
            if promotion is not None and not self._is_hopeless(promotion):
                run.join(promotion, self.tiers[promotion.tier].name)
            elif promotion is None and tier is not None:
                wanted.append((len(run.chunks) + len(wanted), key, tier))
            else:
                run.why = Miss.TIER_FAILED if promotion is not None else self.absent(run.session)
                break
        sizes = run.session.opening.sizes
        keys, tiers = [key for _, key, _ in wanted], [tier for *_, tier in wanted]
        promotions, refused = self.promotions.reserve(keys, sizes, tiers)
        for (index, _, tier), promotion in zip(wanted, promotions, strict=False):
            run.join(promotion, self.tiers[tier].name, index)
        if refused is not None:
            run.cut(wanted[len(promotions)][0], REFUSED[refused])
        return promotions

    async def _arrive(self, run: Run, until: Until) -> None:
        """Wait for what is on its way, in order, as long as nothing before it is missing."""
        for index, chunk in enumerate(run.chunks):
            if not isinstance(chunk, Promotion):
                continue
            if not chunk.outcome.done():
                await asyncio.wait({chunk.outcome}, timeout=until.left_s)
            if not chunk.outcome.done():
                run.cut(index, Miss.TIER_LATE)
                return
            if not chunk.outcome.result():
                run.cut(index, Miss.TIER_EVICTED if chunk.gone else Miss.TIER_FAILED)
                return
            run.arrive(index)

    def _lend_early(self, run: Run, limit_s: float) -> bool:
        """Give each chunk that is on its way a progress word; False if there are too few, or one may not come."""
        coming = run.coming
        fresh = [chunk for chunk in coming if chunk.early is None]
        if self.table is None or len(fresh) > self.table.free or any(map(self._is_doubtful, coming)):
            return False
        for chunk in fresh:
            chunk.early = Early(chunk.entry, len(chunk.sizes), self.table.take(), self.table.give_back)
        if coming and run.chunks[-1] is coming[-1] and len(run.chunks) == len(run.digests):
            coming[-1].whole = True  # a step that computes only its end waits for all of it, before its first layer
        early = [chunk.early for chunk in coming if chunk.early is not None]
        self.promotions.figures["lent_early"] += len(early)
        asyncio.get_running_loop().call_later(limit_s, _fail_late, early)
        return True

    def _is_doubtful(self, promotion: Promotion) -> bool:
        """Whether a chunk that is being read may well not come."""
        failed = promotion.early is not None and promotion.early.progress.failed
        return failed or self._is_hopeless(promotion)

    def _is_hopeless(self, promotion: Promotion) -> bool:
        """Whether nobody waits for a chunk any more: it is late, or its tier has failed."""
        return self.promotions.is_late(promotion) or self.tiers[promotion.tier].gate() is not Gate.CLOSED


def _fail_late(loans: Sequence[Early]) -> None:
    for early in loans:
        early.fail_late()
