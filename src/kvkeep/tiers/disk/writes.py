"""Write-through: records into one directory, within its limit, and eviction to make room for them.

Bytes are counted before they are written and until they are gone. Knows nothing about who wants a chunk kept.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from kvkeep.core.units import ALIGN_NBYTES
from kvkeep.errors import TierUnavailable
from kvkeep.tiers.disk.boot import forget_order
from kvkeep.tiers.disk.files import NO_ROOM, Written
from kvkeep.tiers.disk.state import Errand, Holding, Pending, batches
from kvkeep.tiers.disk.threads import Urgency
from kvkeep.tiers.record import fits
from kvkeep.tiers.tier import Stored, Write

_TRIES = 4  # others may take the room that was made


class Wanted(NamedTuple):
    """A write, and the bytes that are counted for it: one more block than it has, for the file system's own map."""

    write: Write
    pending: Pending
    nbytes: int


@dataclass(eq=False)
class DiskWrites:
    """Writes into `holding`. `has_order`: an order of the last clean end may be there and must go before any write."""

    holding: Holding
    has_order: bool = True
    _making_room: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def store(self, writes: Sequence[Write]) -> list[Stored]:
        """Keep chunks; one answer each. What is cleared before this returns is not kept."""
        holding = self.holding
        epochs = [holding.epoch(write.key) for write in writes]  # before anything is waited for
        unreadable = [entry for write in writes if (entry := holding.ledger.live.get(write.key)) and entry.unreadable]
        doomed = [*holding.unburied.values(), *(holding.ledger.kill(entry) for entry in set(unreadable))]
        if doomed:
            await holding.bury((entry, None) for entry in doomed)
        if holding.ledger.adrift_nbytes:
            await holding.survey()
        answers: list[Stored | asyncio.Future[Stored]] = []
        fresh: list[Wanted] = []
        for write, epoch in zip(writes, epochs, strict=True):
            assert write.payload.nbytes == sum(write.sizes), f"{write.payload.nbytes} bytes for ranges of {write.sizes}"
            answers.append(self._begun(write, epoch, fresh))
        runs = batches(fresh, lambda one: one.nbytes, holding.options.write_batch)
        try:
            await holding.end([holding.begin(partial(self._store, run)) for run in runs])
        finally:
            for one in fresh:
                self._answer(one, Stored.REFUSED)  # cancelled before it began
        return [one if isinstance(one, Stored) else await one for one in answers]

    def _begun(self, write: Write, epoch: int, fresh: list[Wanted]) -> Stored | asyncio.Future[Stored]:
        """What is known at once about a write of an epoch; where it is to be written, it joins `fresh`."""
        holding, key = self.holding, write.key
        if key in holding.writing:
            return asyncio.ensure_future(_joined(holding.writing[key].outcome))
        if key in holding.ledger.live:
            holding.counts.present += 1
            return Stored.PRESENT
        stale = epoch != holding.epoch(key)  # it was cleared meanwhile
        if stale or key in holding.ledger.dying or not fits(write.sizes, write.sums):  # dying: its name is not free yet
            holding.counts.refused += 1
            return Stored.REFUSED
        pending = Pending(epoch, asyncio.get_running_loop().create_future())
        holding.writing[key] = pending
        fresh.append(Wanted(write, pending, holding.shelf.records.most_nbytes(write.sizes) + ALIGN_NBYTES))
        return pending.outcome

    async def _store(self, run: Sequence[Wanted], errand: Errand) -> None:
        holding = self.holding
        admitted: list[Wanted] = []
        unwritten: list[Wanted] = admitted  # whose reservations nothing was written of
        try:
            for one in run:
                if await self._has_room(one.nbytes):
                    admitted.append(one)
            if not admitted:
                return
            errand.job = holding.threads.submit(
                Urgency.STORE, partial(holding.shelf.store, [(one.write, one.pending.epoch) for one in admitted])
            )
            unwritten = []
            written = await errand.job.done
            if written is None:
                unwritten = admitted
                return
            await self._wrote(admitted, written)
        finally:
            for one in unwritten:
                holding.ledger.unreserve(one.nbytes)
            for one in run:
                self._answer(one, Stored.REFUSED)

    async def _wrote(self, admitted: Sequence[Wanted], written: Sequence[Written]) -> None:
        """Takes the outcome of a job into the ledger."""
        holding, ledger = self.holding, self.holding.ledger
        void = []  # deleted meanwhile, of an old epoch, or not durable where it is to be
        for one, got in zip(admitted, written, strict=True):
            key = one.write.key
            if got.stored is Stored.STORED:
                ledger.publish(key, one.nbytes, got.nbytes)
            elif not got.left:  # what may have stayed behind is counted until the next boot removes it
                ledger.unreserve(one.nbytes)
            if got.stored is Stored.PRESENT and key not in ledger.live:
                ledger.learn(key, got.nbytes)
            self._judge(got)
            is_void = one.pending.doomed or holding.epoch(key) != one.pending.epoch or bool(got.error)
            if is_void and key in ledger.live:
                void.append((ledger.kill(ledger.live[key]), None))
            self._answer(one, Stored.REFUSED if is_void else got.stored)
        await holding.bury(void)

    def _judge(self, got: Written) -> None:
        """Notes what a write tells about the device."""
        if got.error == errno.ESHUTDOWN:
            return
        if got.error in NO_ROOM:
            self.holding.ledger.spare_nbytes = 0  # the next write looks, and makes room
        if got.error:
            cure = "; free some space, or set disk_size or disk_min_free lower" if got.error in NO_ROOM else ""
            self.holding.failed(f"a record cannot be written: {errno.errorcode.get(got.error, got.error)}{cure}")
        elif got.stored is Stored.STORED:
            self.holding.degraded = ""

    def _answer(self, one: Wanted, stored: Stored) -> None:
        holding = self.holding
        if one.pending.outcome.done():
            return
        one.pending.outcome.set_result(stored)
        holding.part(one.write.key, stored)
        holding.counts.stored += stored is Stored.STORED
        holding.counts.present += stored is Stored.PRESENT
        holding.counts.refused += stored is Stored.REFUSED

    # ---- room

    async def _has_room(self, nbytes: int) -> bool:
        """Counts `nbytes` as used, if need be after others were evicted; False: there is no room for them."""
        ledger = self.holding.ledger
        if nbytes > ledger.limit_nbytes:
            return False
        if not self.has_order and ledger.reserve(nbytes):
            return True
        try:
            async with asyncio.timeout(self.holding.options.room_s), self._making_room:
                return await self._make_room(nbytes)
        except TimeoutError:
            return False
        except TierUnavailable as error:
            self.holding.failed(str(error))
            return False

    async def _make_room(self, nbytes: int) -> bool:
        holding, ledger = self.holding, self.holding.ledger
        if self.has_order:
            await holding.carry_out(lambda: forget_order(holding.shelf))
            self.has_order = False
        for _ in range(_TRIES):
            if ledger.reserve(nbytes):
                return True
            if nbytes > ledger.spare_nbytes:
                await self.look_at_free_space()
            victims = ledger.evict(nbytes)
            if not victims and ledger.shortage_nbytes(nbytes) > 0:
                return False
            holding.counts.evicted += len(victims)
            await holding.bury((entry, None) for entry in victims)
            if nbytes > ledger.spare_nbytes:
                await self.look_at_free_space()
        return False

    async def look_at_free_space(self) -> None:
        """Takes what the file system has left into the ledger."""
        free = await self.holding.threads.submit(Urgency.DELETE, lambda _: self.holding.shelf.free_nbytes()).done
        if free is not None:
            self.holding.ledger.spare_nbytes = free


async def _joined(outcome: asyncio.Future[Stored]) -> Stored:
    """The answer to somebody who wants what another is writing."""
    stored = await asyncio.shield(outcome)
    return Stored.PRESENT if stored is not Stored.REFUSED else stored
