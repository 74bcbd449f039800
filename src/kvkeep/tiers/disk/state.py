"""What the parts of the disk tier share about one directory: its files, its threads, its ledger, what is under way.

One event loop owns it, nothing is locked. Knows nothing about the verbs; it starts their errands and ends them, so that
no memory is given back while a thread may touch it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kvkeep.config import Disk
from kvkeep.core.units import NAMESPACE_NBYTES
from kvkeep.errors import TierBusy, TierUnavailable
from kvkeep.tiers.disk.directio import Inode
from kvkeep.tiers.disk.files import Shelf
from kvkeep.tiers.disk.ledger import Ledger, LedgerEntry
from kvkeep.tiers.disk.threads import IoJob, IoThreads, Scratch, Urgency
from kvkeep.tiers.epochs import Epochs
from kvkeep.tiers.tasks import outlast
from kvkeep.tiers.tier import Stored

log = logging.getLogger("kvkeep.disk")

T = TypeVar("T")
_UNLINKS = 64  # a job
_RECORDS = 256  # a job: threads that share the GIL take longer over many small jobs than one does


@dataclass(eq=False)
class Counts:
    """What happened so far."""

    hits: int = 0
    misses: int = 0
    stored: int = 0
    present: int = 0
    refused: int = 0
    evicted: int = 0
    corrupt: int = 0
    errors: int = 0
    shed: int = 0


@dataclass(eq=False)
class Pending:
    """A record that is being written; `doomed`: it was deleted meanwhile.

    `found_nbytes` are those of a file that the look through found under its name: of an earlier boot, or its own.
    """

    epoch: int
    outcome: asyncio.Future[Stored]
    doomed: bool = False
    found_nbytes: int = 0


@dataclass(eq=False)
class Errand:
    """Work under way: its task, and the job that it waits for, if it has come so far."""

    task: asyncio.Task[None] | None = None
    job: IoJob[Any] | None = None


@dataclass(eq=False)
class Holding:
    """One directory as the loop sees it. `complete`: every record of earlier boots is known or under way to be gone."""

    options: Disk
    shelf: Shelf
    threads: IoThreads
    ledger: Ledger
    epochs: Epochs
    counts: Counts = field(default_factory=Counts)
    writing: dict[bytes, Pending] = field(default_factory=dict)
    unburied: dict[bytes, LedgerEntry] = field(default_factory=dict)  # an unlink failed: tried again
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    complete: bool = False
    closed: bool = False
    degraded: str = ""
    turns_bad: int = 0  # how often it became degraded

    def epoch(self, key: bytes) -> int:
        """What the key's record must carry now."""
        return self.epochs.of(key[:NAMESPACE_NBYTES])

    def failed(self, why: str) -> None:
        """Counts an error of the device; one that comes and goes is said the first, second, fourth, eighth ... time."""
        self.counts.errors += 1
        if not self.degraded:
            self.turns_bad += 1
            if self.turns_bad & (self.turns_bad - 1) == 0:
                log.warning("%s is degraded (time %d): %s", self.shelf.root, self.turns_bad, why)
        self.degraded = why

    def begin(self, work: Callable[[Errand], Awaitable[None]]) -> Errand:
        """Starts work that goes on whatever becomes of the caller."""
        errand = Errand()

        async def run() -> None:
            await work(errand)

        errand.task = asyncio.get_running_loop().create_task(run())
        self.tasks.add(errand.task)
        errand.task.add_done_callback(self.tasks.discard)
        return errand

    async def end(self, errands: Sequence[Errand]) -> None:
        """Waits for work that touches lent memory; where the caller is cancelled, for what has begun, then raises."""
        tasks = {errand.task for errand in errands if errand.task is not None}
        try:
            await _all(tasks)
        except asyncio.CancelledError:
            for errand in errands:
                if errand.job is not None:
                    self.threads.withdraw(errand.job)
                elif errand.task is not None:
                    errand.task.cancel()  # it waits for room, and no thread has its memory yet
            await outlast(tasks)
            raise
        for task in tasks:
            task.result()

    def meet(self, key: bytes, nbytes: int) -> bool:
        """A file was found under the name of a record that is being written: it counts until the write has ended."""
        pending = self.writing.get(key)
        if pending is not None:
            pending.found_nbytes = nbytes
            self.ledger.count(nbytes)
        return pending is not None

    def part(self, key: bytes, stored: Stored) -> None:
        """The write has ended: what was found is its own, is known, or is left alone and joins the ledger."""
        pending = self.writing.pop(key)
        self.ledger.count(-pending.found_nbytes)
        known = key in self.ledger.live or key in self.ledger.dying
        if pending.found_nbytes and stored is Stored.REFUSED and not known:
            entry = self.ledger.learn(key, pending.found_nbytes)
            if pending.doomed or self.epoch(key) != pending.epoch:
                self.unburied[key] = self.ledger.kill(entry)

    async def carry_out(self, call: Callable[[], None]) -> None:
        """Runs a call in a thread; TierUnavailable where it failed, TierBusy where too much waits for the threads."""

        def called(_: Scratch) -> bool:
            call()
            return True

        if not await self.threads.submit(Urgency.DELETE, called).done:
            if self.closed:
                raise TierUnavailable(f"{self.shelf.root} is closed")
            raise TierBusy(f"too much is waiting for {self.shelf.root}")

    async def bury(self, doomed: Iterable[tuple[LedgerEntry, Inode | None]]) -> None:
        """Removes the files of dying records, only the named ones where an inode is given; goes on if cancelled."""
        waiting = [(entry, inode) for entry, inode in doomed if not entry.burying]
        for entry, _ in waiting:
            entry.burying = True
            self.unburied.pop(entry.key, None)
        batches = [waiting[at : at + _UNLINKS] for at in range(0, len(waiting), _UNLINKS)]
        errands = [self.begin(lambda errand, batch=batch: self._unlink(batch, errand)) for batch in batches]  # type: ignore[misc]
        await _all({errand.task for errand in errands if errand.task is not None})

    async def _unlink(self, batch: Sequence[tuple[LedgerEntry, Inode | None]], errand: Errand) -> None:
        keys = [(entry.key, inode) for entry, inode in batch]
        errand.job = self.threads.submit(Urgency.DELETE, lambda _: self.shelf.delete(keys))
        gone: list[int] = []
        try:
            gone = await errand.job.done or []
        finally:
            for place, (entry, _) in enumerate(batch):
                entry.burying = False
                if place < len(gone) and gone[place] >= 0:
                    self.ledger.buried(entry, gone[place])
                else:
                    self.unburied[entry.key] = entry
        if min(gone, default=0) < 0:
            self.failed("a file cannot be removed")

    async def survey(self) -> None:
        """Counts anew what the records take, after a file turned out to take less than was counted for it.

        Where somebody does so already, this goes on with the count as it is, which may be too high.
        """
        entries = self.ledger.survey()
        if entries is None:
            return
        keys, sizes = [entry.key for entry in entries], None
        try:
            sizes = await self.threads.submit(Urgency.DELETE, lambda _: self.shelf.sizes(keys)).done
        except TierUnavailable as error:
            self.failed(str(error))
        finally:
            self.ledger.surveyed(dict(zip(entries, sizes, strict=True)) if sizes is not None else None)


def batches(items: Sequence[T], nbytes: Callable[[T], int], most_nbytes: int) -> list[list[T]]:
    """The items in their order, in runs of at most `_RECORDS` and `most_nbytes`; one that is larger is alone."""
    runs: list[list[T]] = []
    room = 0
    for item in items:
        size = nbytes(item)
        if not runs or size > room or len(runs[-1]) == _RECORDS:
            runs.append([])
            room = most_nbytes
        runs[-1].append(item)
        room -= size
    return runs


async def _all(tasks: set[asyncio.Task[None]]) -> None:
    """Waits; cancelling this cancels none of them."""
    if tasks:
        await asyncio.wait(tasks)
