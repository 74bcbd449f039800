"""One directory of the disk tier: its verbs, its start, the scan of what the last run left, its end.

It serves from the first moment: until the scan has ended a key that is not known yet is tried, and nothing is written
beyond the bound that a clean end left.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

from kvkeep.config import Disk
from kvkeep.core.policies.policy import UNKNOWN_COST
from kvkeep.core.policies.registry import policy_by_name
from kvkeep.core.units import NAMESPACE_NBYTES
from kvkeep.errors import TierBusy, TierUnavailable
from kvkeep.memory.limits import size_text
from kvkeep.tiers.disk.boot import (
    FoundRecord,
    Order,
    find_records,
    is_empty,
    lock_directory,
    read_order,
    refuse_foreign,
    write_order,
)
from kvkeep.tiers.disk.directio import Files, takes_direct
from kvkeep.tiers.disk.epoch_file import EpochFile
from kvkeep.tiers.disk.files import RecordFiles
from kvkeep.tiers.disk.ledger import Ledger
from kvkeep.tiers.disk.reads import DiskReads
from kvkeep.tiers.disk.state import DiskState, Errand
from kvkeep.tiers.disk.threads import IoThreads, Urgency
from kvkeep.tiers.disk.writes import DiskWrites
from kvkeep.tiers.epochs import VERSION, Epochs
from kvkeep.tiers.record import Records
from kvkeep.tiers.tier import Stored, Write

log = logging.getLogger("kvkeep.disk")

_NOT_DURABLE = (
    "what was cleared in {} may be found again after a restart, since its epochs cannot be written: {}; "
    "make room there, or let kvkeep write to it, and clear again"
)
_SHORT = (
    "%s: disk_size gives it %s and disk_min_free leaves %s to others, and its file system has room for %s of records: "
    "set disk_size or disk_min_free lower, or free some space"
)
_OLD_FORMAT = (
    "%s: its %d records have format version %d, this kvkeep reads version %d only: they are removed now, and count "
    "within disk_size until they are gone"
)
_SLICE = 1000  # records that join the ledger before the event loop does other work


class StartedDirectory(NamedTuple):
    """What the first job finds: the lock that owns the directory, how to read it, what the last run left."""

    lock_fd: int
    record_files: RecordFiles
    epoch_file: EpochFile
    epochs: Epochs
    order: Order | None
    is_empty: bool


@dataclass(eq=False)
class Directory:
    """One directory, owned until `aclose`. Make it with `open_directory`."""

    state: DiskState
    started: StartedDirectory
    reads: DiskReads
    writes: DiskWrites
    clock_ns: Callable[[], int]
    now_s: Callable[[], float]
    scan_s: float = -1.0  # how long the scan took; below 0: it has not ended
    short_nbytes: int = 0  # how much less room than its limit there was at the end of the scan
    _durable: Epochs = field(init=False)  # the epochs that the disk has
    _clears: int = 0  # that are under way
    _persisting: asyncio.Lock = field(default_factory=asyncio.Lock)
    _scan: Errand = field(default_factory=Errand)

    def __post_init__(self) -> None:
        self._durable = self.started.epochs

    async def store(self, writes: Sequence[Write]) -> list[Stored]:
        """Keep chunks. Where the epochs are not durable yet, try that again beside it, without waiting."""
        if not self._is_durable and not self._persisting.locked():
            self.state.begin(lambda _: self._catch_up())
        return await self.writes.store(writes)

    async def delete(self, keys: Sequence[bytes]) -> None:
        """Forget chunks; also those that are being written."""
        ledger, doomed = self.state.ledger, []
        for key in dict.fromkeys(keys):
            if key in self.state.writing:
                self.state.writing[key].doomed = True
            elif key in ledger.live:
                doomed.append(ledger.kill(ledger.live[key]))
            elif not self.state.complete and key not in ledger.dying:
                doomed.append(ledger.kill_unknown(key))
        await self.state.remove_files((entry, None) for entry in doomed)

    async def clear(self, namespace: bytes | None) -> None:
        """Forget a namespace, or everything: raise its epoch, make that durable, then delete; goes on if cancelled.

        TierUnavailable where the epoch cannot be made durable; what can be deleted is deleted all the same.
        """
        task = self.state.begin(lambda _: self._clear(namespace)).task
        assert task is not None, "an errand has begun"
        await asyncio.wait([task])
        task.result()

    async def _clear(self, namespace: bytes | None) -> None:
        state = self.state
        self._clears += 1
        try:
            state.epochs = state.epochs.raised(namespace, self.clock_ns())
            await self._catch_up()
            live = list(state.ledger.live.values())
            doomed = [entry for entry in live if namespace is None or entry.key[:NAMESPACE_NBYTES] == namespace]
            await state.remove_files([(state.ledger.kill(entry), None) for entry in doomed])
            await self._persist()  # if it failed before: a full disk has room now
        finally:
            self._clears -= 1
        await self._settle_epochs()

    async def aclose(self) -> None:
        """End: wait `close_s` at most for what is under way, and leave `order` if all of it has ended."""
        state, limit_s = self.state, self.state.options.close_s
        if state.closed:
            return
        state.closed = True
        state.threads.withdraw_all()
        if state.tasks:
            await asyncio.wait(state.tasks, timeout=limit_s)
        if state.tasks:
            log.warning("%s does not answer; it stays locked until this process ends", state.record_files.root)
            state.threads.close()
            return
        if not self._is_durable:
            await self._wait_at_the_end(asyncio.ensure_future(self._persist()))
        left = None
        if state.ledger.settled and not state.undeleted:
            left = Order([], state.ledger.used_nbytes)._replace(keys=list(state.ledger.order()))
        await self._wait_at_the_end(state.threads.submit(Urgency.WRITE, lambda _: self._leave(left)).done)
        state.threads.close()
        os.close(self.started.lock_fd)

    def _leave(self, order: Order | None) -> None:
        """In a thread: write what the next start reads."""
        try:
            if order is not None:
                write_order(self.state.record_files, order)
        finally:
            self.started.epoch_file.close()

    async def _wait_at_the_end(self, work: asyncio.Future[Any]) -> None:
        """Wait for the last pieces of work, and log a failure, for no caller is left to hear of it."""
        await asyncio.wait([work], timeout=self.state.options.close_s)
        if work.done() and not work.cancelled() and work.exception() is not None:
            log.warning("%s did not end well: %s", self.state.record_files.root, work.exception())

    async def wait_for_scan(self) -> None:
        """Wait until the scan has ended, or failed."""
        if self._scan.task is not None:
            await asyncio.wait([self._scan.task])

    # ---- what the last run left

    def begin_scan(self) -> None:
        """Begin to enter what is there into the ledger."""
        self._scan = self.state.begin(self._scan_all)

    async def _scan_all(self, errand: Errand) -> None:
        state, order = self.state, self.started.order
        began_s = self.now_s()
        errand.job = state.threads.submit(
            Urgency.READ, lambda _: find_records(state.record_files, order.keys if order else ())
        )
        try:
            found = await errand.job.done
        except TierUnavailable as error:
            if not state.closed:
                state.note_failure(f"it cannot be scanned, and nothing is stored: {error}")
            return
        if found is None:
            return
        if found and self.started.epoch_file.found_version != VERSION:
            log.warning(
                _OLD_FORMAT, state.record_files.root, len(found), self.started.epoch_file.found_version, VERSION
            )
        await self._take_in(found if evicts_oldest(state.options.policy) else found[::-1])
        state.complete = True
        await self.reads.wait_for_guesses()
        state.ledger.settle()
        self.scan_s = self.now_s() - began_s
        log.info("%s: %d records, %.2f s", state.record_files.root, len(state.ledger.live), self.scan_s)
        await state.remove_files((entry, None) for entry in state.ledger.evict(0))
        await self._settle_epochs()
        await self._compare_room()

    async def _compare_room(self) -> None:
        """Warn if the file system has less room than the limit and `min_free` ask for."""
        state, ledger, options = self.state, self.state.ledger, self.state.options
        try:
            free_nbytes = await state.threads.submit(Urgency.DELETE, lambda _: state.record_files.free_nbytes()).done
        except TierUnavailable as error:
            log.debug("what is free is not known: %s", error)
            return
        if free_nbytes is None:
            return
        room_nbytes = ledger.used_nbytes + max(0, free_nbytes)
        self.short_nbytes = max(0, ledger.limit_nbytes - room_nbytes)
        if self.short_nbytes:
            sizes = (ledger.limit_nbytes, options.min_free, room_nbytes)
            log.warning(_SHORT, state.record_files.root, *map(size_text, sizes))

    async def _take_in(self, found: Sequence[FoundRecord]) -> None:
        """Enter what the scan found into the ledger; in cleared namespaces only records of the epoch of now."""
        state = self.state
        suspects = []
        for at in range(0, len(found), _SLICE):
            for record in found[at : at + _SLICE]:
                if state.count_if_being_written(record.key, record.allocated_nbytes):
                    continue
                if state.epochs.is_unsettled(record.key[:NAMESPACE_NBYTES]):
                    suspects.append(record)
                else:
                    state.ledger.adopt(record.key, record.allocated_nbytes)
            await asyncio.sleep(0)
        for at in range(0, len(suspects), _SLICE):
            await self._sift(suspects[at : at + _SLICE])

    async def _sift(self, suspects: Sequence[FoundRecord]) -> None:
        """Read the headers of records in cleared namespaces, and delete those of an older epoch."""
        state, ledger = self.state, self.state.ledger
        job = state.threads.submit(
            Urgency.DELETE, lambda scratch: [state.record_files.epoch_of(record.key, scratch) for record in suspects]
        )
        stale = []
        for (key, nbytes), epoch in zip(suspects, await job.done or [], strict=False):
            if key in ledger.live or state.count_if_being_written(key, nbytes):
                continue
            ledger.adopt(key, nbytes)
            if key in ledger.live and epoch != state.epoch(key):
                stale.append(ledger.kill(ledger.live[key]))
        await state.remove_files((entry, None) for entry in stale)

    # ---- epochs

    @property
    def _is_durable(self) -> bool:
        return self._durable is self.state.epochs

    async def _persist(self) -> None:
        """Make the epochs of now durable, or raise TierUnavailable; of several callers one writes for all."""
        state = self.state
        async with self._persisting:
            if self._is_durable:
                return
            epochs = state.epochs
            try:
                await state.carry_out(lambda: self.started.epoch_file.write(epochs))
            except TierUnavailable as error:
                raise TierUnavailable(_NOT_DURABLE.format(state.record_files.root, error)) from error
            self._durable = epochs

    async def _catch_up(self) -> None:
        """The same, but only note a failure: the next store tries again."""
        try:
            await self._persist()
        except TierUnavailable as error:
            self.state.note_failure(str(error))
        except TierBusy as error:
            log.debug("the epochs are written later: %s", error)

    async def _settle_epochs(self) -> None:
        """Note in the epochs that no old record is left, once that is so; losing the note costs a look at headers."""
        state = self.state
        if self._clears or not state.complete or state.undeleted or not state.epochs.unsettled:
            return
        state.epochs = state.epochs.settled()
        await self._catch_up()


async def open_directory(
    options: Disk, root: str, files: Files, clock_ns: Callable[[], int], records: Records
) -> Directory:
    """Own a directory and begin its scan.

    TierOwned where another process owns it, TierUnavailable where it cannot be used within `open_s`.
    """
    threads = IoThreads(options.threads, options.queue_jobs, f"kvkeep-disk-{os.path.basename(root)}")
    opened: list[DiskState] = []  # filled below: the files need to know when the state is closed
    record_files = RecordFiles(
        root,
        files,
        direct=False,
        durability=options.durability,
        min_free_nbytes=options.min_free,
        start_id=secrets.token_hex(8),
        numbers=count(),
        is_closed=lambda: any(state.closed for state in opened),
        records=records,
    )
    job = threads.submit(Urgency.READ, lambda _: _start(record_files, options.direct, clock_ns()))
    try:
        started = await _wait_for_start(job.done, options.open_s, root)
    except (TierUnavailable, asyncio.CancelledError):
        threads.close()
        raise
    limit_nbytes = options.size // len(options.path)
    bound_nbytes = 0 if started.is_empty else started.order.used_nbytes if started.order else limit_nbytes
    ledger = Ledger(limit_nbytes, policy_by_name(options.policy), bound_nbytes)
    state = DiskState(options, started.record_files, threads, ledger, epochs=started.epochs)
    opened.append(state)
    now_s = asyncio.get_running_loop().time
    directory = Directory(state, started, DiskReads(state), DiskWrites(state), clock_ns=clock_ns, now_s=now_s)
    directory.begin_scan()
    return directory


async def _wait_for_start(
    starting: asyncio.Future[StartedDirectory | None], limit_s: float, root: str
) -> StartedDirectory:
    """What the first job finds; TierUnavailable where it takes too long, and then the job gives the lock back."""
    try:
        await asyncio.wait([starting], timeout=limit_s)
    finally:
        if not starting.done():
            starting.add_done_callback(_give_back)
    if not starting.done():
        raise TierUnavailable(f"{root} does not answer within {limit_s} s")
    started = starting.result()
    assert started is not None, "the first job was not queued"
    return started


def evicts_oldest(policy_name: str) -> bool:
    """Whether a policy evicts the first of two new keys; else the keys of the last run enter it in reverse order."""
    policy = policy_by_name(policy_name)
    for key in (b"first", b"second"):
        policy.insert(key, 1, UNKNOWN_COST)
    return policy.evict() == b"first"


def _give_back(starting: asyncio.Future[StartedDirectory | None]) -> None:
    started = None if starting.cancelled() or starting.exception() else starting.result()
    if started is not None:
        os.close(started.lock_fd)


def _start(record_files: RecordFiles, direct: bool, now_ns: int) -> StartedDirectory:
    refuse_foreign(record_files.root)
    lock_fd = lock_directory(record_files.files, record_files.root)
    try:
        record_files = record_files._replace(
            direct=direct and takes_direct(record_files.files, record_files.state_path)
        )
        order, empty, epoch_file = read_order(record_files), is_empty(record_files), EpochFile(record_files)
        epochs = epoch_file.read(now_ns)
        return StartedDirectory(lock_fd, record_files, epoch_file, epochs, order=order, is_empty=empty)
    except OSError:
        os.close(lock_fd)
        raise
