"""The copies of one request by the device itself, for a caller that goes through the layers by itself.

Nothing is waited for before the request's end: a layer's step puts what is launched from then on behind its copies.
Knows nothing about keys or the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from kvkeep.doors.library.by_layer import Chunk
from kvkeep.engine.copies.device import wait
from kvkeep.engine.rank.device_worker import BY_LAYER_NBYTES
from kvkeep.transfer.device.device import DeviceTransfer
from kvkeep.transfer.device.streams import CopyEvent
from kvkeep.transfer.device.tables import CopyJob
from kvkeep.transfer.rope.keys import Batch, TextRotation
from kvkeep.transfer.transfer import ranges_hold, seal_ranges


class Streams:
    """`Copies` on a device: as `mode` says; "auto" goes by layer where that is worth a launch a layer.

    `order` has each layer's range in the order of the steps.
    """

    def __init__(self, transfer: DeviceTransfer, order: Sequence[range], mode: str) -> None:
        self._transfer = transfer
        self._order = order
        self._mode = mode

    def loads(
        self, chunks: Sequence[Chunk], rotation: TextRotation | None = None, at_once: bool = False
    ) -> StreamLoads:
        """As `Copies.loads`."""
        return StreamLoads(self._transfer, chunks, rotation, self._steps(chunks, at_once))

    def stores(self, chunks: Sequence[Chunk], at_once: bool = False) -> StreamStores:
        """As `Copies.stores`."""
        return StreamStores(self._transfer, chunks, self._steps(chunks, at_once))

    def _steps(self, chunks: Sequence[Chunk], at_once: bool) -> Sequence[range]:
        """The ranges of each step; none: all of them are one batch."""
        large = len(chunks) * self._transfer.shard.nbytes > BY_LAYER_NBYTES
        by_layer = self._mode == "layerwise" or (self._mode == "auto" and large)
        return self._order if by_layer and not at_once else ()


class StreamLoads:
    """`LoadSteps`: every copy is started at the first step; what must be verified is verified before."""

    def __init__(
        self, transfer: DeviceTransfer, chunks: Sequence[Chunk], rotation: TextRotation | None, steps: Sequence[range]
    ) -> None:
        self._transfer = transfer
        self._chunks = chunks
        self._rotation = rotation  # kept to the end: copies under way read it
        self._steps = steps
        self._events: list[list[CopyEvent]] = []
        self._behind: list[int] = []
        self._started = False
        self.arrived = len(chunks)
        self.differs = False

    def step(self, number: int) -> None:
        """As `LoadSteps.step`."""
        if not self._started:
            self._started = True
            self._start()
        if number < len(self._events):
            for event in self._events[number]:
                event.order()
            for place in self._behind:
                self._in_place(place, self._steps[number] if self._steps else None)

    def over(self) -> int:
        """As `LoadSteps.over`."""
        return self.arrived

    def end(self) -> None:
        """As `LoadSteps.end`."""
        wait(event for step in self._events for event in step)

    def _start(self) -> None:
        held = takewhile(lambda one: not one.sums or ranges_hold(one.lease.views(), one.sums), self._chunks)
        chunks = list(held)
        self.arrived, self.differs = len(chunks), len(chunks) < len(self._chunks)
        locked = [place for place, one in enumerate(chunks) if one.lease.pieces]
        if self._rotation is not None and len(locked) < len(chunks):
            locked = []  # a rotation is that of a whole text; the pool is being locked still, or cannot be
        for place in sorted({*range(len(chunks))} - {*locked}):
            self._transfer.scatter(chunks[place].lease, chunks[place].blocks, b"")
            self._in_place(place, None)
        if locked:
            self._behind = [] if self._transfer.rotates_on_the_way else locked
            self._fly([CopyJob(chunks[place].blocks, chunks[place].lease) for place in locked])

    def _fly(self, jobs: Sequence[CopyJob]) -> None:
        for step in self._steps or (None,):
            events: list[CopyEvent] = []
            self._events.append(events)  # before anything may fail: what was started is waited for
            for number in (None,) if step is None else step:
                for batch in self._batches(number, len(jobs)):
                    events.append(self._transfer.start_rotated(jobs, batch))

    def _batches(self, number: int | None, chunks: int) -> list[Batch]:
        """What is copied of a range, or (None) of all of them: K on its way where the transfer can turn it there."""
        on_the_way = self._rotation is not None and self._transfer.rotates_on_the_way
        return self._rotation.batches(number, chunks) if on_the_way and self._rotation is not None else [Batch(number)]

    def _in_place(self, place: int, layers: range | None) -> None:
        if self._rotation is not None:
            self._rotation.in_place(place, layers)


class StreamStores:
    """`StoreSteps`: each copy is started behind its layer; they are waited for, and summed, after the last one."""

    def __init__(self, transfer: DeviceTransfer, chunks: Sequence[Chunk], steps: Sequence[range]) -> None:
        self._transfer = transfer
        self._chunks = chunks
        self._steps = steps
        self._jobs = [CopyJob(one.blocks, one.lease) for one in chunks if one.lease.pieces]
        self._events: list[CopyEvent] = []

    def step(self, number: int) -> None:
        """As `StoreSteps.step`."""
        for only in self._steps[number] if self._steps and self._jobs else ():
            self._events.append(self._transfer.start_gather(self._jobs, only))

    def over(self) -> list[bytes]:
        """As `StoreSteps.over`."""
        if self._jobs and not self._steps:
            self._events.append(self._transfer.start_gather(self._jobs))
        staged = {
            place: self._transfer.gather(one.blocks, one.lease, True)
            for place, one in enumerate(self._chunks)
            if not one.lease.pieces
        }
        wait(self._events)
        ranges = self._transfer.shard.ranges
        return [
            staged[place] if place in staged else seal_ranges(ranges, one.lease.views())
            for place, one in enumerate(self._chunks)
        ]

    def end(self) -> None:
        """As `StoreSteps.end`."""
        wait(self._events)
