"""One rank's half of the engine: makes the copies of a step's plan and reports them.

The same on every device: `Copies` makes the copies. On a CPU a step's copies have ended when the step ends; on a device
they go on behind it, and are reported once they are over. Knows nothing about keys, the store or the engine's calls.
Without the pool that a plan is made for it loads nothing (the blocks are reported as failed) and stores nothing (the
planner sees what is missing).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvkeep.engine.copies.copies import Copies, Copy, Fault, Gathering, Kind, Scattering
from kvkeep.engine.copies.thread import COPY_LIMIT_S
from kvkeep.engine.plan import LoadOp, LoadsDone, Report, StepPlan, StoreOp, StoresDone
from kvkeep.engine.pool import MappedPool
from kvkeep.memory.pool import Lease
from kvkeep.trace import Trace

log = logging.getLogger("kvkeep")


@dataclass
class Results:
    """The planner's `report`, the engine's blocks whose load failed, and how requests' loads beside the steps ended."""

    report: Report = field(default_factory=Report)
    failed_blocks: set[int] = field(default_factory=set)
    loaded: dict[str, bool] = field(default_factory=dict)

    def loads_over(self, done: LoadsDone, ops: Sequence[LoadOp], request: str = "") -> None:
        """Adds loads that have ended, a step's or (`request`) those of one request beside the steps."""
        for index in done.failed:
            self.failed_blocks.update(int(block) for run in ops[index].blocks for block in run.block_ids)
        if request:
            self.loaded[request] = not done.failed
        if done.failed:
            log.warning("kvkeep: %d of %d chunks were not loaded: they are computed again", len(done.failed), len(ops))
        self.report.loads.append(done)

    def stores_over(self, done: StoresDone) -> None:
        """Adds a step's stores that have ended."""
        self.report.stores.append(done)

    def add(self, later: Results) -> None:
        """Adds results that came later."""
        self.report = self.report.merged(later.report)
        self.failed_blocks |= later.failed_blocks
        self.loaded |= later.loaded

    def take_report(self) -> Report:
        """The copies that have ended since the last call."""
        report, self.report = self.report, Report()
        return report

    def take_failed_blocks(self) -> set[int]:
        """The engine's blocks whose load failed since the last call."""
        failed, self.failed_blocks = self.failed_blocks, set()
        return failed

    def take_loaded(self) -> dict[str, bool]:
        """The requests whose loads beside the steps ended since the last call, and whether all of them arrived."""
        loaded, self.loaded = self.loaded, {}
        return loaded


IDLE_WAIT_S = 0.005  # how long a step without a forward may wait for a copy


class _Loads(NamedTuple):
    """Loads under way, a step's or (`request`) those of one request beside the steps.

    `indexes`: which op each copy is for. The other ops have failed, since their pool is not here.
    """

    step: int
    ops: Sequence[LoadOp]
    indexes: Sequence[int]
    copies: Sequence[Copy]
    scattering: Scattering
    request: str = ""

    @property
    def has_failed(self) -> bool:
        """Whether a load is known to have failed."""
        return len(self.indexes) < len(self.ops) or bool(self.scattering.faults)


class _Stores(NamedTuple):
    """Stores under way; `indexes`: which op each copy is for. The other ops' pool is not here."""

    step: int
    indexes: Sequence[int]
    copies: Sequence[Copy]
    gathering: Gathering


