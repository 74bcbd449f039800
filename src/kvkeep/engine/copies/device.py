"""A rank's copies on a device that makes them by itself: started here, ordered by events, over when their events are.

Knows nothing about plans' steps, reports or the engine's calls. Memory of the pool belongs to a copy until its event;
what is not page-locked is staged, in the order of the compute stream.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from kvkeep.core.layout import ShardLayout
from kvkeep.engine.copies.relay import COPY_LIMIT_S, Copy
from kvkeep.engine.copies.thread import Copier
from kvkeep.engine.plan import LoadOp, StepPlan
from kvkeep.engine.pool import MappedPool
from kvkeep.errors import CopyFailed
from kvkeep.memory.pool import Lease
from kvkeep.transfer.device.device import DeviceTransfer
from kvkeep.transfer.device.streams import CopyEvent
from kvkeep.transfer.device.tables import CopyJob
from kvkeep.transfer.transfer import ranges_hold, seal_ranges

log = logging.getLogger("kvkeep")


class Rank(NamedTuple):
    """Whose copies: the rank's number, its part of the engine's cache, its pool."""

    number: int
    transfer: DeviceTransfer
    pool: MappedPool

    @property
    def shard(self) -> ShardLayout:
        """How the rank's part of a chunk is arranged."""
        return self.transfer.shard

    def lease(self, boot: bytes, offset: int, plan: StepPlan) -> Lease | None:
        """Its part of the chunk at `offset`; None if that boot's pool is not here."""
        return self.pool.lease(boot, offset + plan.shard_offsets[self.number], self.shard)


class Loading(NamedTuple):
    """Loads under way; `failed` are the places of those that were never started."""

    ops: Sequence[LoadOp]
    leases: Sequence[Lease]
    failed: set[int]
    job: Future[None]

    def end(self) -> tuple[int, ...]:
        """Gives the memory back once all are complete; the places of those that failed."""
        places = range(len(self.ops)) if died(self.job) else sorted(self.failed)
        for lease in self.leases:
            lease.close()
        return tuple(places)


class Storing(NamedTuple):
    """Stores under way; the job's result are their sums by place."""

    copies: Sequence[Copy]
    job: Future[dict[int, bytes]]

    def end(self) -> dict[int, bytes]:
        """Gives the memory back once all are complete; their sums by place, none if they were lost."""
        sums = {} if died(self.job) else self.job.result(0)
        for copy in self.copies:
            copy.lease.close()
        return sums


class DeviceLoads:
    """Scatters of one rank; `settler` waits for them beside the engine's thread."""

    def __init__(self, rank: Rank, settler: Copier) -> None:
        self._rank = rank
        self._settler = settler
        self._layers: dict[int, CopyEvent] = {}
        self._waited: set[int] = set()
        self._late: set[int] = set()

    def start(self, plan: StepPlan, ops: Sequence[LoadOp], in_step: bool, by_layer: bool) -> Loading:
        """Starts the loads of one step (`in_step`: what is launched from here on finds them), or beside the steps.

        By layer, a layer finds them after `wait_layer`; but what the step itself writes to is there before all layers.
        """
        leases, failed = self._leases(plan, ops)
        jobs = {place: CopyJob(ops[place].blocks, lease) for place, lease in leases.items()}
        self._late = {n for n, job in jobs.items() if by_layer and job.lease.pieces and not ops[n].written}
        events = self._scatter([job for n, job in jobs.items() if n not in self._late])
        for event in events if in_step else ():
            event.order()
        late = [jobs[n] for n in sorted(self._late)]
        scatter = self._rank.transfer.start_scatter
        self._layers = {n: scatter(late, n) for n in self._rank.shard.numbers.values()} if late else {}
        self._waited = set()
        job = self._settler.submit(partial(wait, [*events, *self._layers.values()]))
        return Loading(ops, [*leases.values()], failed, job)

    def wait_layer(self, number: int) -> None:
        """What is launched from here on finds this layer."""
        if number in self._layers:
            self._layers[number].order()
            self._waited.add(number)

    def unwaited(self) -> set[int]:
        """At the end of a step: the places of the loads by layer, if any of their layers ran without waiting."""
        unwaited, self._layers = self._layers.keys() - self._waited, {}
        return self._late if unwaited else set()

    def _leases(self, plan: StepPlan, ops: Sequence[LoadOp]) -> tuple[dict[int, Lease], set[int]]:
        """The memory of each op by its place, verified where it has sums; the places of those that have none."""
        self._rank.transfer.check([blocks for op in ops for blocks in op.blocks], unique=True)
        leases: dict[int, Lease] = {}
        for place, op in enumerate(ops):
            lease = self._rank.lease(op.boot, op.offset, plan) if not op.word else None  # it waits for no word
            if lease is not None and op.sums and not ranges_hold(lease.views(), op.sums[self._rank.number]):
                log.error("kvkeep: a chunk in the pool changed after it was written: it is dropped; please report this")
                lease.close()
            elif lease is not None:
                leases[place] = lease
        return leases, set(range(len(ops))) - leases.keys()

    def _scatter(self, jobs: Sequence[CopyJob]) -> list[CopyEvent]:
        for job in jobs:
            if not job.lease.pieces:
                self._rank.transfer.scatter(job.lease, job.blocks, b"")
        locked = [job for job in jobs if job.lease.pieces]
        return [self._rank.transfer.start_scatter(locked)] if locked else []


