"""What a store process needs to know, as data: made of a `Config` once, on the engine's side or by `kvkeep serve`.

Knows nothing about processes, tiers or engines.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import msgspec
from msgspec import Meta

from kvkeep.config import Config, parse_size


class Durability(Enum):
    """What is on the device when a store returns: whatever the kernel wrote, each batch, each record."""

    NONE = "none"
    GROUP = "group"
    EVERY = "every"


class DiskOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a disk tier. `limit_nbytes` is shared evenly by the directories, `threads` are each one's.

    One thread never stores. `direct` lets it go past the page cache where the file system can; `min_free_nbytes` stay
    free whoever fills the disk. A thread takes `batch_nbytes` of loads or `store_batch_nbytes` of stores at once. The
    limits in seconds: of the start, of the end, of waiting for room.
    """

    directories: Annotated[tuple[str, ...], Meta(min_length=1)]
    limit_nbytes: Annotated[int, Meta(gt=0)]
    policy: str = "lru"
    threads: Annotated[int, Meta(ge=2)] = 5
    durability: Durability = Durability.NONE
    min_free_nbytes: Annotated[int, Meta(ge=0)] = 1 << 30
    direct: bool = True
    queue_jobs: Annotated[int, Meta(gt=0)] = 4096
    batch_nbytes: Annotated[int, Meta(gt=0)] = 2 << 20
    store_batch_nbytes: Annotated[int, Meta(gt=0)] = 8 << 20
    open_s: float = 10.0
    close_s: float = 2.0
    room_s: float = 5.0


class StoreOptions(msgspec.Struct, frozen=True):
    """What a store process needs to know; the fields mean what the settings of these names mean."""

    pool_nbytes: Annotated[int, Meta(gt=0)]
    policy: str = "lru"
    max_pinned_share: float = 0.5
    lease_time_s: float = 60.0
    log_level: str = "info"
    disk: DiskOptions | None = None

    def json(self) -> str:
        """All of it, as `kvkeep.store.__main__` reads it."""
        return msgspec.json.encode(self).decode()


def store_options(config: Config, pool_nbytes: int) -> StoreOptions:
    """What the settings say of a store with a pool of this size."""
    return StoreOptions(
        pool_nbytes=pool_nbytes,
        policy=config.policy,
        max_pinned_share=config.max_pinned_share,
        lease_time_s=config.lease_time_s,
        log_level=config.log_level,
        disk=disk_options(config),
    )


def disk_options(config: Config) -> DiskOptions | None:
    """The disk tier that the settings describe; None for none."""
    if not config.disk_directories:
        return None
    return DiskOptions(
        directories=config.disk_directories,
        limit_nbytes=parse_size(config.disk_size, "disk_size"),
        min_free_nbytes=parse_size(config.disk_min_free, "disk_min_free"),
        durability=Durability(config.disk_durability),
        threads=config.disk_threads,
    )
