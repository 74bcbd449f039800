"""The tier over any `Place`: a chunk is one record under the name of its key, made and verified here.

The place keeps names and bytes and decides what it drops to make room. The disk is no `Place`: it makes and verifies
its records with the same `Records`, in its own threads (decision 0040).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from kvkeep.errors import TierUnavailable
from kvkeep.tiers.codec import Codec
from kvkeep.tiers.epochs import EVERYTHING
from kvkeep.tiers.place import Get, Missing, Place, Put
from kvkeep.tiers.place_epochs import PlaceEpochs, read_epochs
from kvkeep.tiers.record import Records, check_payloads, fits, header_nbytes, key_in_name, record_name
from kvkeep.tiers.tasks import in_thread, outlast
from kvkeep.tiers.tier import Bytes, Read, Stored, Write, operation

log = logging.getLogger("kvkeep.tiers")

_NAMES = 256  # how many names are deleted at once


@dataclass(eq=False)
class _Writing:
    """A record that is being written; `doomed`: its key was deleted meanwhile."""

    write: Write
    epoch: int
    outcome: asyncio.Future[Stored]
    doomed: bool = False


@dataclass(frozen=True)
class _RecordRead:
    """A record that is being read: where its header and its payload go."""

    index: int
    read: Read
    epoch: int
    header: Bytes
    payload: Bytes


@dataclass(eq=False)
class RecordTier:
    """The verbs of `Tier` over a place; make it with `open_record_tier`. `name` is the tier's in its errors."""

    name: str
    place: Place
    records: Records
    epochs: PlaceEpochs
    _writing: dict[bytes, _Writing] = field(default_factory=dict)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)  # what goes on if its caller is cancelled
    _unsettled: int = 0  # clears that have not deleted everything yet
    _closed: bool = False

    async def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """As `Tier.contains`."""
        with operation(self.name, "contains"):
            self._check()
            return [nbytes > 0 for nbytes in await self.place.sizes([record_name(key) for key in keys])]

    async def load(self, reads: Sequence[Read]) -> list[bytes | None]:
        """As `Tier.load`; `arrived` is called once for each chunk, when all of it is there."""
        with operation(self.name, "load"):
            self._check()
            return await self._load(reads)

    async def _load(self, reads: Sequence[Read]) -> list[bytes | None]:
        answers: list[bytes | None] = [None] * len(reads)
        bad: list[bytes] = []
        readings = await self._begin_reads(reads, bad)
        gets = [Get(record_name(reading.read.key), [reading.header, reading.payload]) for reading in readings]
        whole: list[_RecordRead] = []
        for reading, got in zip(readings, await self.place.get(gets), strict=True):
            if got == reading.header.nbytes + reading.payload.nbytes:
                whole.append(reading)
            elif got is Missing.ABSENT:
                _tell_gone(reading.read)
            elif got is not Missing.FAILED:
                bad.append(reading.read.key)
        for reading, sums in zip(whole, await in_thread(partial(self._verify, whole)), strict=True):
            if sums is None:
                bad.append(reading.read.key)
            elif reading.epoch == self.epochs.of(reading.read.key):  # else it was cleared meanwhile
                answers[reading.index] = sums
                if reading.read.arrived is not None:
                    reading.read.arrived(len(reading.read.sizes))
        await self.place.delete([record_name(key) for key in bad if key not in self._writing])
        return answers

    async def store(self, writes: Sequence[Write]) -> list[Stored]:
        """As `Tier.store`. What is cleared before this returns is not kept."""
        with operation(self.name, "store"):
            self._check()
            return await self._store(writes)

    async def _store(self, writes: Sequence[Write]) -> list[Stored]:
        check_payloads(writes)
        answers: list[Stored | asyncio.Future[Stored]] = []
        fresh: list[_Writing] = []
        for write in writes:
            if write.key in self._writing:
                answers.append(asyncio.ensure_future(_joined(self._writing[write.key].outcome)))
            elif not fits(write.sizes, write.sums):
                answers.append(Stored.REFUSED)
            else:
                writing = _Writing(write, self.epochs.of(write.key), asyncio.get_running_loop().create_future())
                self._writing[write.key] = writing
                fresh.append(writing)
                answers.append(writing.outcome)
        try:
            await self._write(fresh)
        finally:
            doomed = [
                record_name(writing.write.key) for writing in fresh if writing.doomed and not writing.outcome.done()
            ]
            if doomed:  # this was cancelled, and the place may have them
                self._begin(self.place.delete(doomed))
            for writing in fresh:
                self._answer(writing, Stored.REFUSED)
        return [answer if isinstance(answer, Stored) else await answer for answer in answers]

    async def delete(self, keys: Sequence[bytes]) -> None:
        """As `Tier.delete`; also what is being written."""
        with operation(self.name, "delete"):
            self._check()
            for key in keys:
                if key in self._writing:
                    self._writing[key].doomed = True
            await self.place.delete([record_name(key) for key in keys])

    async def clear(self, namespace: bytes | None) -> None:
        """As `Tier.clear`; goes on if cancelled. TierUnavailable where it is not durable: then it holds for now."""
        with operation(self.name, "clear"):
            self._check()
            task = self._begin(self._clear(namespace))
            await asyncio.wait([task])
            task.result()

    async def aclose(self) -> None:
        """As `Tier.aclose`."""
        if self._closed:
            return
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await outlast(self._tasks)
        await self.place.aclose()

    async def _begin_reads(self, reads: Sequence[Read], bad: list[bytes]) -> list[_RecordRead]:
        """Memory for each record; with a codec the place tells first how long it is. What cannot be one joins `bad`."""
        lengths = [header_nbytes(len(read.sizes)) + sum(read.sizes) for read in reads]
        if self.records.codec is not None:
            lengths = await self.place.sizes([record_name(read.key) for read in reads])
        readings = []
        for index, (read, nbytes) in enumerate(zip(reads, lengths, strict=True)):
            header = np.empty(header_nbytes(len(read.sizes)), np.uint8)
            payload = self.records.payload_memory(read, nbytes - header.nbytes)
            if payload is not None:
                readings.append(_RecordRead(index, read, self.epochs.of(read.key), header, payload=payload))
            elif nbytes:
                bad.append(read.key)
            else:
                _tell_gone(read)
        return readings

    def _verify(self, readings: Sequence[_RecordRead]) -> list[bytes | None]:
        return [
            self.records.verify(reading.header, reading.payload, reading.read, reading.epoch) for reading in readings
        ]

    async def _write(self, fresh: Sequence[_Writing]) -> None:
        """Write what is not there yet, and take back what was deleted or cleared meanwhile."""
        if not self.epochs.durable:
            await self._try_to_keep_epochs()
        missing = []
        for writing, is_there in zip(fresh, await self._find(fresh), strict=True):
            if is_there:
                self._answer(writing, Stored.PRESENT)
            else:
                missing.append(writing)
        kept = await self.place.put(await in_thread(partial(self._make, missing)))
        void = []
        for writing, is_kept in zip(missing, kept, strict=True):
            if is_kept and (writing.doomed or writing.epoch != self.epochs.of(writing.write.key)):
                void.append(writing)
            else:
                self._answer(writing, Stored.STORED if is_kept else Stored.REFUSED)
        await self.place.delete([record_name(writing.write.key) for writing in void])

    async def _find(self, fresh: Sequence[_Writing]) -> list[bool]:
        """Which of these records are there, as far as their headers and lengths tell."""
        names = [record_name(writing.write.key) for writing in fresh]
        sizes = await self.place.sizes(names)
        headers = [np.empty(header_nbytes(len(writing.write.sizes)), np.uint8) for writing in fresh]
        there = [index for index, nbytes in enumerate(sizes) if nbytes]
        got = await self.place.get([Get(names[index], [headers[index]]) for index in there])
        found = [False] * len(fresh)
        for index, nbytes in zip(there, got, strict=True):
            if nbytes == headers[index].nbytes:
                header = self.records.header_of(headers[index], fresh[index].write, fresh[index].epoch)
                found[index] = header is not None and header.nbytes == sizes[index]
        return found

    def _make(self, missing: Sequence[_Writing]) -> list[Put]:
        puts = []
        for writing in missing:
            header = np.empty(header_nbytes(len(writing.write.sizes)), np.uint8)
            payload = self.records.make(writing.write, writing.epoch, header)
            puts.append(Put(record_name(writing.write.key), [header, payload]))
        return puts

    def _answer(self, writing: _Writing, stored: Stored) -> None:
        if not writing.outcome.done():
            writing.outcome.set_result(stored)
            del self._writing[writing.write.key]

    async def _clear(self, namespace: bytes | None) -> None:
        """Raise the epoch, then delete what can be deleted, whether or not the place keeps the epoch."""
        self._unsettled += 1  # for good where this fails: the next start deletes the rest
        try:
            await self.epochs.advance(namespace)
        finally:
            await forget(self.place, f"{namespace.hex()}/" if namespace is not None else "")
        self._unsettled -= 1
        if not self._unsettled:
            await self.epochs.settle()

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _try_to_keep_epochs(self) -> None:
        try:
            await self.epochs.keep()
        except TierUnavailable as error:
            log.debug("the epochs are written later: %s", error)

    def _check(self) -> None:
        if self._closed:
            raise TierUnavailable("the tier is closed")


