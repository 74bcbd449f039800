"""What reads, writes and the scan of one directory share: its files, threads, ledger, epochs, and what is under way.

One event loop owns it, so nothing is locked. It starts the work of the verbs and ends it, so that no memory is given
back while a thread may touch it.
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
from kvkeep.tiers.disk.files import RecordFiles
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
    """How often each thing has happened since the start."""

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

    `found_nbytes` are those of a file that the scan found under its name: of an earlier run, or its own.
    """

    epoch: int
    outcome: asyncio.Future[Stored]
    doomed: bool = False
    found_nbytes: int = 0


@dataclass(eq=False)
class Errand:
    """Work under way: its task, and the I/O job that the task waits for, if it waits for one."""

    task: asyncio.Task[None] | None = None
    job: IoJob[Any] | None = None


@dataclass(eq=False)
class DiskState:
    """One directory as the event loop knows it.

    `complete`: the scan has ended, and every record of earlier runs is in the ledger or is being deleted.
    """

    options: Disk
    record_files: RecordFiles
    threads: IoThreads
    ledger: Ledger
    epochs: Epochs
    counts: Counts = field(default_factory=Counts)
    writing: dict[bytes, Pending] = field(default_factory=dict)
    undeleted: dict[bytes, LedgerEntry] = field(default_factory=dict)  # their unlink failed; the next write tries again
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    complete: bool = False
    closed: bool = False
    degraded: str = ""
    times_degraded: int = 0  # how often `degraded` was set anew

    def epoch(self, key: bytes) -> int:
        """The epoch that the key's record must carry now."""
        return self.epochs.of(key[:NAMESPACE_NBYTES])

    def note_failure(self, why: str) -> None:
        """Count an error of the device; the log has the first, second, fourth, eighth ... that it recovered from."""
        self.counts.errors += 1
        if not self.degraded:
            self.times_degraded += 1
            if self.times_degraded & (self.times_degraded - 1) == 0:
                log.warning("%s is degraded (time %d): %s", self.record_files.root, self.times_degraded, why)
        self.degraded = why

    def begin(self, work: Callable[[Errand], Awaitable[None]]) -> Errand:
        """Start work that goes on if the caller is cancelled."""
        errand = Errand()

        async def run() -> None:
            await work(errand)

        errand.task = asyncio.get_running_loop().create_task(run())
        self.tasks.add(errand.task)
        errand.task.add_done_callback(self.tasks.discard)
        return errand

    async def end(self, errands: Sequence[Errand]) -> None:
        """Wait for work that touches lent memory; where the caller is cancelled, wait for what has begun and raise."""
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

    def count_if_being_written(self, key: bytes, nbytes: int) -> bool:
        """Whether the record is being written; then the `nbytes` that the scan found count until the write ends."""
        pending = self.writing.get(key)
        if pending is not None:
            pending.found_nbytes = nbytes
            self.ledger.count(nbytes)
        return pending is not None

    def end_write(self, key: bytes, stored: Stored) -> None:
        """End a write: a file that the scan found meanwhile joins the ledger, if it is not what was written."""
        pending = self.writing.pop(key)
        self.ledger.count(-pending.found_nbytes)
        known = key in self.ledger.live or key in self.ledger.dying
        if pending.found_nbytes and stored is Stored.REFUSED and not known:
            entry = self.ledger.learn(key, pending.found_nbytes)
            if pending.doomed or self.epoch(key) != pending.epoch:
                self.undeleted[key] = self.ledger.kill(entry)

    async def carry_out(self, call: Callable[[], None]) -> None:
        """Make a call in a thread; TierUnavailable where it fails, TierBusy where too many calls wait already."""

        def called(_: Scratch) -> bool:
            call()
            return True

        if not await self.threads.submit(Urgency.DELETE, called).done:
            if self.closed:
                raise TierUnavailable(f"{self.record_files.root} is closed")
            raise TierBusy(f"too much is waiting for {self.record_files.root}")

    async def remove_files(self, doomed: Iterable[tuple[LedgerEntry, Inode | None]]) -> None:
        """Remove the files of dying records, with an inode only that very file; goes on if cancelled."""
        waiting = [(entry, inode) for entry, inode in doomed if not entry.unlinking]
        for entry, _ in waiting:
            entry.unlinking = True
            self.undeleted.pop(entry.key, None)
        batches = [waiting[at : at + _UNLINKS] for at in range(0, len(waiting), _UNLINKS)]
        errands = [self.begin(lambda errand, batch=batch: self._remove_batch(batch, errand)) for batch in batches]  # type: ignore[misc]
        await _all({errand.task for errand in errands if errand.task is not None})

    async def _remove_batch(self, batch: Sequence[tuple[LedgerEntry, Inode | None]], errand: Errand) -> None:
        keys = [(entry.key, inode) for entry, inode in batch]
        errand.job = self.threads.submit(Urgency.DELETE, lambda _: self.record_files.delete(keys))
        gone: list[int] = []
        try:
            gone = await errand.job.done or []
        finally:
            for index, (entry, _) in enumerate(batch):
                entry.unlinking = False
                if index < len(gone) and gone[index] >= 0:
                    self.ledger.forget(entry, gone[index])
                else:
                    self.undeleted[entry.key] = entry
        if min(gone, default=0) < 0:
            self.note_failure("a file cannot be removed")

    async def survey(self) -> None:
        """Measure all records anew, after a file turned out to take less than was counted for it.

        While another survey runs this returns at once, with a count that may be too high.
        """
        entries = self.ledger.begin_survey()
        if entries is None:
            return
        keys, sizes = [entry.key for entry in entries], None
        try:
            sizes = await self.threads.submit(Urgency.DELETE, lambda _: self.record_files.sizes(keys)).done
        except TierUnavailable as error:
            self.note_failure(str(error))
        finally:
            self.ledger.end_survey(dict(zip(entries, sizes, strict=True)) if sizes is not None else None)


def batches(items: Sequence[T], nbytes: Callable[[T], int], most_nbytes: int) -> list[list[T]]:
    """The items in their order, in runs of at most `_RECORDS` and `most_nbytes`; a larger item is a run of its own."""
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
    """Wait; cancelling this cancels no task."""
    if tasks:
        await asyncio.wait(tasks)
