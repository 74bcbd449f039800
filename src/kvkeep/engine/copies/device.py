"""Copies that a device makes by itself: started here, ordered by events, over when their events are complete.

The caller's thread waits for no copy before `end`. Memory that is not page-locked goes through a staging copy, in the
order of the compute stream. Knows nothing about plans, requests or the store.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from itertools import groupby
from typing import NamedTuple

from kvkeep.core.layout import ShardLayout
from kvkeep.engine.copies.copies import Copy, Fault, Kind, fail
from kvkeep.engine.copies.mode import SizeMode
from kvkeep.engine.copies.thread import Copier, T, all_done, result_of
from kvkeep.errors import LayoutMismatch
from kvkeep.transfer.device.device import DeviceTransfer
from kvkeep.transfer.device.streams import CopyEvent
from kvkeep.transfer.device.tables import CopyJob
from kvkeep.transfer.transfer import Blocks, ranges_hold, seal_ranges


class Settlers(NamedTuple):
    """Threads that wait for copies beside the engine's, one for each direction; those of gathers sum as well."""

    scatters: Copier
    gathers: Copier


class DeviceCopies:
    """`Copies` by `transfer`. Without `settlers` whoever calls `end` waits for the copies, and sums."""

    def __init__(
        self,
        transfer: DeviceTransfer,
        mode: SizeMode,
        settlers: Settlers | None = None,
        order: Sequence[int] = (),
    ) -> None:
        self.transfer = transfer
        self.settlers = settlers
        self.order = order or range(len(transfer.shard.ranges))
        self.mode = mode
        self.last_gather: CopyEvent | None = None

    def shard(self, kind: Kind = Kind.CHUNK) -> ShardLayout:
        """As `Copies.shard`."""
        if kind is Kind.STATE:
            raise LayoutMismatch("a device does not copy states by itself")
        return self.transfer.shard

    def check(self, blocks: Sequence[Blocks], unique: bool, kind: Kind = Kind.CHUNK) -> None:
        """As `Copies.check`."""
        self.shard(kind)
        self.transfer.check(blocks, unique)

    def scatter(self, copies: Sequence[Copy], beside: bool = False, wait_s: float = 0.0) -> DeviceScattering:
        """As `Copies.scatter`; chunks that are still being read are not waited for, they fail."""
        layerwise = not beside and self.mode.loads_layerwise(len(copies) * self.shard().nbytes)
        return DeviceScattering(self, copies, layerwise, beside)

    def gather(self, copies: Sequence[Copy]) -> DeviceGathering:
        """As `Copies.gather`."""
        return DeviceGathering(self, copies, self.mode.stores_layerwise(len(copies) * self.shard().nbytes))

    def before_writes(self) -> None:
        """As `Copies.before_writes`."""
        if self.last_gather is not None and not self.last_gather.done():
            self.last_gather.order()  # it is the last of its lane

    def close(self) -> None:
        """As `Copies.close`."""
        for settler in self.settlers or ():
            settler.close()


