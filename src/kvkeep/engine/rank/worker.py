"""The rank's half: maps the pool when it is handed over, runs the copies of a step's plan, reports them.

Knows nothing about keys, the store or the engine's calls, and waits for nobody but its own copies. Without the pool
that a plan is made for it loads nothing (the blocks are reported as failed) and stores nothing (the planner sees what
is missing).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from functools import partial

from kvkeep.engine.copies.mode import CopyMode
from kvkeep.engine.copies.patience import Patience
from kvkeep.engine.copies.relay import COPY_LIMIT_S, Copy, LayerLoads, LayerStores, Tools, finished
from kvkeep.engine.copies.thread import Copier, InlineCopier
from kvkeep.engine.plan import LoadOp, LoadsDone, StepPlan, StoreOp, StoresDone, Trip
from kvkeep.engine.pool import MappedPool
from kvkeep.engine.rank.results import Results
from kvkeep.errors import LayoutMismatch
from kvkeep.memory.pool import Lease
from kvkeep.trace import Trace
from kvkeep.transfer.transfer import Transfer
from kvkeep.wire.pool_socket import PoolDoor

log = logging.getLogger("kvkeep")

IDLE_WAIT_S = 0.005  # a step without a forward may wait so long for a load beside the steps


class Worker:
    """One rank: `transfer` reaches its part of the engine's cache, pools come through `door`.

    Loads beside the steps run on `copier`; so do, where `choice` says layerwise, all copies of a step.
    """

    def __init__(
        self,
        rank: int,
        transfer: Transfer,
        door: PoolDoor,
        copier: Copier | None = None,
        choice: CopyMode | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._rank = rank
        self._mapped = MappedPool(door)
        self._choice = choice or CopyMode("bulk", possible=False)
        self._clock: Callable[[], float] = time.perf_counter
        self._patience = Patience(self._clock)
        self._tools = Tools(transfer, copier or InlineCopier(), trace or Trace(), self._clock, self._patience)
        self._numbers = transfer.shard.numbers
        self.results = Results()
        self._trips: deque[tuple[Trip, list[Future[list[int]]]]] = deque()
        self._step = 0
        self._layerwise = False
        self._spent_s = 0.0
        self._loads: LayerLoads | None = None
        self._stores: LayerStores | None = None
        self._bulk_failed: list[int] | None = None  # None: no loads of a step are under way
        self._leases: list[Lease] = []
        self._computing: tuple[int, float] | None = None
        self.transfer = transfer
        self.states: Transfer | None = None  # reaches the states of a model that has any
        self.early = False  # whether a step may be made to wait for what is still being read

    def before_writes(self) -> None:
        """The engine is about to write to blocks: no copy still reads one, for a step's stores end with it."""

    def start_loads(self, plan: StepPlan) -> None:
        """Starts what the plan loads: in bulk it is there when this returns, by layer when `wait_layer` does."""
        self._begin(plan)
        start_s = self._clock()
        for trip in plan.trips:
            self._start(plan, trip)
        if plan.loads:
            self._check(plan.loads, unique=True)
            leases = [self._lease(op.boot, op, plan) for op in plan.loads]
            # what this step writes to, and what is verified before it is used, is there before the first layer
            late = {n for n, op in enumerate(plan.loads) if self._layerwise and not op.written and not op.sums}
            early = [(n, op, leases[n]) for n, op in enumerate(plan.loads) if n not in late or leases[n] is None]
            self._bulk_failed = self._scattered(early)
            copies = [Copy(n, plan.loads[n].blocks, lease) for n, lease in enumerate(leases) if n in late and lease]
            self._loads = LayerLoads(self._tools, copies) if copies else None
            self._leases += [lease for lease in leases if lease is not None]
        self._spent_s += self._clock() - start_s

    def wait_layer(self, name: str) -> None:
        """The layer is about to run: what it loads is there when this returns."""
        number = self._numbers.get(name)
        if number is None:
            return
        start_s = self._clock()
        self._computed(start_s)
        if self._loads is not None:
            self._loads.wait(number)
        now_s = self._clock()
        self._spent_s += now_s - start_s
        self._computing = (number, now_s)

    def save_layer(self, plan: StepPlan, name: str) -> None:
        """The layer has run: what the plan stores of it leaves beside the next one."""
        self._begin(plan)
        number = self._numbers.get(name)
        if number is None or not plan.stores or not self._layerwise:
            return
        start_s = self._clock()
        if self._stores is None:
            self._stores = LayerStores(self._tools, self._gathers(plan))
        self._stores.save(number)
        self._spent_s += self._clock() - start_s

    def start_stores(self, plan: StepPlan) -> None:
        """The step has run: its loads and stores have ended when this returns, so no block needs to be held."""
        self._begin(plan)
        start_s = self._clock()
        self._computed(start_s)
        self._end_loads(plan)
        if plan.stores:
            self.results.stores_over(StoresDone(plan.step, self._rank, self._stored(plan)))
        for lease in self._leases:
            lease.close()
        self._stores, self._leases = None, []
        self._spent_s += self._clock() - start_s
        if plan.loads or plan.stores:
            self._choice.took(self._layerwise, self._spent_s, self._nbytes(plan))
            self._tools.trace.write(self._clock())

    def poll(self, plan: StepPlan) -> None:
        """Takes in the loads that have ended; with nothing else to do it waits a moment for one beside the steps.

        With a drafter the engine asks for what failed when the model has run, and only then ends the step.
        """
        self._end_loads(plan)
        if plan.idle and self._trips:
            wait_for(self._trips[0][1], IDLE_WAIT_S)
        while self._trips and all(job.done() for job in self._trips[0][1]):
            trip, jobs = self._trips.popleft()
            places = tuple(place for place, job in enumerate(jobs) if finished(job) != [])
            done = LoadsDone(trip.number, self._rank, places)
            self.results.loads_over(done, trip.loads, trip.loads[0].request)

    def close(self) -> None:
        """Unmaps the pool and closes the door; idempotent. A copy under way keeps its part of the mapping."""
        self._tools.copier.close()
        self._tools.trace.write(self._clock(), at_once=True)
        self._mapped.close()

    def _begin(self, plan: StepPlan) -> None:
        """Decides once a step how its copies are made."""
        if plan.step != self._step or not plan.step:
            self._step, self._spent_s = plan.step, 0.0
            self._patience.begin(min(plan.wait_s, COPY_LIMIT_S / 2))  # a copy that waits is no copy that hangs
            self._layerwise = bool(plan.loads or plan.stores) and self._choice.layerwise()

    def _start(self, plan: StepPlan, trip: Trip) -> None:
        self._check(trip.loads, unique=True)
        jobs = [(place, op, self._lease(op.boot, op, plan)) for place, op in enumerate(trip.loads)]
        # one by one, so that what a step waits for comes in between
        submit = self._tools.copier.submit
        self._trips.append((trip, [submit(partial(self._travelled, job), beside=True) for job in jobs]))

    def _travelled(self, job: tuple[int, LoadOp, Lease | None]) -> list[int]:
        """On the copier: the scatter of one of a trip's chunks; its place if it failed."""
        start_s = self._clock()
        failed = self._scattered([job])
        if job[2] is not None:
            job[2].close()
        self._tools.trace.span("load beside the steps", "copies", start_s, self._clock())
        return failed

    def _scattered(self, jobs: Iterable[tuple[int, LoadOp, Lease | None]]) -> list[int]:
        failed = []
        for place, op, lease in jobs:
            held = lease is not None and self._patience.arrived(lease, len(self._reach(op).shard.ranges))
            if lease is not None and held:
                held = self._reach(op).scatter(lease, op.blocks, op.sums[self._rank] if op.sums else b"")
                if not held:
                    log.error(
                        "kvkeep: a chunk in the pool changed after it was written: it is dropped; please report this"
                    )
            if lease is None or not held or lease.failed:
                failed.append(place)
        return failed

    def _end_loads(self, plan: StepPlan) -> None:
        """The model has run: the step's loads have ended, if they have not been taken in before."""
        if self._bulk_failed is None:
            return
        failed = sorted({*self._bulk_failed, *(self._loads.failed() if self._loads is not None else ())})
        self._loads, self._bulk_failed = None, None
        self.results.loads_over(LoadsDone(plan.step, self._rank, tuple(failed)), plan.loads)

    def _stored(self, plan: StepPlan) -> dict[int, bytes]:
        sums = self._stores.finish() if self._stores is not None else self._gathered(plan, states=False)
        return sums | self._gathered(plan, states=True)

    def _gathered(self, plan: StepPlan, states: bool) -> dict[int, bytes]:
        copies = self._gathers(plan, states)
        return {
            one.place: self._reach(plan.stores[one.place]).gather(one.blocks, one.lease, one.seal) for one in copies
        }

    def _gathers(self, plan: StepPlan, states: bool = False) -> list[Copy]:
        """The plan's gathers of chunks or of states with their memory, checked; none without the plan's pool."""
        ops = [(place, op) for place, op in enumerate(plan.stores) if op.state == states]
        self._check([op for _, op in ops], unique=False)
        copies = []
        for place, op in ops:
            lease = self._lease(plan.boot, op, plan)
            if lease is not None:
                self._leases.append(lease)
                copies.append(Copy(place, op.blocks, lease, op.seal))
        return copies

    def _reach(self, op: LoadOp | StoreOp) -> Transfer:
        """What copies for this op: chunks and states are in caches of different shapes."""
        reach = self.states if op.state else self.transfer
        if reach is None:
            raise LayoutMismatch("a plan with states for a rank that has none")
        return reach

    def _check(self, ops: Sequence[LoadOp | StoreOp], unique: bool) -> None:
        for states in {op.state for op in ops}:
            mine = [op for op in ops if op.state == states]
            self._reach(mine[0]).check([blocks for op in mine for blocks in op.blocks], unique)

    def _lease(self, boot: bytes, op: LoadOp | StoreOp, plan: StepPlan) -> Lease | None:
        word = op.word if isinstance(op, LoadOp) else 0
        return self._mapped.lease(boot, plan.offset_of(op, self._rank), self._reach(op).shard, word)

    def _computed(self, now_s: float) -> None:
        """The layer that was running is done."""
        if self._computing is not None:
            number, start_s = self._computing
            self._tools.trace.span(f"compute layer {number}", "engine", start_s, now_s)
            self._computing = None

    def _nbytes(self, plan: StepPlan) -> int:
        return (len(plan.loads) + len(plan.stores)) * self.transfer.shard.nbytes