async def open_record_tier(
    name: str, place: Place, codec: Codec | None = None, clock_ns: Callable[[], int] = time.time_ns
) -> RecordTier:
    """A tier over a place, which it owns from here on; deletes first what a clear of an earlier run left behind.

    TierError where the place does not answer.
    """
    with operation(name, "open"):
        epochs = await read_epochs(place, clock_ns)
        for namespace in epochs.now.unsettled:
            await forget(place, "" if namespace == EVERYTHING else f"{namespace}/")
        if epochs.now.unsettled:
            await epochs.settle()
    return RecordTier(name, place, Records(codec), epochs)


async def forget(place: Place, prefix: str) -> None:
    """Delete every record whose name begins so."""
    doomed: list[str] = []
    async for name in place.names(prefix):
        if key_in_name(name) is not None:
            doomed.append(name)
        if len(doomed) == _NAMES:
            await place.delete(doomed)
            doomed = []
    await place.delete(doomed)


def _tell_gone(read: Read) -> None:
    if read.gone is not None:
        read.gone()


async def _joined(outcome: asyncio.Future[Stored]) -> Stored:
    """The answer to a caller whose chunk another caller is writing."""
    stored = await asyncio.shield(outcome)
    return Stored.PRESENT if stored is not Stored.REFUSED else stored
