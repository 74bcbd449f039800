"""Plays a device: the CPU makes its copies, each as late as the events allow, which is when a missing event shows.

What is launched on the played compute stream runs at once; copies that an event orders before it are made then. All
other copies wait until the test lets them through. Knows nothing about plans.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvkeep.memory.page_lock import PinCalls
from kvkeep.transfer.device.device import DeviceTransfer, Direction, MakeRotating
from kvkeep.transfer.device.memcpy import MemcpyCopier
from kvkeep.transfer.device.tables import Int64Array, Part
from kvkeep.transfer.pages import GroupCaches

LOCKS = PinCalls(lambda _address, _nbytes: "", lambda _address: "")
"""Page-locks nothing, and never refuses."""


class MemmoveDriver:
    """A `Driver` that has copied when it returns."""

    def copy(self, targets: Int64Array, sources: Int64Array, sizes: Int64Array, stream: int) -> None:
        """As `Driver.copy`."""
        for target, source, nbytes in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            ctypes.memmove(target, source, nbytes)


class CompletedCopy:
    """The `CopyEvent` of copies that were complete at once."""

    def done(self) -> bool:
        """True."""
        return True

    def wait(self) -> None:
        """Nothing to wait for."""

    def order(self) -> None:
        """Nothing to order."""


class InlineStream:
    """A `CopyStream` that copies while it starts: on a CPU."""

    def run(self, start: Callable[[], None]) -> CompletedCopy:
        """As `CopyStream.run`."""
        start()
        return CompletedCopy()


@dataclass
class HeldStream:
    """A `CopyStream` that holds its batches back and copies them in order.

    It copies a batch when it is let through, waited for or ordered before other work.

    `waits` counts how often somebody waited for a copy that was not complete, `events` the batches.
    """

    held: deque[HeldCopyEvent] = field(default_factory=deque)
    waits: int = 0
    events: int = 0

    def run(self, start: Callable[[], None]) -> HeldCopyEvent:
        """As `CopyStream.run`."""
        event = HeldCopyEvent(self, start)
        self.held.append(event)
        self.events += 1
        return event

    def let_through(self, count: int = 1 << 30) -> None:
        """Makes the copies of the next `count` batches."""
        for _ in range(min(count, len(self.held))):
            event = self.held.popleft()
            try:
                event.start()
                event.complete = True
            finally:
                event.lost = not event.complete


@dataclass
class HeldCopyEvent:
    """A `CopyEvent` of a HeldStream."""

    stream: HeldStream
    start: Callable[[], None]
    complete: bool = False
    lost: bool = False

    def done(self) -> bool:
        """As `CopyEvent.done`."""
        return self.complete

    def wait(self) -> None:
        """As `CopyEvent.wait`: the device gets there while the caller waits."""
        self.stream.waits += not self.complete
        self.order()

    def order(self) -> None:
        """As `CopyEvent.order`: what comes next on the compute stream comes at once."""
        while not self.complete:
            assert not self.lost, "these copies have failed"
            self.stream.let_through(1)


@dataclass
class HeldDevice:
    """One device: its stream to the pool and its stream from it; `make_rotating` rotates K on its way, where it can."""

    stores: HeldStream = field(default_factory=HeldStream)
    loads: HeldStream = field(default_factory=HeldStream)
    make_rotating: MakeRotating | None = None

    def transfer(self, groups: Sequence[GroupCaches], chunk_tokens: int) -> DeviceTransfer:
        """Copies for caches that are in the CPU's memory."""

        def directions(parts: tuple[Part, ...]) -> tuple[Direction, Direction]:
            copier = MemcpyCopier(parts, MemmoveDriver(), lambda: 0)
            return Direction(copier, self.stores), Direction(copier, self.loads)

        return DeviceTransfer(groups, chunk_tokens, directions, self.make_rotating)
