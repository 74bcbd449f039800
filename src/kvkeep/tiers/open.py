"""Opens the tiers that a configuration names, also those that another process still holds for a moment.

A tier that cannot be opened is left out: the store serves without it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Final

from kvkeep.config import Disk
from kvkeep.config import Tier as TierSettings
from kvkeep.errors import TierError
from kvkeep.memory.limits import size_text
from kvkeep.tiers.disk.disk import DiskTier, open_disk
from kvkeep.tiers.tier import OPENING, Tier, operation

log = logging.getLogger("kvkeep.store")

SOON_S = 30.0  # the store of a restarted engine may still be writing
SOON_PAUSE_S, LATER_PAUSE_S = 0.1, 5.0

# takes an open tier: its name, the tier, a function for its figures, how many reads it does at once
Taker = Callable[[str, Tier, Callable[[], Mapping[str, int]], int], Awaitable[None]]


async def open_tiers(tiers: Sequence[TierSettings], take: Taker, left_out: Callable[[str, str], None]) -> None:
    """Open what is configured, the best first, and hand it over; leave out and name a tier that cannot be opened.

    `left_out` gets the name of a tier that is not there (yet), and why; OPENING at first.
    """
    for settings in tiers:
        left_out(settings.kind, OPENING)
    for settings in tiers:
        try:
            await OPENERS[settings.kind](settings, take, partial(left_out, settings.kind))
        except TierError as error:
            left_out(settings.kind, str(error))
            log.error("there is no %s tier: %s", settings.kind, error)


async def _open_disk(disk: Disk, take: Taker, waits: Callable[[str], None]) -> None:
    tier = await _open_when_free(disk, waits)
    await take(disk.kind, tier, lambda: disk_figures(tier), disk.threads * len(disk.path))
    how = "past the page cache (O_DIRECT)" if tier.figures().direct else "through the page cache"
    log.info("disk tier of %s in %s, %s", size_text(disk.size), ", ".join(disk.path), how)


OPENERS: Final = {"disk": _open_disk}  # how a tier of each kind is opened


def disk_figures(tier: DiskTier) -> dict[str, int]:
    """The disk tier's numbers, by name."""
    figures = tier.figures()
    numbers = {name: getattr(figures, name) for name in figures.__struct_fields__}
    numbers["degraded"] = bool(figures.degraded)
    numbers["scanned"] = figures.scan_s >= 0
    del numbers["scan_s"]
    return {name: int(number) for name, number in numbers.items()}


async def _open_when_free(disk: Disk, waits: Callable[[str], None]) -> DiskTier:
    """Open the disk tier; while another process owns a directory, try again, however long: nothing waits for it."""
    loop = asyncio.get_running_loop()
    later_s, pause_s, said = loop.time() + SOON_S, SOON_PAUSE_S, False
    while True:
        try:
            with operation(disk.kind, "open"):
                return await open_disk(disk)
        except TierError as error:
            if not error.retryable:
                raise
            if not said:
                log.warning("no disk tier until its directory is free: %s", error)
            said = True
            waits(str(error))
            if pause_s == SOON_PAUSE_S and loop.time() >= later_s:
                pause_s = LATER_PAUSE_S
                log.error("there is still no disk tier: %s", error)
        await asyncio.sleep(pause_s)
