"""Promotion: records of one directory, verified, into memory that the caller lends.

Knows nothing about pools, deadlines or other tiers. While the directory is still being looked through, a key that is
not known yet is simply tried.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from kvkeep.core.units import NAMESPACE_NBYTES
from kvkeep.tiers.disk.by_range import load_by_range
from kvkeep.tiers.disk.directio import Inode
from kvkeep.tiers.disk.files import Loaded, Verdict
from kvkeep.tiers.disk.ledger import LedgerEntry
from kvkeep.tiers.disk.state import Errand, Holding, batches
from kvkeep.tiers.disk.threads import Urgency
from kvkeep.tiers.record import record_nbytes
from kvkeep.tiers.tier import Read


class Asked(NamedTuple):
    """A read, its place in the answer, the epoch that its record must carry, and its record if it is known."""

    place: int
    read: Read
    epoch: int
    entry: LedgerEntry | None


@dataclass(eq=False)
class DiskReads:
    """Reads from `holding`."""

    holding: Holding
    _guesses: set[asyncio.Task[None]] = field(default_factory=set)  # reads of what is not known

    async def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Which keys are here as far as is known."""
        answers = [key in self.holding.ledger.live for key in keys]
        unknown = [place for place, key in enumerate(keys) if not answers[place] and self._may_be_there(key)]
        if unknown:
            asked = [keys[place] for place in unknown]
            job = self.holding.threads.submit(Urgency.LOAD, lambda _: self.holding.shelf.present(asked))
            for place, there in zip(unknown, await job.done or [], strict=False):
                answers[place] = there
        if False in answers:
            self.holding.ledger.missed(keys[answers.index(False)])
        return answers

    async def load(self, reads: Sequence[Read]) -> list[bytes | None]:
        """Fill the memory of each read; its sums, or None."""
        answers: list[bytes | None] = [None] * len(reads)
        wanted: list[tuple[int, Read]] = []
        for place, read in enumerate(reads):
            if read.key in self.holding.ledger.live or self._may_be_there(read.key):
                wanted.append((place, read))
            else:
                self._missed(read)
        whole = [one for one in wanted if one[1].arrived is None]
        runs = batches(whole, lambda one: record_nbytes(one[1].sizes), self.holding.options.read_batch)
        runs += _dealt([one for one in wanted if one[1].arrived is not None], self.holding.options.threads)
        await self.holding.end([self.holding.begin(partial(self._load, run, answers)) for run in runs])
        return answers

    async def no_guesses(self) -> None:
        """Returns when no unknown record is being read any more."""
        while self._guesses:
            await asyncio.wait(self._guesses)

    def _missed(self, read: Read) -> None:
        self.holding.counts.misses += 1
        if read.gone is not None:
            read.gone()

    def _may_be_there(self, key: bytes) -> bool:
        """Whether a key without an entry may have a record from an earlier boot."""
        holding = self.holding
        if holding.complete or key in holding.ledger.gone or key in holding.ledger.dying:
            return False
        return not holding.epochs.is_unsettled(key[:NAMESPACE_NBYTES])

    async def _load(self, run: Sequence[tuple[int, Read]], answers: list[bytes | None], errand: Errand) -> None:
        holding = self.holding
        found = [Asked(place, read, holding.epoch(read.key), holding.ledger.live.get(read.key)) for place, read in run]
        asked: list[Asked] = []
        for one in found:
            if one.entry is not None or self._may_be_there(one.read.key):
                asked.append(one)
            else:
                self._missed(one.read)
        self._begin(asked, errand)
        reads = [(one.read, one.epoch) for one in asked]
        by_range = run[0][1].arrived is not None and holding.shelf.records.codec is None
        load = partial(load_by_range, holding.shelf) if by_range else holding.shelf.load
        errand.job = holding.threads.submit(Urgency.LOAD, partial(load, reads))
        loaded: list[Loaded] | None = None
        try:
            loaded = await errand.job.done
        finally:
            for one in asked:
                if one.entry is not None:
                    holding.ledger.unpin(one.entry)
        if loaded is None:
            holding.counts.shed += len(asked)
            return
        bad: list[tuple[LedgerEntry, Inode | None]] = []
        for one, got in zip(asked, loaded, strict=True):
            answers[one.place] = self._answer(one, got, bad)
        await holding.bury(bad)

    def _begin(self, asked: Sequence[Asked], errand: Errand) -> None:
        for one in asked:
            if one.entry is not None:
                self.holding.ledger.pin(one.entry)
        task = errand.task
        if task is not None and any(one.entry is None for one in asked):
            self._guesses.add(task)
            task.add_done_callback(self._guesses.discard)

    def _answer(self, one: Asked, got: Loaded, bad: list[tuple[LedgerEntry, Inode | None]]) -> bytes | None:
        """The sums of a good record that is still of its epoch; a bad one joins `bad`."""
        holding, key = self.holding, one.read.key
        if got.verdict is Verdict.GOOD and holding.epoch(key) == one.epoch:
            self._used(one, got)
            holding.counts.hits += 1
            return got.sums
        if got.verdict in (Verdict.ABSENT, Verdict.GOOD):  # a good one has been cleared meanwhile
            self._missed(one.read)
        else:
            holding.counts.misses += 1
        if got.verdict is Verdict.FAILED:
            holding.failed("a record cannot be read")
            if (known := holding.ledger.live.get(key)) is not None:
                known.unreadable = True  # it stays for a device that comes back, until the chunk is stored again
        elif got.verdict is Verdict.BAD:
            holding.counts.corrupt += 1
            if (entry := self._killed(one)) is not None:
                bad.append((entry, got.stat.inode if got.stat else None))
        elif got.verdict is Verdict.ABSENT and one.entry is not None and (entry := self._killed(one)) is not None:
            holding.ledger.buried(entry, 0)
        return None

    def _used(self, one: Asked, got: Loaded) -> None:
        ledger, key = self.holding.ledger, one.read.key
        if key in ledger.live:
            ledger.touch(ledger.live[key])
            ledger.live[key].unreadable = False
        elif one.entry is None and got.stat is not None and self._may_be_there(key) and key not in self.holding.writing:
            ledger.learn(key, got.stat.allocated_nbytes)

    def _killed(self, one: Asked) -> LedgerEntry | None:
        """The record, dying; None if somebody else has ended it, or is about to replace it."""
        ledger, key = self.holding.ledger, one.read.key
        if one.entry is not None:
            return ledger.kill(one.entry) if ledger.live.get(key) is one.entry else None
        if key in ledger.live or key in ledger.dying or key in self.holding.writing:
            return None
        return ledger.kill_unknown(key)


def _dealt(reads: Sequence[tuple[int, Read]], threads: int) -> list[list[tuple[int, Read]]]:
    """Reads by ranges in turn to as many runs as there are threads, so that the first ranges of all come together."""
    return [list(reads[first::threads]) for first in range(min(threads, len(reads)))]
