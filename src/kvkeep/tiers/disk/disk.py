"""The disk tier: chunks as files of one or several directories, bounded, verified, found again after a restart.

Keys are spread over the directories, and each directory has its own limit, threads and lock.
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
from kvkeep.tiers.disk.directory import Directory, open_directory
from kvkeep.tiers.record import RAW_RECORDS, Records
from kvkeep.tiers.tasks import outlast
from kvkeep.tiers.tier import Read, Stored, Write, operation

DISK = "disk"

A = TypeVar("A")
B = TypeVar("B")


class DiskFigures(msgspec.Struct, frozen=True):
    """The tier as it is now: sizes in bytes, counts since the start; `scan_s` < 0: the start-up scan has not ended.

    `short_nbytes`: how much less room than its limit there was at the start. `stalled` files could not be removed;
    `degraded` says how the device failed last, "" if it works.
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

    A cancelled verb ends when no thread touches its memory any more. A device that hangs puts that off for ever: wait
    for the task with `asyncio.wait(timeout=...)`, and keep the memory as long as the task is not done.
    """

    directories: Sequence[Directory]
    _closed: bool = False

    async def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """As `Tier.contains`."""
        with operation(DISK, "contains"):
            return await self._spread(keys, _same, lambda directory: directory.reads.contains)

    async def load(self, reads: Sequence[Read]) -> list[bytes | None]:
        """As `Tier.load`."""
        with operation(DISK, "load"):
            return await self._spread(reads, _key_of, lambda directory: directory.reads.load)

    async def store(self, writes: Sequence[Write]) -> list[Stored]:
        """As `Tier.store`."""
        with operation(DISK, "store"):
            return await self._spread(writes, _key_of, lambda directory: directory.store)

    async def delete(self, keys: Sequence[bytes]) -> None:
        """As `Tier.delete`."""
        with operation(DISK, "delete"):
            await self._spread(keys, _same, lambda directory: partial(_delete_from, directory))

    async def clear(self, namespace: bytes | None) -> None:
        """As `Tier.clear`; TierUnavailable where it may not be durable: then it holds until this process ends."""
        with operation(DISK, "clear"):
            self._check()
            await _all([directory.clear(namespace) for directory in self.directories])

    async def aclose(self) -> None:
        """As `Tier.aclose`."""
        self._closed = True
        await _all([directory.aclose() for directory in self.directories])

    async def wait_for_scan(self) -> None:
        """Wait until all that was there at the start is known; until then little or nothing is stored."""
        await _all([directory.wait_for_scan() for directory in self.directories])

    def figures(self) -> DiskFigures:
        """The tier as it is now."""
        states = [directory.state for directory in self.directories]
        sums = {
            name: sum(getattr(state.counts, name) for state in states)
            for name in ("hits", "misses", "stored", "present", "refused", "evicted", "corrupt", "errors", "shed")
        }
        scans = [directory.scan_s for directory in self.directories]
        return DiskFigures(
            used_nbytes=sum(state.ledger.used_nbytes for state in states),
            limit_nbytes=sum(state.ledger.limit_nbytes for state in states),
            short_nbytes=sum(directory.short_nbytes for directory in self.directories),
            records=sum(len(state.ledger.live) for state in states),
            direct=all(state.record_files.direct for state in states),
            scan_s=-1.0 if min(scans) < 0 else max(scans),
            degraded="; ".join(state.degraded for state in states if state.degraded),
            stalled=sum(len(state.undeleted) for state in states),
            **sums,
        )

    async def _spread(
        self,
        items: Sequence[A],
        key_of: Callable[[A], bytes],
        verb: Callable[[Directory], Callable[[Sequence[A]], Awaitable[list[B]]]],
    ) -> list[B]:
        """Send each item to the directory of its key; the answers come in the order of the items."""
        self._check()
        if len(self.directories) == 1:
            return await verb(self.directories[0])(items)
        shares: list[list[int]] = [[] for _ in self.directories]
        for index, item in enumerate(items):
            shares[int.from_bytes(key_of(item)[-4:], "big") % len(self.directories)].append(index)
        asked = [(directory, share) for directory, share in zip(self.directories, shares, strict=True) if share]
        parts = await _all([verb(directory)([items[index] for index in share]) for directory, share in asked])
        answers: dict[int, B] = {}
        for (_, share), part in zip(asked, parts, strict=True):
            answers.update(zip(share, part, strict=True))
        return [answers[index] for index in range(len(items))]

    def _check(self) -> None:
        if self._closed:
            raise TierUnavailable("the disk tier is closed")


async def open_disk(
    options: Disk,
    files: Files | None = None,
    clock_ns: Callable[[], int] = time.time_ns,
    records: Records = RAW_RECORDS,
) -> DiskTier:
    """Own the directories and begin to scan them; the tier serves at once.

    Raises TierOwned where another process owns one, TierUnavailable where one cannot be used.
    """
    directories: list[Directory] = []
    try:
        for root in options.path:
            directories.append(await open_directory(options, root, files or posix_files(), clock_ns, records=records))
    except TierError:
        await DiskTier(directories).aclose()
        raise
    return DiskTier(directories)


def _same(key: bytes) -> bytes:
    return key


def _key_of(item: Read | Write) -> bytes:
    return item.key


async def _delete_from(directory: Directory, keys: Sequence[bytes]) -> list[None]:
    await directory.delete(keys)
    return [None] * len(keys)


async def _all(calls: Sequence[Awaitable[A]]) -> list[A]:
    """The results of all calls; waits for all of them also where one fails or this is cancelled, then raises."""
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