class DeviceScattering:
    """`Scattering`: every copy has been started once this exists; chunks with sums were verified before."""

    def __init__(self, owner: DeviceCopies, copies: Sequence[Copy], layerwise: bool, beside: bool) -> None:
        self._owner = owner
        self._copies = copies
        self._faults: dict[int, Fault] = {}
        self._events: list[CopyEvent] = []
        self._layers: dict[int, list[CopyEvent]] = {}
        self._waited: set[int] = set()
        staged, locked = self._sort()
        self._late = [index for index in locked if layerwise and copies[index].layerwise]
        whole = [index for index in locked if index not in self._late]
        with ExitStack() as failing:
            failing.callback(self._wait)  # what was started uses its memory, whatever is raised
            for index in staged:
                owner.transfer.scatter(copies[index].memory, copies[index].blocks, b"")
                self._rotate(index, None)
            events = self._start(whole, None)
            if not beside or any(copies[index].rotation for index in whole):
                for event in events:
                    event.order()
                self._rotate_behind(whole, None)
            if self._late:
                self._layers = {range_: self._start(self._late, range_) for range_ in owner.order}
            failing.pop_all()
        settlers = owner.settlers
        self._job: Future[bool] | None = settlers.scatters.submit(self._wait) if settlers is not None else None

    @property
    def faults(self) -> Mapping[int, Fault]:
        """As `Scattering.faults`."""
        return self._faults

    def wait(self, range_: int) -> None:
        """As `Scattering.wait`: what is launched from here on comes after the range's copies."""
        if range_ in self._layers:
            for event in self._layers[range_]:
                event.order()
            if range_ not in self._waited:
                self._rotate_behind(self._late, range_)
            self._waited.add(range_)

    def layers_ran(self) -> None:
        """As `Scattering.layers_ran`."""
        if self._layers.keys() - self._waited:
            self._owner.mode.never_layerwise()
            fail(self._faults, self._copies, self._late, Fault.LOST)

    def done(self, limit_s: float = 0.0) -> bool:
        """As `Scattering.done`."""
        return _done(self._job, self._events, limit_s)

    def end(self) -> Mapping[int, Fault]:
        """As `Scattering.end`."""
        if self._job is None:
            self._wait()
        elif result_of(self._job) is None:
            fail(self._faults, self._copies, range(len(self._copies)), Fault.LOST)
        given_up = [index for index, copy in enumerate(self._copies) if copy.memory.failed]
        fail(self._faults, self._copies, given_up, Fault.LOST)
        return self._faults

    def _sort(self) -> tuple[list[int], list[int]]:
        """The copies that are to be made: through a staging copy, and by the device itself."""
        for index, copy in enumerate(self._copies):
            progress = copy.memory.progress
            if index in self._faults:
                continue
            if progress is not None and not progress.has(len(self._owner.transfer.shard.ranges)):
                fail(self._faults, self._copies, [index], Fault.LOST)
            elif copy.sums and not ranges_hold(copy.memory.views(), copy.sums):
                fail(self._faults, self._copies, [index], Fault.DIFFERS)
        right = [index for index in range(len(self._copies)) if index not in self._faults]
        staged = [index for index in right if not self._copies[index].memory.pieces]
        if any(self._copies[index].rotation for index in staged):
            # a text is rotated as one; the pool is still being locked, or cannot be
            staged = [index for index in right if index in staged or self._copies[index].rotation]
        return staged, [index for index in right if index not in staged]

    def _start(self, indexes: Sequence[int], range_: int | None) -> list[CopyEvent]:
        """Starts to copy range `range_` (None: all) of these."""
        first, transfer = len(self._events), self._owner.transfer
        on_the_way = [n for n in indexes if self._copies[n].rotation and transfer.rotates_on_the_way]
        plain = self._jobs([n for n in indexes if n not in on_the_way])
        if plain:
            self._events.append(transfer.start_scatter(plain, range_))
        rotations = [(n, rotation) for n in on_the_way if (rotation := self._copies[n].rotation) is not None]
        for _, text in groupby(rotations, lambda pair: id(pair[1].text)):
            chunks = list(text)
            if [rotation.chunk for _, rotation in chunks] != [*range(len(chunks))]:
                raise ValueError("chunks of a text that is rotated are copied from its first one on, in their order")
            jobs = self._jobs([n for n, _ in chunks])
            for batch in chunks[0][1].text.batches(range_, len(jobs)):
                self._events.append(transfer.start_rotated(jobs, batch))
        return self._events[first:]

    def _jobs(self, indexes: Iterable[int]) -> list[CopyJob]:
        return [CopyJob(self._copies[index].blocks, self._copies[index].memory) for index in indexes]

    def _rotate_behind(self, indexes: Iterable[int], range_: int | None) -> None:
        """Rotates what the transfer could not rotate on its way."""
        if not self._owner.transfer.rotates_on_the_way:
            for index in indexes:
                self._rotate(index, range_)

    def _rotate(self, index: int, range_: int | None) -> None:
        rotation = self._copies[index].rotation
        if rotation is not None:
            rotation.text.in_place(rotation.chunk, range(range_, range_ + 1) if range_ is not None else None)

    def _wait(self) -> bool:
        return wait(self._events)


class DeviceGathering:
    """`Gathering`: a layer's copy starts behind the layer."""

    def __init__(self, owner: DeviceCopies, copies: Sequence[Copy], layerwise: bool) -> None:
        self._owner = owner
        self._copies = copies
        self._layerwise = layerwise
        self._locked = [CopyJob(copy.blocks, copy.memory) for copy in copies if copy.memory.pieces]
        self._events: list[CopyEvent] = []
        self._saved: set[int] = set()
        self._staged: dict[int, bytes] = {}
        self._job: Future[dict[int, bytes]] | None = None
        self._finished = False
        self._sums: dict[int, bytes] = {}

    def save(self, range_: int) -> None:
        """As `Gathering.save`."""
        if self._layerwise:
            self._start(range_)
            self._saved.add(range_)

    def finish(self) -> None:
        """As `Gathering.finish`."""
        for range_ in set(self._owner.order) - self._saved if self._saved else (None,):
            self._start(range_)
        gather = self._owner.transfer.gather
        self._staged = {
            index: gather(copy.blocks, copy.memory, copy.seal)
            for index, copy in enumerate(self._copies)
            if not copy.memory.pieces
        }
        self._finished = True
        if self._owner.settlers is not None:
            self._job = self._owner.settlers.gathers.submit(self._settle)

    def done(self, limit_s: float = 0.0) -> bool:
        """As `Gathering.done`."""
        return _done(self._job, self._events, limit_s)

    def end(self) -> dict[int, bytes]:
        """As `Gathering.end`."""
        if self._job is not None:
            return result_of(self._job) or {}
        if self._finished and not self._sums:
            self._sums = self._settle()
        wait(self._events)
        return self._sums

    def _start(self, range_: int | None) -> None:
        if self._locked:
            self._owner.last_gather = self._owner.transfer.start_gather(self._locked, range_)
            self._events.append(self._owner.last_gather)

    def _settle(self) -> dict[int, bytes]:
        wait(self._events)
        sums = dict(self._staged)
        for index, copy in enumerate(self._copies):
            if index not in sums:
                ranges = self._owner.transfer.shard.ranges
                sums[index] = seal_ranges(ranges, copy.memory.views()) if copy.seal else b""
        return sums


def wait(events: Iterable[CopyEvent]) -> bool:
    """True once all are complete."""
    for event in events:
        event.wait()
    return True


def _done(job: Future[T] | None, events: Iterable[CopyEvent], limit_s: float) -> bool:
    return all_done([job], limit_s) if job is not None else all(event.done() for event in events)
