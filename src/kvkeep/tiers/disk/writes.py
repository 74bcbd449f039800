"""Writes records into one directory, within its limit, and evicts others to make room for them.

Bytes are counted before they are written and until they are gone.
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
from kvkeep.tiers.disk.files import NO_ROOM, WriteResult
from kvkeep.tiers.disk.state import DiskState, Errand, Pending, batches
from kvkeep.tiers.disk.threads import Urgency
from kvkeep.tiers.record import check_payloads, fits
from kvkeep.tiers.tier import Stored, Write

_TRIES = 4  # other writes may take the room that was made


class WantedWrite(NamedTuple):
    """A write, and the bytes counted for it: a block more than its record has, for the file system's own map."""

    write: Write
    pending: Pending
    nbytes: int


@dataclass(eq=False)
class DiskWrites:
    """The writes of one directory.

    `has_order`: the file `order` of the last clean end may be there, and must go before anything is written.
    """

    state: DiskState
    has_order: bool = True
    _making_room: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def store(self, writes: Sequence[Write]) -> list[Stored]:
        """Keep chunks; one answer each. What is cleared before this returns is not kept."""
        check_payloads(writes)
        state = self.state
        epochs = [state.epoch(write.key) for write in writes]  # before the first await
        unreadable = [entry for write in writes if (entry := state.ledger.live.get(write.key)) and entry.unreadable]
        doomed = [*state.undeleted.values(), *(state.ledger.kill(entry) for entry in set(unreadable))]
        if doomed:
            await state.remove_files((entry, None) for entry in doomed)
        if state.ledger.adrift_nbytes:
            await state.survey()
        answers: list[Stored | asyncio.Future[Stored]] = []
        fresh: list[WantedWrite] = []
        for write, epoch in zip(writes, epochs, strict=True):
            answers.append(self._begin_write(write, epoch, fresh))
        runs = batches(fresh, lambda wanted: wanted.nbytes, state.options.write_batch)
        try:
            await state.end([state.begin(partial(self._store, run)) for run in runs])
        finally:
            for wanted in fresh:
                self._answer(wanted, Stored.REFUSED)  # cancelled before it began
        return [answer if isinstance(answer, Stored) else await answer for answer in answers]

    def _begin_write(self, write: Write, epoch: int, fresh: list[WantedWrite]) -> Stored | asyncio.Future[Stored]:
        """The answer to a write, if it is known now; else the write joins `fresh`, and the answer is a future."""
        state, key = self.state, write.key
        if key in state.writing:
            return asyncio.ensure_future(_join(state.writing[key].outcome))
        if key in state.ledger.live:
            state.counts.present += 1
            return Stored.PRESENT
        stale = epoch != state.epoch(key)  # it was cleared meanwhile
        if stale or key in state.ledger.dying or not fits(write.sizes, write.sums):  # dying: its name is not free yet
            state.counts.refused += 1
            return Stored.REFUSED
        pending = Pending(epoch, asyncio.get_running_loop().create_future())
        state.writing[key] = pending
        fresh.append(WantedWrite(write, pending, state.record_files.records.most_nbytes(write.sizes) + ALIGN_NBYTES))
        return pending.outcome

    async def _store(self, run: Sequence[WantedWrite], errand: Errand) -> None:
        state = self.state
        admitted: list[WantedWrite] = []
        unwritten: list[WantedWrite] = admitted  # nothing is on the device of their reservations
        try:
            for wanted in run:
                if await self._has_room(wanted.nbytes):
                    admitted.append(wanted)
            if not admitted:
                return
            errand.job = state.threads.submit(
                Urgency.WRITE,
                partial(state.record_files.write, [(wanted.write, wanted.pending.epoch) for wanted in admitted]),
            )
            unwritten = []
            results = await errand.job.done
            if results is None:
                unwritten = admitted
                return
            await self._take_results(admitted, results)
        finally:
            for wanted in unwritten:
                state.ledger.unreserve(wanted.nbytes)
            for wanted in run:
                self._answer(wanted, Stored.REFUSED)

    async def _take_results(self, admitted: Sequence[WantedWrite], results: Sequence[WriteResult]) -> None:
        """Enter the results of a job into the ledger, answer, and delete what must not stay."""
        state, ledger = self.state, self.state.ledger
        void = []  # deleted or cleared meanwhile, or not durable although it must be
        for wanted, result in zip(admitted, results, strict=True):
            key = wanted.write.key
            if result.stored is Stored.STORED:
                ledger.publish(key, wanted.nbytes, result.nbytes)
            elif not result.left:  # a file that stayed behind counts until the next run removes it
                ledger.unreserve(wanted.nbytes)
            if result.stored is Stored.PRESENT and key not in ledger.live:
                ledger.learn(key, result.nbytes)
            self._note_health(result)
            pending = wanted.pending
            is_void = pending.doomed or state.epoch(key) != pending.epoch or bool(result.error)
            if is_void and key in ledger.live:
                void.append((ledger.kill(ledger.live[key]), None))
            self._answer(wanted, Stored.REFUSED if is_void else result.stored)
        await state.remove_files(void)

    def _note_health(self, result: WriteResult) -> None:
        """Note what a result tells about the device."""
        error = result.error
        if error == errno.ESHUTDOWN:
            return
        if error in NO_ROOM:
            self.state.ledger.spare_nbytes = 0  # the next write asks the file system, and makes room
        if error:
            cure = "; free some space, or set disk_size or disk_min_free lower" if error in NO_ROOM else ""
            self.state.note_failure(f"a record cannot be written: {errno.errorcode.get(error, error)}{cure}")
        elif result.stored is Stored.STORED:
            self.state.degraded = ""

    def _answer(self, wanted: WantedWrite, stored: Stored) -> None:
        state = self.state
        if wanted.pending.outcome.done():
            return
        wanted.pending.outcome.set_result(stored)
        state.end_write(wanted.write.key, stored)
        state.counts.stored += stored is Stored.STORED
        state.counts.present += stored is Stored.PRESENT
        state.counts.refused += stored is Stored.REFUSED

    # ---- room

    async def _has_room(self, nbytes: int) -> bool:
        """Count `nbytes` as used, after evicting others where that is needed; False: there is no room for them."""
        ledger = self.state.ledger
        if nbytes > ledger.limit_nbytes:
            return False
        if not self.has_order and ledger.reserve(nbytes):
            return True
        try:
            async with asyncio.timeout(self.state.options.room_s), self._making_room:
                return await self._make_room(nbytes)
        except TimeoutError:
            return False
        except TierUnavailable as error:
            self.state.note_failure(str(error))
            return False

    async def _make_room(self, nbytes: int) -> bool:
        state, ledger = self.state, self.state.ledger
        if self.has_order:
            await state.carry_out(lambda: forget_order(state.record_files))
            self.has_order = False
        for _ in range(_TRIES):
            if ledger.reserve(nbytes):
                return True
            if nbytes > ledger.spare_nbytes:
                await self.measure_free_space()
            victims = ledger.evict(nbytes)
            if not victims and ledger.shortage_nbytes(nbytes) > 0:
                return False
            state.counts.evicted += len(victims)
            await state.remove_files((entry, None) for entry in victims)
            if nbytes > ledger.spare_nbytes:
                await self.measure_free_space()
        return False

    async def measure_free_space(self) -> None:
        """Tell the ledger what the file system has left."""
        free = await self.state.threads.submit(Urgency.DELETE, lambda _: self.state.record_files.free_nbytes()).done
        if free is not None:
            self.state.ledger.spare_nbytes = free


async def _join(outcome: asyncio.Future[Stored]) -> Stored:
    """The answer to a caller whose chunk another caller is writing."""
    stored = await asyncio.shield(outcome)
    return Stored.PRESENT if stored is not Stored.REFUSED else stored
