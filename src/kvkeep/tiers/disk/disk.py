"""The disk tier: chunks as files of one or several directories, bounded, verified, found again after a restart.

Spreads keys over the directories, each of which is on its own: its limit, its threads, its owner's lock. Knows nothing
about the pool or the network.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import msgspec

from kvkeep.config import Disk
from kvkeep.errors import TierError, TierUnavailable
from kvkeep.tiers.disk.directio import Files, posix_files
from kvkeep.tiers.disk.directory import Drive, open_drive
from kvkeep.tiers.records import RAW_RECORDS, Records
from kvkeep.tiers.tasks import outlast
from kvkeep.tiers.tier import Read, Stored, Write, operation

DISK = "disk"

A = TypeVar("A")
B = TypeVar("B")


class DiskFigures(msgspec.Struct, frozen=True):
    """The tier as it is now: sizes in bytes, counts since the start; `scan_s` < 0: not everything was looked through.

    `short_nbytes`: how much less room than its limit there was at the start. `stalled` are files that could not be
    removed; `degraded` says how the device was last found failing, or "".
    """

    used_nbytes: int
    limit_nbytes: int
    short_nbytes: int
    records: int
    direct: bool
    scan_s: float
    degraded: str
    stalled: int
    hits: int
    misses: int
    stored: int
    present: int
    refused: int
    evicted: int
    corrupt: int
    errors: int
    shed: int


@dataclass(eq=False)
class DiskTier:
    """The verbs of `Tier` over directories; make it with `open_disk`.

    A cancelled verb ends when no thread touches its memory any more, which a device that hangs puts off for ever: wait
    for its task with `asyncio.wait(timeout=...)`, and keep the memory as long as the task is not done.
    """

    drives: Sequence[Drive]
    _closed: bool = False

    async def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """As `Tier.contains`."""
        with operation(DISK, "contains"):
            return await self._spread(keys, _itself, lambda drive: drive.loads.contains)

    async def load(self, reads: Sequence[Read]) -> list[bytes | None]:
        """As `Tier.load`."""
        with operation(DISK, "load"):
            return await self._spread(reads, _key_of, lambda drive: drive.loads.load)

    async def store(self, writes: Sequence[Write]) -> list[Stored]:
        """As `Tier.store`."""
        with operation(DISK, "store"):
            return await self._spread(writes, _key_of, lambda drive: drive.store)

    async def delete(self, keys: Sequence[bytes]) -> None:
        """As `Tier.delete`."""
        with operation(DISK, "delete"):
            await self._spread(keys, _itself, lambda drive: partial(_deleted, drive))

    async def clear(self, namespace: bytes | None) -> None:
        """As `Tier.clear`; TierUnavailable where it may not be durable: it then holds until this process ends."""
        with operation(DISK, "clear"):
            self._check()
            await _all([drive.clear(namespace) for drive in self.drives])

    async def aclose(self) -> None:
        """As `Tier.aclose`."""
        self._closed = True
        await _all([drive.aclose() for drive in self.drives])

    async def looked_through(self) -> None:
        """Returns when everything that was there at the start is known; until then little or nothing is stored."""
        await _all([drive.looked_through() for drive in self.drives])

    def figures(self) -> DiskFigures:
        """The tier as it is now."""
        holdings = [drive.holding for drive in self.drives]
        sums = {
            name: sum(getattr(one.counts, name) for one in holdings)
            for name in ("hits", "misses", "stored", "present", "refused", "evicted", "corrupt", "errors", "shed")
        }
        scans = [drive.scan_s for drive in self.drives]
        return DiskFigures(
            used_nbytes=sum(one.ledger.used_nbytes for one in holdings),
            limit_nbytes=sum(one.ledger.limit_nbytes for one in holdings),
            short_nbytes=sum(drive.short_nbytes for drive in self.drives),
            records=sum(len(one.ledger.live) for one in holdings),
            direct=all(one.shelf.direct for one in holdings),
            scan_s=-1.0 if min(scans) < 0 else max(scans),
            degraded="; ".join(one.degraded for one in holdings if one.degraded),
            stalled=sum(len(one.unburied) for one in holdings),
            **sums,
        )

    async def _spread(
        self,
        items: Sequence[A],
        key_of: Callable[[A], bytes],
        verb: Callable[[Drive], Callable[[Sequence[A]], Awaitable[list[B]]]],
    ) -> list[B]:
        """Each item to the directory of its key; the answers in the order of the items."""
        self._check()
        if len(self.drives) == 1:
            return await verb(self.drives[0])(items)
        places: list[list[int]] = [[] for _ in self.drives]
        for place, item in enumerate(items):
            places[int.from_bytes(key_of(item)[-4:], "big") % len(self.drives)].append(place)
        asked = [(drive, mine) for drive, mine in zip(self.drives, places, strict=True) if mine]
        parts = await _all([verb(drive)([items[place] for place in mine]) for drive, mine in asked])
        answers: dict[int, B] = {}
        for (_, mine), part in zip(asked, parts, strict=True):
            answers.update(zip(mine, part, strict=True))
        return [answers[place] for place in range(len(items))]

    def _check(self) -> None:
        if self._closed:
            raise TierUnavailable("the disk tier is closed")


async def open_disk(
    options: Disk,
    files: Files | None = None,
    clock_ns: Callable[[], int] = time.time_ns,
    records: Records = RAW_RECORDS,
) -> DiskTier:
    """Own the directories and begin to look through them; it serves at once.

    Raises TierOwned where another process owns one, TierUnavailable where one cannot be used.
    """
    drives: list[Drive] = []
    try:
        for root in options.path:
            drives.append(await open_drive(options, root, files or posix_files(), clock_ns, records))
    except TierError:
        await DiskTier(drives).aclose()
        raise
    return DiskTier(drives)


def _itself(key: bytes) -> bytes:
    return key


def _key_of(item: Read | Write) -> bytes:
    return item.key


async def _deleted(drive: Drive, keys: Sequence[bytes]) -> list[None]:
    await drive.delete(keys)
    return [None] * len(keys)


async def _all(calls: Sequence[Awaitable[A]]) -> list[A]:
    """All of them, to their end also where one fails or this is cancelled; then the first failure."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    if tasks:
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            await outlast(tasks)
            raise
    failures = [failure for task in tasks if (failure := task.exception()) is not None]
    if failures:
        raise failures[0]
    return [task.result() for task in tasks]