class DeviceStores:
    """Gathers of one rank; `settler` waits for them, and sums them, beside the engine's thread."""

    def __init__(self, rank: Rank, settler: Copier) -> None:
        self._rank = rank
        self._settler = settler
        self._copies: list[Copy] | None = None
        self._events: list[CopyEvent] = []
        self._saved: set[int] = set()
        self._last: CopyEvent | None = None

    def before_writes(self) -> None:
        """On the device, what is launched from here on comes after all stores: it may write to their blocks."""
        if self._last is not None and not self._last.done():
            self._last.order()  # the last of its stream

    def save_layer(self, plan: StepPlan, number: int) -> None:
        """Starts the stores of a layer that has been launched; where it comes in parts, again each time."""
        self._begin(plan)
        self._gather(number)
        self._saved.add(number)

    def finish(self, plan: StepPlan) -> Storing:
        """The step has been launched: starts what is left of its stores."""
        copies = self._begin(plan)
        for number in set(self._rank.shard.numbers.values()) - self._saved if self._saved else (None,):
            self._gather(number)
        gather = self._rank.transfer.gather
        staged = {one.place: gather(one.blocks, one.lease, one.seal) for one in copies if not one.lease.pieces}
        job = self._settler.submit(partial(self._settle, copies, self._events, staged))
        self._copies, self._events, self._saved = None, [], set()
        return Storing(copies, job)

    def _begin(self, plan: StepPlan) -> list[Copy]:
        """The plan's gathers with their memory, checked once; none without the plan's pool."""
        if self._copies is None:
            self._rank.transfer.check([blocks for op in plan.stores for blocks in op.blocks], unique=False)
            found = [(n, op, self._rank.lease(plan.boot, op.offset, plan)) for n, op in enumerate(plan.stores)]
            self._copies = [Copy(n, op.blocks, lease, op.seal) for n, op, lease in found if lease is not None]
        return self._copies

    def _gather(self, only: int | None) -> None:
        jobs = [CopyJob(copy.blocks, copy.lease) for copy in self._copies or () if copy.lease.pieces]
        if jobs:
            self._last = self._rank.transfer.start_gather(jobs, only)
            self._events.append(self._last)

    def _settle(
        self, copies: Iterable[Copy], events: Iterable[CopyEvent], staged: Mapping[int, bytes]
    ) -> dict[int, bytes]:
        wait(events)
        sums = dict(staged)
        for copy in copies:
            if copy.place not in staged:
                sums[copy.place] = seal_ranges(self._rank.shard.ranges, copy.lease.views()) if copy.seal else b""
        return sums


def wait(events: Iterable[CopyEvent]) -> None:
    """Returns once all are complete."""
    for event in events:
        event.wait()


def died(job: Future[None] | Future[dict[int, bytes]]) -> bool:
    """Whether a job was lost before the end of its copies was seen.

    TimeoutError after COPY_LIMIT_S: whatever they may still write, nobody goes on as if they had ended.
    """
    try:
        job.result(COPY_LIMIT_S)
    except CopyFailed:
        return True
    return False