class Worker:
    """The rank with this number. `copies` reach its part of the engine's cache, `pool` is the store's.

    `early`: whether a step may be made to wait for chunks that are still being read.
    """

    def __init__(
        self, rank: int, copies: Copies, pool: MappedPool, trace: Trace | None = None, early: bool = False
    ) -> None:
        self.copies = copies
        self.pool = pool
        self.results = Results()
        self.early = early
        self._rank = rank
        self._ranges = copies.shard().range_indexes
        self._trace = trace or Trace()
        self._step: _Loads | None = None
        self._loading: deque[_Loads] = deque()
        self._saving: _Stores | None = None
        self._storing: deque[_Stores] = deque()
        self._computing: tuple[int, float] | None = None  # the layer that runs, and since when

    def before_writes(self) -> None:
        """The engine is about to write to blocks (on a device: to launch that): it comes after stores under way."""
        self.copies.before_writes()

    def start_loads(self, plan: StepPlan) -> None:
        """Starts what the plan loads: in bulk it is there when this returns, by layer when `wait_layer` does."""
        for trip in plan.trips:
            self._loading.append(self._load(plan, trip.number, trip.loads, trip.loads[0].request))
        if plan.loads:
            self._step = self._load(plan, plan.step, plan.loads)

    def wait_layer(self, name: str) -> None:
        """The layer is about to run: what it loads is there when this returns, or fails."""
        range_ = self._ranges.get(name)
        if range_ is None:
            return
        self._computed()
        if self._step is not None:
            self._step.scattering.wait(range_)
        self._computing = range_, time.perf_counter()

    def save_layer(self, plan: StepPlan, name: str) -> None:
        """The layer has run: what the plan stores of it leaves beside the next one."""
        range_ = self._ranges.get(name)
        if range_ is not None and plan.stores:
            self._stores(plan).gathering.save(range_)

    def start_stores(self, plan: StepPlan) -> None:
        """The step has run: on a CPU its loads and stores have ended when this returns, on a device all are started."""
        self._computed()
        self._end_loads()
        if plan.stores:
            stores, self._saving = self._stores(plan), None
            stores.gathering.finish()
            self._storing.append(stores)
            self._report_stores()
        if plan.loads or plan.stores:
            self._trace.write(time.perf_counter())

    def poll(self, plan: StepPlan) -> None:
        """Reports the copies that are over; a step that computes nothing waits a moment for one.

        With a drafter the engine asks for failed loads when the model has run, and only then ends the step.
        """
        self._end_loads()
        if plan.idle:
            self._wait_for_one()
        while self._loading and self._loading[0].scattering.done():
            self._report_loads(self._loading.popleft())
        self._report_stores()

    def close(self) -> None:
        """Unmaps the pool and closes its door; idempotent. Copies under way are waited for, COPY_LIMIT_S at most.

        One that takes longer keeps its memory mapped and page-locked.
        """
        self.copies.close()
        until_s = time.monotonic() + COPY_LIMIT_S
        for loads in self._loading:
            loads.scattering.done(max(0.0, until_s - time.monotonic()))
        for stores in self._storing:
            stores.gathering.done(max(0.0, until_s - time.monotonic()))
        self.poll(StepPlan())
        self._trace.write(time.perf_counter(), at_once=True)
        self.pool.close()

    def _load(self, plan: StepPlan, step: int, ops: Sequence[LoadOp], request: str = "") -> _Loads:
        """Starts the loads of a step, or (`request`) those of a request beside the steps."""
        self._check(ops, unique=True)
        found = [(index, lease) for index, op in enumerate(ops) if (lease := self._lease(op.boot, op, plan))]
        copies = [self._scatter_of(ops[index], lease) for index, lease in found]
        scattering = self.copies.scatter(copies, beside=bool(request), wait_s=plan.wait_s)
        return _Loads(step, ops, [index for index, _ in found], copies, scattering=scattering, request=request)

    def _scatter_of(self, op: LoadOp, lease: Lease) -> Copy:
        """What the step itself writes to, and what is verified, is there before the first layer."""
        layerwise = not (op.written or op.sums or op.state)
        return Copy(lease, op.blocks, _kind(op), sums=op.sums[self._rank] if op.sums else b"", layerwise=layerwise)

    def _stores(self, plan: StepPlan) -> _Stores:
        """The plan's stores with their memory, checked once a step."""
        if self._saving is None:
            self._check(plan.stores, unique=False)
            found = [(index, op, self._lease(plan.boot, op, plan)) for index, op in enumerate(plan.stores)]
            pairs = [
                (index, Copy(lease, op.blocks, _kind(op), seal=op.seal, layerwise=not op.state))
                for index, op, lease in found
                if lease is not None
            ]
            copies = [copy for _, copy in pairs]
            self._saving = _Stores(plan.step, [index for index, _ in pairs], copies, self.copies.gather(copies))
        return self._saving

    def _check(self, ops: Sequence[LoadOp | StoreOp], unique: bool) -> None:
        for kind in {_kind(op) for op in ops}:
            blocks = [run for op in ops if _kind(op) is kind for run in op.blocks]
            self.copies.check(blocks, unique, kind)

    def _lease(self, boot: bytes, op: LoadOp | StoreOp, plan: StepPlan) -> Lease | None:
        progress_at = op.progress_at if isinstance(op, LoadOp) else 0
        return self.pool.lease(boot, plan.offset_of(op, self._rank), self.copies.shard(_kind(op)), progress_at)

    def _end_loads(self) -> None:
        """The model has run. Reports the step's loads when they finish, failures at once: the engine must recompute."""
        ended, self._step = self._step, None
        if ended is None:
            return
        ended.scattering.layers_ran()
        if ended.has_failed or ended.scattering.done():
            self._report_loads(ended)
        else:
            self._loading.append(ended)

    def _report_loads(self, ended: _Loads) -> None:
        faults = ended.scattering.end()
        for copy in ended.copies:
            copy.memory.close()
        if Fault.DIFFERS in faults.values():
            log.error("kvkeep: a chunk in the pool changed after it was written: it is dropped; please report this")
        right = {index for copy, index in enumerate(ended.indexes) if copy not in faults}
        failed = tuple(index for index in range(len(ended.ops)) if index not in right)
        self.results.loads_over(LoadsDone(ended.step, self._rank, failed), ended.ops, ended.request)

    def _report_stores(self) -> None:
        """Reports the stores that are over, each after the loads from which its chunks may have been computed."""
        while self._storing and self._storing[0].gathering.done() and not self._awaits_loads(self._storing[0].step):
            ended = self._storing.popleft()
            sums = {ended.indexes[copy]: part for copy, part in ended.gathering.end().items()}
            for copy in ended.copies:
                copy.memory.close()
            self.results.stores_over(StoresDone(ended.step, self._rank, sums))

    def _awaits_loads(self, step: int) -> bool:
        """Whether loads of this step, or of an earlier one, are under way."""
        return any(not loads.request and loads.step <= step for loads in self._loading)

    def _wait_for_one(self) -> None:
        if self._loading:
            self._loading[0].scattering.done(IDLE_WAIT_S)
        elif self._storing:
            self._storing[0].gathering.done(IDLE_WAIT_S)

    def _computed(self) -> None:
        """The layer that was running is done."""
        if self._computing is not None:
            range_, start_s = self._computing
            self._trace.span(f"compute layer {range_}", "engine", start_s, time.perf_counter())
            self._computing = None


def _kind(op: LoadOp | StoreOp) -> Kind:
    return Kind.STATE if op.state else Kind.CHUNK
