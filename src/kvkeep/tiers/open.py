"""Opens the tiers that a configuration names, also those that another process still holds for a moment.

Knows nothing about what is done with them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from kvkeep.config import Config, parse_size
from kvkeep.errors import TierError, TierOwned
from kvkeep.tiers.disk import DiskTier, open_disk
from kvkeep.tiers.holding import DiskOptions
from kvkeep.tiers.shelf import Durability
from kvkeep.tiers.tier import Tier

log = logging.getLogger("kvkeep.store")

OWNED_LIMIT_S = 30.0  # an engine that is restarted meets the store of its last start while that still writes
OWNED_PAUSE_S = 0.1


Taker = Callable[[str, Tier, Callable[[], Mapping[str, int]]], None]  # a tier's name, itself, what tells its figures


def disk_options(config: Config) -> DiskOptions | None:
    """The disk tier that the settings describe; None for none."""
    if not config.disk_directories:
        return None
    return DiskOptions(
        directories=config.disk_directories,
        limit_nbytes=parse_size(config.disk_size, "disk_size"),
        min_free_nbytes=parse_size(config.disk_min_free, "disk_min_free"),
        durability=Durability(config.disk_durability),
    )


async def open_tiers(disk: DiskOptions | None, take: Taker) -> None:
    """Opens what is configured and hands it over, the best first; one that cannot be opened is left out and named."""
    if disk is None:
        return
    try:
        tier = await _owned(disk)
    except TierError as error:
        log.error("there is no disk tier: %s", error)
        return
    take("disk", tier, lambda: disk_figures(tier))
    how = "past the page cache (O_DIRECT)" if tier.figures().direct else "through the page cache"
    log.info("disk tier of %.1f GiB in %s, %s", disk.limit_nbytes / 2**30, ", ".join(disk.directories), how)


def disk_figures(tier: DiskTier) -> dict[str, int]:
    """The disk tier's numbers, by name."""
    figures = tier.figures()
    numbers = {name: getattr(figures, name) for name in figures.__struct_fields__}
    numbers["degraded"] = bool(figures.degraded)
    numbers["scanned"] = figures.scan_s >= 0
    del numbers["scan_s"]
    return {name: int(number) for name, number in numbers.items()}


async def _owned(options: DiskOptions) -> DiskTier:
    loop = asyncio.get_running_loop()
    end_s = loop.time() + OWNED_LIMIT_S
    while True:
        try:
            return await open_disk(options)
        except TierOwned:
            if loop.time() > end_s:
                raise
        await asyncio.sleep(OWNED_PAUSE_S)
