"""The rank's half where a device copies by itself: a step's copies are started, ordered by events, told when over.

The engine's thread waits for no copy. On the device a store reads after the step has written, attention reads after its
load, and what would write to a block that is still being read comes after that copy: so blocks need not be held. Knows
nothing about keys, the store or the engine's calls.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from typing import Any, Literal, NamedTuple

from kvkeep.engine.copies.device import DeviceLoads, DeviceStores, Loading, Rank, Storing
from kvkeep.engine.copies.relay import COPY_LIMIT_S
from kvkeep.engine.copies.thread import Copier
from kvkeep.engine.plan import LoadsDone, StepPlan, StoresDone
from kvkeep.engine.rank.results import Results

log = logging.getLogger("kvkeep")

IDLE_WAIT_S = 0.005  # a step without a forward may wait so long for a copy
BY_LAYER_NBYTES = 64 << 20  # more than a millisecond: worth a launch a layer

Mode = Literal["bulk", "layerwise", "auto"]


class _Loads(NamedTuple):
    """Loads under way, a step's or (`request`) those of one beside the steps."""

    number: int
    loading: Loading
    request: str = ""


class DeviceWorker:
    """One rank, as `Worker`; `settler` makes what waits for copies, once for each direction.

    Loads go by layer if `mode` is "layerwise": the engine must then call `wait_layer` before each layer. Stores go by
    layer there too, and if they are large in "auto".
    """

    def __init__(self, rank: Rank, settler: Callable[[], Copier], mode: Mode = "auto") -> None:
        self._rank = rank
        self._mode = mode
        self._numbers = rank.shard.numbers
        self._settlers = settler(), settler()
        self._loads = DeviceLoads(rank, self._settlers[0])
        self._stores = DeviceStores(rank, self._settlers[1])
        self._step: _Loads | None = None
        self._loading: deque[_Loads] = deque()
        self._storing: deque[tuple[int, Storing]] = deque()
        self.results = Results()
        self.early = False

    def before_writes(self) -> None:
        """The engine is about to launch what writes to blocks: on the device it comes after the stores under way."""
        self._stores.before_writes()

    def start_loads(self, plan: StepPlan) -> None:
        """Starts what the plan loads; what is launched from here on finds it there, but for what goes by layer."""
        for trip in plan.trips:
            loading = self._loads.start(plan, trip.loads, in_step=False, by_layer=False)
            self._loading.append(_Loads(trip.number, loading, trip.loads[0].request))
        if plan.loads:
            loading = self._loads.start(plan, plan.loads, in_step=True, by_layer=self._mode == "layerwise")
            self._step = _Loads(plan.step, loading)

    def wait_layer(self, name: str) -> None:
        """The layer is about to be launched: on the device it comes after what is loaded of it."""
        if name in self._numbers:
            self._loads.wait_layer(self._numbers[name])

    def save_layer(self, plan: StepPlan, name: str) -> None:
        """The layer has been launched: where stores go by layer, its part leaves behind it."""
        if name in self._numbers and self._stores_by_layer(plan):
            self._stores.save_layer(plan, self._numbers[name])

    def start_stores(self, plan: StepPlan) -> None:
        """The step has been launched: what it stores is on its way when this returns, and failed loads are known."""
        self._end_loads()
        if plan.stores:
            self._storing.append((plan.step, self._stores.finish(plan)))

    def poll(self, plan: StepPlan) -> None:
        """Takes in what is over; a step that computes nothing waits a moment for something to be.

        With a drafter the engine asks for what failed when the model has been launched, and only then ends the step.
        """
        self._end_loads()
        if plan.idle and self._jobs():
            wait_for(self._jobs(), IDLE_WAIT_S, FIRST_COMPLETED)
        while self._loading and self._loading[0].loading.job.done():
            self._loads_over(self._loading.popleft())
        while self._storing and self._storing[0][1].job.done() and not self._awaits_loads(self._storing[0][0]):
            step, storing = self._storing.popleft()
            self.results.stores_over(StoresDone(step, self._rank.number, storing.end()))

    def close(self) -> None:
        """Unmaps the pool and closes the door; idempotent. Copies under way are waited for, COPY_LIMIT_S at most.

        One that takes longer keeps its memory mapped and page-locked.
        """
        for settler in self._settlers:
            settler.close()
        wait_for(self._jobs(), COPY_LIMIT_S)
        self.poll(StepPlan())
        self._rank.pool.close()

    def _awaits_loads(self, step: int) -> bool:
        """Whether a step's loads are under way of which its own stores, or later ones', may have come."""
        return any(not one.request and one.number <= step for one in self._loading)

    def _jobs(self) -> list[Future[Any]]:
        return [*(one.loading.job for one in self._loading), *(one.job for _, one in self._storing)]

    def _end_loads(self) -> None:
        """A step's loads are told of when they are over; with a failure among them now, for the engine must know."""
        ended, self._step = self._step, None
        if ended is None:
            return
        unwaited = self._loads.unwaited()
        if unwaited:
            log.error("kvkeep: transfer_mode: bulk from now on, since this engine does not wait for layers")
            self._mode = "bulk"
            ended.loading.failed.update(unwaited)
        if ended.loading.failed:
            self._loads_over(ended)
        else:
            self._loading.append(ended)

    def _loads_over(self, ended: _Loads) -> None:
        done = LoadsDone(ended.number, self._rank.number, ended.loading.end())
        self.results.loads_over(done, ended.loading.ops, ended.request)

    def _stores_by_layer(self, plan: StepPlan) -> bool:
        large = len(plan.stores) * self._rank.shard.nbytes >= BY_LAYER_NBYTES
        return bool(plan.stores) and (self._mode == "layerwise" or (self._mode == "auto" and large))
