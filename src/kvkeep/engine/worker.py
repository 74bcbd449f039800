"""The rank's half: maps the pool when it is handed over, runs the copies of a step's plan, reports them.

Knows nothing about keys, the store or the engine's calls, and never waits for anyone. Without the pool that a plan is
made for it loads nothing (the blocks are reported as failed) and stores nothing (the planner sees what is missing).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from kvkeep.engine.plan import LoadOp, LoadsDone, Report, StepPlan, StoresDone
from kvkeep.errors import KVKeepError
from kvkeep.memory.pool import Pool
from kvkeep.memory.region import Region
from kvkeep.transfer.transfer import Transfer
from kvkeep.wire.handoff import HandedPool, PoolDoor

log = logging.getLogger("kvkeep")


class Worker:
    """One rank: `transfer` reaches its part of the engine's cache, pools come through `door`."""

    def __init__(self, rank: int, transfer: Transfer, door: PoolDoor) -> None:
        self._rank = rank
        self._door = door
        self._pool: Pool | None = None
        self._report = Report()
        self._failed_blocks: set[int] = set()
        self._loaded: dict[str, bool] = {}
        self.transfer = transfer

    def start_loads(self, plan: StepPlan) -> None:
        """Scatters everything that the plan loads, before it returns."""
        if not plan.loads:
            return
        self.transfer.check([blocks for op in plan.loads for blocks in op.blocks], unique=True)
        failed = [place for place, op in enumerate(plan.loads) if not self._loads(plan, op)]
        for place in failed:
            self._failed_blocks.update(_block_ids(plan.loads[place]))
        for place, op in enumerate(plan.loads):
            self._loaded[op.request] = self._loaded.get(op.request, True) and place not in failed
        if failed:
            log.warning(
                "kvkeep: %d of %d chunks were not loaded: they are computed again", len(failed), len(plan.loads)
            )
        self._report.loads.append(LoadsDone(plan.step, self._rank, tuple(failed)))

    def start_stores(self, plan: StepPlan) -> None:
        """Gathers everything that the plan stores, before it returns."""
        if not plan.stores:
            return
        self.transfer.check([blocks for op in plan.stores for blocks in op.blocks], unique=False)
        sums = {}
        pool = self._pool_of(plan.boot)
        for place, op in enumerate(plan.stores if pool is not None else ()):
            assert pool is not None
            with pool.lend(op.offset + plan.shard_offsets[self._rank], self.transfer.shard) as lease:
                sums[place] = self.transfer.gather(op.blocks, lease, op.seal)
        self._report.stores.append(StoresDone(plan.step, self._rank, sums))

    def take_report(self) -> Report:
        """What was finished since the last call."""
        report, self._report = self._report, Report()
        return report

    def take_failed_blocks(self) -> set[int]:
        """The engine's blocks whose load failed since the last call."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_loaded(self) -> dict[str, bool]:
        """The requests whose loads were finished since the last call, and whether all of them succeeded."""
        loaded, self._loaded = self._loaded, {}
        return loaded

    def close(self) -> None:
        """Unmaps the pool and closes the door; idempotent."""
        self._door.close()
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _loads(self, plan: StepPlan, op: LoadOp) -> bool:
        pool = self._pool_of(op.boot)
        if pool is None:
            return False
        with pool.lend(op.offset + plan.shard_offsets[self._rank], self.transfer.shard) as lease:
            held = self.transfer.scatter(lease, op.blocks, op.sums[self._rank] if op.sums else b"")
        if not held:
            log.error("kvkeep: a chunk in the pool changed after it was written: it is dropped; please report this")
        return held

    def _pool_of(self, boot: bytes) -> Pool | None:
        """The pool of one boot of the store, taken from the door if it is waiting there."""
        if self._pool is None or self._pool.boot != boot:
            handed = self._door.take()
            if handed is not None:
                self._swap(handed)
        return self._pool if self._pool is not None and self._pool.boot == boot else None

    def _swap(self, handed: HandedPool) -> None:
        """Maps a pool that was handed over; the one of an earlier boot is not touched again."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        try:
            self._pool = Pool(handed.boot, Region.attach(handed.fd))
        except KVKeepError as error:
            log.error("kvkeep: the pool cannot be used here: %s", error)


def _block_ids(op: LoadOp) -> Iterable[int]:
    return (block_id for blocks in op.blocks for block_id in blocks.block_ids)
