"""One directory of the disk tier: its verbs, its start, the look through what is there, its end.

Knows nothing about other directories. It serves from the first moment: until every name has been looked through, what
is not known is tried, and nothing is stored beyond the bound that a clean end left.
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
    FoundRecords,
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
from kvkeep.tiers.disk.files import Shelf
from kvkeep.tiers.disk.ledger import Ledger
from kvkeep.tiers.disk.reads import DiskReads
from kvkeep.tiers.disk.state import Errand, Holding
from kvkeep.tiers.disk.threads import IoThreads, Urgency
from kvkeep.tiers.disk.writes import DiskWrites
from kvkeep.tiers.epochs import VERSION, Epochs
from kvkeep.tiers.records import Records
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
_SLICE = 1000  # records that are taken in before others get the loop


class StartedDirectory(NamedTuple):
    """What the first job finds: who owns the directory, how it is read, what an earlier boot left."""

    lock_fd: int
    shelf: Shelf
    epoch_file: EpochFile
    epochs: Epochs
    order: Order | None
    is_empty: bool


@dataclass(eq=False)
class Drive:
    """One directory, owned until `aclose`."""

    holding: Holding
    started: StartedDirectory
    loads: DiskReads
    stores: DiskWrites
    clock_ns: Callable[[], int]
    now_s: Callable[[], float]
    scan_s: float = -1.0  # how long the look through took; below 0: it is not over
    short_nbytes: int = 0  # how much less room than its limit there was when all was looked through
    _durable: Epochs = field(init=False)  # the epochs that the disk has
    _clears: int = 0
    _persisting: asyncio.Lock = field(default_factory=asyncio.Lock)
    _scan: Errand = field(default_factory=Errand)

    def __post_init__(self) -> None:
        self._durable = self.started.epochs

    async def store(self, writes: Sequence[Write]) -> list[Stored]:
        """Keep chunks; epochs that could not be made durable are tried again, for which these do not wait."""
        if not self._is_durable and not self._persisting.locked():
            self.holding.begin(lambda _: self._catch_up())
        return await self.stores.store(writes)

    async def delete(self, keys: Sequence[bytes]) -> None:
        """Forget chunks; also those that are being written."""
        ledger, doomed = self.holding.ledger, []
        for key in dict.fromkeys(keys):
            if key in self.holding.writing:
                self.holding.writing[key].doomed = True
            elif key in ledger.live:
                doomed.append(ledger.kill(ledger.live[key]))
            elif not self.holding.complete and key not in ledger.dying:
                doomed.append(ledger.kill_unknown(key))
        await self.holding.bury((entry, None) for entry in doomed)

    async def clear(self, namespace: bytes | None) -> None:
        """Forget a namespace, or everything: raise its epoch, make that durable, then delete; goes on if cancelled.

        Where it cannot be made durable, what can be deleted is deleted, and it raises TierUnavailable.
        """
        task = self.holding.begin(lambda _: self._clear(namespace)).task
        assert task is not None, "an errand has begun"
        await asyncio.wait([task])
        task.result()

    async def _clear(self, namespace: bytes | None) -> None:
        holding = self.holding
        self._clears += 1
        try:
            holding.epochs = holding.epochs.raised(namespace, self.clock_ns())
            await self._catch_up()
            live = list(holding.ledger.live.values())
            doomed = [one for one in live if namespace is None or one.key[:NAMESPACE_NBYTES] == namespace]
            await holding.bury([(holding.ledger.kill(one), None) for one in doomed])
            await self._persist()  # where it failed before: a full disk has room now
        finally:
            self._clears -= 1
        await self._settle_epochs()

    async def aclose(self) -> None:
        """End: nothing new, at most `close_s` for what is under way; leave the order if all of it came to an end."""
        holding, limit_s = self.holding, self.holding.options.close_s
        if holding.closed:
            return
        holding.closed = True
        holding.threads.withdraw_all()
        if holding.tasks:
            await asyncio.wait(holding.tasks, timeout=limit_s)
        if holding.tasks:
            log.warning("%s does not answer; it stays locked until this process ends", holding.shelf.root)
            holding.threads.close()
            return
        if not self._is_durable:
            await self._in_the_end(asyncio.ensure_future(self._persist()))
        left = None
        if holding.ledger.settled and not holding.unburied:
            left = Order([], holding.ledger.used_nbytes)._replace(keys=list(holding.ledger.order()))
        await self._in_the_end(holding.threads.submit(Urgency.STORE, lambda _: self._leave(left)).done)
        holding.threads.close()
        os.close(self.started.lock_fd)

    def _leave(self, order: Order | None) -> None:
        """In a thread: what the next start finds."""
        try:
            if order is not None:
                write_order(self.holding.shelf, order)
        finally:
            self.started.epoch_file.close()

    async def _in_the_end(self, work: asyncio.Future[Any]) -> None:
        """Waits for one more piece of work; what went wrong is said, since nobody asks any more."""
        await asyncio.wait([work], timeout=self.holding.options.close_s)
        if work.done() and not work.cancelled() and work.exception() is not None:
            log.warning("%s did not end well: %s", self.holding.shelf.root, work.exception())

    async def looked_through(self) -> None:
        """Returns when what an earlier boot left is known, or cannot be."""
        if self._scan.task is not None:
            await asyncio.wait([self._scan.task])

    # ---- what an earlier boot left

    def look_through(self) -> None:
        """Begins to take in what is there."""
        self._scan = self.holding.begin(self._look_through)

    async def _look_through(self, errand: Errand) -> None:
        holding, order = self.holding, self.started.order
        began_s = self.now_s()
        errand.job = holding.threads.submit(
            Urgency.LOAD, lambda _: find_records(holding.shelf, order.keys if order else ())
        )
        try:
            found = await errand.job.done
        except TierUnavailable as error:
            if not holding.closed:
                holding.failed(f"it cannot be looked through, and nothing is stored: {error}")
            return
        if found is None:
            return
        if found and self.started.epoch_file.found_version != VERSION:
            log.warning(_OLD_FORMAT, holding.shelf.root, len(found), self.started.epoch_file.found_version, VERSION)
        await self._take_in(found if evicts_oldest(holding.options.policy) else found[::-1])
        holding.complete = True
        await self.loads.no_guesses()
        holding.ledger.settle()
        self.scan_s = self.now_s() - began_s
        log.info("%s: %d records, %.2f s", holding.shelf.root, len(holding.ledger.live), self.scan_s)
        await holding.bury((entry, None) for entry in holding.ledger.evict(0))
        await self._settle_epochs()
        await self._compare_room()

    async def _compare_room(self) -> None:
        """Says so where the file system has less room than the limit and what is to stay free."""
        holding, ledger, options = self.holding, self.holding.ledger, self.holding.options
        try:
            free_nbytes = await holding.threads.submit(Urgency.DELETE, lambda _: holding.shelf.free_nbytes()).done
        except TierUnavailable as error:
            log.debug("what is free is not known: %s", error)
            return
        if free_nbytes is None:
            return
        room_nbytes = ledger.used_nbytes + max(0, free_nbytes)
        self.short_nbytes = max(0, ledger.limit_nbytes - room_nbytes)
        if self.short_nbytes:
            sizes = (ledger.limit_nbytes, options.min_free, room_nbytes)
            log.warning(_SHORT, holding.shelf.root, *map(size_text, sizes))

    async def _take_in(self, found: Sequence[FoundRecords]) -> None:
        """What was found joins the ledger; in namespaces that were cleared only what carries the epoch of now."""
        holding = self.holding
        suspects = []
        for at in range(0, len(found), _SLICE):
            for one in found[at : at + _SLICE]:
                if holding.meet(one.key, one.allocated_nbytes):
                    continue
                if holding.epochs.is_unsettled(one.key[:NAMESPACE_NBYTES]):
                    suspects.append(one)
                else:
                    holding.ledger.adopt(one.key, one.allocated_nbytes)
            await asyncio.sleep(0)
        for at in range(0, len(suspects), _SLICE):
            await self._sift(suspects[at : at + _SLICE])

    async def _sift(self, suspects: Sequence[FoundRecords]) -> None:
        holding, ledger = self.holding, self.holding.ledger
        job = holding.threads.submit(
            Urgency.DELETE, lambda scratch: [holding.shelf.epoch_of(one.key, scratch) for one in suspects]
        )
        stale = []
        for one, epoch in zip(suspects, await job.done or [], strict=False):
            if one.key in ledger.live or holding.meet(one.key, one.allocated_nbytes):
                continue
            ledger.adopt(one.key, one.allocated_nbytes)
            if one.key in ledger.live and epoch != holding.epoch(one.key):
                stale.append(ledger.kill(ledger.live[one.key]))
        await holding.bury((entry, None) for entry in stale)

    # ---- epochs

    @property
    def _is_durable(self) -> bool:
        return self._durable is self.holding.epochs

    async def _persist(self) -> None:
        """The epochs of now are durable, or TierUnavailable; of many that wait for it one writes."""
        holding = self.holding
        async with self._persisting:
            if self._is_durable:
                return
            epochs = holding.epochs
            try:
                await holding.carry_out(lambda: self.started.epoch_file.write(epochs))
            except TierUnavailable as error:
                raise TierUnavailable(_NOT_DURABLE.format(holding.shelf.root, error)) from error
            self._durable = epochs

    async def _catch_up(self) -> None:
        """The same; where it fails that is noted, and it is tried again later."""
        try:
            await self._persist()
        except TierUnavailable as error:
            self.holding.failed(str(error))
        except TierBusy as error:
            log.debug("the epochs are written later: %s", error)

    async def _settle_epochs(self) -> None:
        """Notes that no old record lies about, once that is so; losing the note costs a look at headers."""
        holding = self.holding
        if self._clears or not holding.complete or holding.unburied or not holding.epochs.unsettled:
            return
        holding.epochs = holding.epochs.settled()
        await self._catch_up()


async def open_drive(options: Disk, root: str, files: Files, clock_ns: Callable[[], int], records: Records) -> Drive:
    """Own a directory; TierOwned where another process does, TierUnavailable where it cannot be used in `open_s`."""
    threads = IoThreads(options.threads, options.queue_jobs, f"kvkeep-disk-{os.path.basename(root)}")
    closed: list[Holding] = []
    shelf = Shelf(
        root,
        files,
        direct=False,
        durability=options.durability,
        min_free_nbytes=options.min_free,
        boot=secrets.token_hex(8),
        numbers=count(),
        is_closed=lambda: any(one.closed for one in closed),
        records=records,
    )
    job = threads.submit(Urgency.LOAD, lambda _: _start(shelf, options.direct, clock_ns()))
    try:
        started = await _in_time(job.done, options.open_s, root)
    except (TierUnavailable, asyncio.CancelledError):
        threads.close()
        raise
    limit_nbytes = options.size // len(options.path)
    bound_nbytes = 0 if started.is_empty else started.order.used_nbytes if started.order else limit_nbytes
    ledger = Ledger(limit_nbytes, policy_by_name(options.policy), bound_nbytes)
    holding = Holding(options, started.shelf, threads, ledger, started.epochs)
    closed.append(holding)
    now_s = asyncio.get_running_loop().time
    drive = Drive(holding, started, DiskReads(holding), DiskWrites(holding), clock_ns, now_s)
    drive.look_through()
    return drive


async def _in_time(starting: asyncio.Future[StartedDirectory | None], limit_s: float, root: str) -> StartedDirectory:
    """What the first job finds; where that is too late for whoever opens, it gives the directory back when it comes."""
    try:
        await asyncio.wait([starting], timeout=limit_s)
    finally:
        if not starting.done():
            starting.add_done_callback(_give_back)
    if not starting.done():
        raise TierUnavailable(f"{root} does not answer within {limit_s} s")
    started = starting.result()
    assert started is not None, "the first job was not taken"
    return started


def evicts_oldest(policy_name: str) -> bool:
    """Whether of two keys a policy evicts the one that came first: then it takes keys back in their order."""
    policy = policy_by_name(policy_name)
    for key in (b"first", b"second"):
        policy.insert(key, 1, UNKNOWN_COST)
    return policy.evict() == b"first"


def _give_back(starting: asyncio.Future[StartedDirectory | None]) -> None:
    started = None if starting.cancelled() or starting.exception() else starting.result()
    if started is not None:
        os.close(started.lock_fd)


def _start(shelf: Shelf, direct: bool, now_ns: int) -> StartedDirectory:
    refuse_foreign(shelf.root)
    lock_fd = lock_directory(shelf.files, shelf.root)
    try:
        shelf = shelf._replace(direct=direct and takes_direct(shelf.files, shelf.state_path))
        order, empty, epoch_file = read_order(shelf), is_empty(shelf), EpochFile(shelf)
        return StartedDirectory(lock_fd, shelf, epoch_file, epoch_file.read(now_ns), order, empty)
    except OSError:
        os.close(lock_fd)
        raise
