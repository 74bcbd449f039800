"""Copies that the CPU makes: in the caller, or on a thread of their own beside it.

With a thread, layerwise scatters run ahead of the caller and gathers behind it; without one the caller copies each
range when it waits for it, or saves it. Knows nothing about plans, requests or the store.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from kvkeep.core.layout import ShardLayout
from kvkeep.core.units import SUM_NBYTES
from kvkeep.engine.copies.copies import Copy, Fault, Kind, fail
from kvkeep.engine.copies.mode import CopyMode
from kvkeep.engine.copies.thread import COPY_LIMIT_S, Copier, InlineCopier, all_done, result_of
from kvkeep.errors import LayoutMismatch
from kvkeep.memory.progress import Progress
from kvkeep.trace import Trace
from kvkeep.transfer.transfer import Blocks, Transfer

LOOK_S = 0.0002  # between two looks at a chunk's progress: the thread of the store that reads it has to run meanwhile


class Timing(NamedTuple):
    """What copies are timed with: a clock in seconds, what sleeps, where spans go."""

    clock: Callable[[], float] = time.perf_counter
    pause: Callable[[float], None] = time.sleep
    trace: Trace = Trace()


class CpuCopies:
    """`Copies` by `transfer`, and by `states` for the states of a model that has any.

    `copier` is the thread for layerwise copies and for those beside the steps; None: the caller makes them.
    """

    def __init__(
        self,
        transfer: Transfer,
        copier: Copier | None = None,
        mode: CopyMode | None = None,
        states: Transfer | None = None,
        *,
        order: Sequence[int] = (),
        timing: Timing | None = None,
    ) -> None:
        self.transfers = {Kind.CHUNK: transfer}
        if states is not None:
            self.transfers[Kind.STATE] = states
        self.order = order or range(len(transfer.shard.ranges))
        self.ahead = copier is not None
        self.copier: Copier = copier or InlineCopier()
        self.timing = timing or Timing()
        self._mode = mode or CopyMode("bulk", possible=False)
        self._deciding = threading.Lock()

    def shard(self, kind: Kind = Kind.CHUNK) -> ShardLayout:
        """As `Copies.shard`."""
        return self.transfer(kind).shard

    def check(self, blocks: Sequence[Blocks], unique: bool, kind: Kind = Kind.CHUNK) -> None:
        """As `Copies.check`."""
        self.transfer(kind).check(blocks, unique)

    def scatter(
        self, copies: Sequence[Copy], beside: bool = False, wait_s: float = 0.0
    ) -> CpuScattering | CpuScatteringBeside:
        """As `Copies.scatter`."""
        # a copy that waits must not be taken for one that hangs
        batch = _Scatters(self, copies, self.timing.clock() + min(wait_s, COPY_LIMIT_S / 2))
        return CpuScatteringBeside(self, batch) if beside else CpuScattering(self, batch, self._layerwise(copies))

    def gather(self, copies: Sequence[Copy]) -> CpuGathering:
        """As `Copies.gather`."""
        return CpuGathering(self, copies, self._layerwise(copies))

    def before_writes(self) -> None:
        """As `Copies.before_writes`: a gather has read its blocks when `finish` returns."""

    def close(self) -> None:
        """As `Copies.close`."""
        self.copier.close()

    def transfer(self, kind: Kind) -> Transfer:
        """What reaches the caches of this kind."""
        if kind not in self.transfers:
            raise LayoutMismatch("a plan with states for a rank that has none")
        return self.transfers[kind]

    def measured(self, layerwise: bool, seconds: float, copies: Sequence[Copy]) -> None:
        """These copies, which might have gone either way, cost the caller so much time."""
        if any(copy.layerwise for copy in copies):
            with self._deciding:
                self._mode.took(layerwise, seconds, len(copies) * self.shard().nbytes)

    def never_layerwise(self) -> None:
        """The engine does not wait for layers."""
        with self._deciding:
            self._mode.never_layerwise()

    def _layerwise(self, copies: Sequence[Copy]) -> bool:
        if not any(copy.layerwise for copy in copies):
            return False
        with self._deciding:
            return self._mode.layerwise()


class _Scatters:
    """Scatters of one list, and which of them have failed; `until_s` ends the wait for chunks still being read."""

    def __init__(self, owner: CpuCopies, copies: Sequence[Copy], until_s: float) -> None:
        self.owner = owner
        self.copies = copies
        self.faults: dict[int, Fault] = {}
        self._until_s = until_s

    def scatter(self, indexes: Iterable[int], range_: int | None = None, span: str = "") -> bool:
        """Copies range `range_` (None: all ranges) of these; one that has failed is left alone."""
        start_s = self.owner.timing.clock()
        layers = range(range_, range_ + 1) if range_ is not None else None
        part = slice(range_ * SUM_NBYTES, (range_ + 1) * SUM_NBYTES) if range_ is not None else slice(None)
        chunk, faults, copies = Kind.CHUNK, self.faults, self.copies
        of_chunks = self.owner.transfers[chunk]
        for index in indexes:  # once for each chunk and layer, between two layers of a step: nothing is looked up here
            if index in faults:
                continue
            memory, blocks, kind, sums, _, rotation, _, _ = copies[index]
            transfer = of_chunks if kind is chunk else self.owner.transfer(kind)
            progress = memory.progress
            if progress is not None and not self._arrived(progress, transfer, range_):
                fail(faults, copies, [index], Fault.LOST)
            elif not transfer.scatter(memory, blocks, sums and sums[part], layers):
                fail(faults, copies, [index], Fault.DIFFERS)
            elif progress is not None and progress.failed:  # its memory may have been another chunk's meanwhile
                fail(faults, copies, [index], Fault.LOST)
            elif rotation is not None:
                rotation.text.in_place(rotation.chunk, layers)
        if span:
            self.owner.timing.trace.span(span, "copies", start_s, self.owner.timing.clock())
        return True

    def _arrived(self, progress: Progress, transfer: Transfer, range_: int | None) -> bool:
        """Waits until everything up to the range (None: every range) has been read; False if it fails, or is late."""
        ranges = range_ + 1 if range_ is not None else len(transfer.shard.ranges)
        while not progress.has(ranges):
            if progress.failed or self.owner.timing.clock() >= self._until_s:
                return False
            self.owner.timing.pause(LOOK_S)
        return True


class CpuScattering:
    """`Scattering` of one step or request: what does not go by layer has been copied once this exists."""

    def __init__(self, owner: CpuCopies, batch: _Scatters, layerwise: bool) -> None:
        self._owner = owner
        self._batch = batch
        self._layerwise = layerwise
        copies, clock = batch.copies, owner.timing.clock
        self._late = [index for index, copy in enumerate(copies) if copy.layerwise] if layerwise else []
        self._jobs: dict[int, Future[bool]] = {}
        self._waited: set[int] = set()
        self._ended = False
        start_s = clock()
        batch.scatter(
            [index for index, copy in enumerate(copies) if not copy.layerwise] if self._late else range(len(copies))
        )
        if self._late and owner.ahead:
            for range_ in owner.order:
                self._submit(range_)
        self._spent_s = clock() - start_s

    @property
    def faults(self) -> Mapping[int, Fault]:
        """As `Scattering.faults`."""
        return self._batch.faults

    def wait(self, range_: int) -> None:
        """As `Scattering.wait`."""
        if not self._late:
            return
        start_s = self._owner.timing.clock()
        if range_ not in self._jobs:
            self._submit(range_)
        self._finish(self._jobs[range_])
        self._waited.add(range_)
        self._spent_s += self._owner.timing.clock() - start_s

    def layers_ran(self) -> None:
        """As `Scattering.layers_ran`."""
        if self._late and len(self._waited) < len(self._owner.order):
            self._owner.never_layerwise()
            self._lose_late()

    def done(self, limit_s: float = 0.0) -> bool:
        """As `Scattering.done`."""
        return all_done(self._jobs.values(), limit_s)

    def end(self) -> Mapping[int, Fault]:
        """As `Scattering.end`."""
        start_s = self._owner.timing.clock()
        for job in self._jobs.values():
            self._finish(job)
        complete = not self._late or len(self._waited) == len(self._owner.order)
        if complete and not self._ended:
            self._spent_s += self._owner.timing.clock() - start_s
            self._owner.measured(self._layerwise, self._spent_s, self._batch.copies)
        self._ended = True
        return self._batch.faults

    def _submit(self, range_: int) -> None:
        call = partial(self._batch.scatter, self._late, range_, f"load layer {range_}")
        self._jobs[range_] = self._owner.copier.submit(call)

    def _finish(self, job: Future[bool]) -> None:
        if result_of(job) is None:
            self._lose_late()

    def _lose_late(self) -> None:
        fail(self._batch.faults, self._batch.copies, self._late, Fault.LOST)


class CpuScatteringBeside:
    """`Scattering` of chunks that no step waits for: one job each, so that what a step waits for comes in between."""

    def __init__(self, owner: CpuCopies, batch: _Scatters) -> None:
        self._batch = batch
        calls = [partial(batch.scatter, [index], None, "load beside the steps") for index in range(len(batch.copies))]
        self._jobs = [owner.copier.submit(call, background=True) for call in calls]

    @property
    def faults(self) -> Mapping[int, Fault]:
        """As `Scattering.faults`."""
        return self._batch.faults

    def wait(self, range_: int) -> None:
        """As `Scattering.wait`: no layer waits for these."""

    def layers_ran(self) -> None:
        """As `Scattering.layers_ran`: no layer waits for these."""

    def done(self, limit_s: float = 0.0) -> bool:
        """As `Scattering.done`."""
        return all_done(self._jobs, limit_s)

    def end(self) -> Mapping[int, Fault]:
        """As `Scattering.end`."""
        lost = [index for index, job in enumerate(self._jobs) if result_of(job) is None]
        fail(self._batch.faults, self._batch.copies, lost, Fault.LOST)
        return self._batch.faults


class CpuGathering:
    """`Gathering` of one step or request."""

    def __init__(self, owner: CpuCopies, copies: Sequence[Copy], layerwise: bool) -> None:
        self._owner = owner
        self._copies = copies
        self._layerwise = layerwise
        self._late = [index for index, copy in enumerate(copies) if copy.layerwise] if layerwise else []
        self._jobs: dict[int, Future[list[bytes]]] = {}
        self._sums: dict[int, bytes] = {}
        self._spent_s = 0.0

    def save(self, range_: int) -> None:
        """As `Gathering.save`."""
        if self._late:
            start_s = self._owner.timing.clock()
            self._submit(range_)
            self._spent_s += self._owner.timing.clock() - start_s

    def finish(self) -> None:
        """As `Gathering.finish`."""
        start_s = self._owner.timing.clock()
        for range_ in self._owner.order if self._late else ():
            if range_ not in self._jobs:
                self._submit(range_)
        late = set(self._late)
        sums = {index: self._gather_all(copy) for index, copy in enumerate(self._copies) if index not in late}
        parts = [result_of(self._jobs[range_]) for range_ in sorted(self._jobs)]  # a chunk's ranges are in this order
        if None not in parts:
            layers = [part for part in parts if part is not None]
            sums |= {index: b"".join(part[row] for part in layers) for row, index in enumerate(self._late)}
        self._sums = sums
        self._owner.measured(self._layerwise, self._spent_s + self._owner.timing.clock() - start_s, self._copies)

    def done(self, limit_s: float = 0.0) -> bool:
        """As `Gathering.done`."""
        return all_done(self._jobs.values(), limit_s)

    def end(self) -> dict[int, bytes]:
        """As `Gathering.end`."""
        for job in self._jobs.values():
            result_of(job)
        return self._sums

    def _submit(self, range_: int) -> None:
        self._jobs[range_] = self._owner.copier.submit(partial(self._gather, range_))

    def _gather(self, range_: int) -> list[bytes]:
        timing, only = self._owner.timing, range(range_, range_ + 1)
        start_s = timing.clock()
        gather = self._owner.transfers[Kind.CHUNK].gather
        late = [self._copies[index] for index in self._late]
        sums = [gather(copy.blocks, copy.memory, copy.seal, only) for copy in late]
        timing.trace.span(f"store layer {range_}", "copies", start_s, timing.clock())
        return sums

    def _gather_all(self, copy: Copy) -> bytes:
        return self._owner.transfer(copy.kind).gather(copy.blocks, copy.memory, copy.seal)
