"""A device in a test's hands: its copies are really made, by the CPU, but only when the test says so.

Its compute stream is always at its end, so what is launched there runs at once; what must come before it is copied
then. So a copy is as late as the events allow, which is when a missing event shows. Knows nothing about plans.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvkeep.memory.page_lock import PinCalls
from kvkeep.transfer.device.device import DeviceTransfer, Path, Turned
from kvkeep.transfer.device.memcpy import CopyMover
from kvkeep.transfer.device.tables import Numbers, Part
from kvkeep.transfer.pages import GroupCaches

LOCKS = PinCalls(lambda _address, _nbytes: "", lambda _address: "")
"""Page-locks nothing, and never refuses."""


class MemmoveDriver:
    """A `Driver` that has copied when it returns."""

    def copy(self, targets: Numbers, sources: Numbers, sizes: Numbers, stream: int) -> None:
        """As `Driver.copy`."""
        for target, source, nbytes in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            ctypes.memmove(target, source, nbytes)


@dataclass
class HeldLane:
    """A `Lane` whose batches are copied in their order, each when it is landed, waited for or ordered before others.

    `waits` counts how often somebody waited for a copy that had not landed, `flights` the batches.
    """

    held: deque[HeldFlight] = field(default_factory=deque)
    waits: int = 0
    flights: int = 0

    def run(self, start: Callable[[], None]) -> HeldFlight:
        """As `Lane.run`."""
        flight = HeldFlight(self, start)
        self.held.append(flight)
        self.flights += 1
        return flight

    def land(self, count: int = 1 << 30) -> None:
        """Makes the copies of the next `count` batches."""
        for _ in range(min(count, len(self.held))):
            flight = self.held.popleft()
            try:
                flight.start()
                flight.landed = True
            finally:
                flight.lost = not flight.landed


@dataclass
class HeldFlight:
    """A `Flight` of a HeldLane."""

    lane: HeldLane
    start: Callable[[], None]
    landed: bool = False
    lost: bool = False

    def done(self) -> bool:
        """As `Flight.done`."""
        return self.landed

    def wait(self) -> None:
        """As `Flight.wait`: the device gets there while the caller waits."""
        self.lane.waits += not self.landed
        self.order()

    def order(self) -> None:
        """As `Flight.order`: what comes next on the compute stream comes at once."""
        while not self.landed:
            assert not self.lost, "these copies have failed"
            self.lane.land(1)


@dataclass
class HeldDevice:
    """One device: its lane to the pool and its lane from it; `turned` turns K on its way, where it can."""

    stores: HeldLane = field(default_factory=HeldLane)
    loads: HeldLane = field(default_factory=HeldLane)
    turned: Turned | None = None

    def transfer(self, groups: Sequence[GroupCaches], chunk_tokens: int) -> DeviceTransfer:
        """Copies for caches that are in the CPU's memory."""

        def paths(parts: tuple[Part, ...]) -> tuple[Path, Path]:
            mover = CopyMover(parts, MemmoveDriver(), lambda: 0)
            return Path(mover, self.stores), Path(mover, self.loads)

        return DeviceTransfer(groups, chunk_tokens, paths, self.turned)
