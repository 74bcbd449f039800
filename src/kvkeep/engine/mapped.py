"""The store's pool in a rank's process: mapped when it is handed over, page-locked where a device copies by itself.

Knows nothing about plans, keys or copies. Every start of the store has a pool of its own; that of an earlier one is not
lent again, and ends with its last lease.
"""

from __future__ import annotations

import logging

from kvkeep.core.layout import ShardLayout
from kvkeep.errors import KVKeepError
from kvkeep.memory.pin import PinCalls
from kvkeep.memory.pool import Lease, Pool
from kvkeep.memory.region import Region
from kvkeep.wire.handoff import HandedPool, PoolDoor

log = logging.getLogger("kvkeep")


class MappedPool:
    """Pools come through `door`; `pin_calls` page-lock each of them (None: nothing needs to)."""

    def __init__(self, door: PoolDoor, pin_calls: PinCalls | None = None) -> None:
        self._door = door
        self._pin_calls = pin_calls
        self._pool: Pool | None = None

    def lease(self, boot: bytes, offset: int, shard: ShardLayout) -> Lease | None:
        """A lease on the shard at `offset` of that boot's pool, to be closed; None if that pool is not here."""
        if self._pool is None or self._pool.boot != boot:
            handed = self._door.take()
            if handed is not None:
                self._swap(handed)
        if self._pool is None or self._pool.boot != boot:
            return None
        return self._pool.lease(offset, shard)

    def close(self) -> None:
        """Closes the door and ends the mapping; idempotent. Leases keep their part of it."""
        self._door.close()
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _swap(self, handed: HandedPool) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        try:
            self._pool = Pool(handed.boot, Region.attach(handed.fd), self._pin_calls)
        except KVKeepError as error:
            log.error("kvkeep: the pool cannot be used here: %s", error)
