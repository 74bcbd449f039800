"""Gathers and scatters where the device itself reads and writes the pool.

`DeviceTransfer` is a `Transfer`; its `start_...` methods copy many chunks at once, one layer or all of them, and return
an event that completes with the copies. Memory that is not page-locked goes through `StagedTransfer`. Knows nothing
about keys, requests or how bytes move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from kvkeep.core.layout import ShardLayout
from kvkeep.memory.pool import Lease
from kvkeep.transfer.device.streams import CopyEvent, CopyStream
from kvkeep.transfer.device.tables import CopyJob, PageCopier, Pages, Part, parts_of
from kvkeep.transfer.pages import GroupCaches, group_rows
from kvkeep.transfer.rope.keys import Alike, Batch
from kvkeep.transfer.rope.rotate import Rotation
from kvkeep.transfer.staged import StagedTransfer
from kvkeep.transfer.transfer import Blocks, ranges_hold, seal_ranges


class Direction(NamedTuple):
    """How one direction is copied, and on which stream."""

    copier: PageCopier
    stream: CopyStream


class RotatingCopier(Protocol):
    """A copier that rotates K on its way."""

    def start(self, jobs: Sequence[CopyJob], to_pool: bool, only: int | None) -> None:
        """As `PageCopier.start`."""

    def prepare(self) -> None:
        """Compiles what `start` will launch."""


MakeRotating = Callable[[Sequence[Part], Alike, Rotation], RotatingCopier]
"""Makes the copier of a batch that rotates K on its way."""


class DeviceTransfer:
    """Copies for one rank. `directions` makes the two directions, to the pool and from it, once the parts are known.

    Without `make_rotating` K is rotated in its blocks. Raises LayoutMismatch, naming the layer, for a cache that has no
    dense pages.
    """

    def __init__(
        self,
        groups: Sequence[GroupCaches],
        chunk_tokens: int,
        directions: Callable[[tuple[Part, ...]], tuple[Direction, Direction]],
        make_rotating: MakeRotating | None = None,
    ) -> None:
        self._staged = StagedTransfer(groups, chunk_tokens)
        self._shard = self._staged.shard
        self.parts = parts_of(self._shard, [_pages(group) for group in groups])
        self._to_pool, self._from_pool = directions(self.parts)
        self._make_rotating = make_rotating

    @property
    def rotates_on_the_way(self) -> bool:
        """Whether `start_rotated` rotates; else it copies K as it is stored, to be rotated in its blocks."""
        return self._make_rotating is not None

    @property
    def shard(self) -> ShardLayout:
        """As `Transfer.shard`."""
        return self._shard

    def prepare_rotations(self, kinds: Sequence[Alike]) -> None:
        """Compiles what will rotate these on the way, so that no request waits for it."""
        if self._make_rotating is None:
            return
        for alike in kinds:
            none = alike.keys.frequencies[None, :][:0]
            self._make_rotating(self.parts, alike, Rotation(none, none)).prepare()

    def check(self, blocks: Sequence[Blocks], unique: bool) -> None:
        """As `Transfer.check`."""
        self._staged.check(blocks, unique)

    def gather(self, blocks: Sequence[Blocks], lease: Lease, seal: bool, layers: range | None = None) -> bytes:
        """As `Transfer.gather`."""
        if not lease.pieces:
            return self._staged.gather(blocks, lease, seal, layers)
        for event in [self.start_gather([CopyJob(blocks, lease)], only) for only in _each(layers)]:
            event.wait()
        return seal_ranges(self._shard.chosen(layers), lease.views(layers)) if seal else b""

    def scatter(self, lease: Lease, blocks: Sequence[Blocks], sums: bytes, layers: range | None = None) -> bool:
        """As `Transfer.scatter`."""
        if not lease.pieces:
            return self._staged.scatter(lease, blocks, sums, layers)
        if sums and not ranges_hold(lease.views(layers), sums):
            return False
        for event in [self.start_scatter([CopyJob(blocks, lease)], only) for only in _each(layers)]:
            event.order()
            event.wait()
        return True

    def start_gather(self, jobs: Sequence[CopyJob], only: int | None = None) -> CopyEvent:
        """Starts to copy blocks into chunks: every range, or the one with index `only`.

        The copies run after what the current stream has now.
        Every lease must be page-locked (else ValueError) and stay open until the event is done; then `seal_ranges` may
        sum.
        """
        return self._start(self._to_pool, jobs, True, only)

    def start_scatter(self, jobs: Sequence[CopyJob], only: int | None = None) -> CopyEvent:
        """Starts to copy chunks into blocks, likewise; the caller verifies sums.

        Launch what reads the blocks after the event's `order`; for one layer, after the event of its `only`.
        """
        return self._start(self._from_pool, jobs, False, only)

    def start_rotated(self, jobs: Sequence[CopyJob], batch: Batch) -> CopyEvent:
        """As `start_scatter` for what the batch names; its rotation, if any, must live until the event is done."""
        direction = self._from_pool
        if batch.alike is not None and batch.rotation is not None and self._make_rotating is not None:
            direction = direction._replace(copier=self._make_rotating(self.parts, batch.alike, batch.rotation))
        return self._start(direction, jobs, False, batch.only)

    def _start(self, direction: Direction, jobs: Sequence[CopyJob], to_pool: bool, only: int | None) -> CopyEvent:
        if not all(job.lease.pieces for job in jobs):
            raise ValueError("memory that is not page-locked cannot be copied by the device")
        return direction.stream.run(lambda: direction.copier.start(jobs, to_pool, only))


def _each(layers: range | None) -> Sequence[int | None]:
    """Return the index of each range to start a batch for; one batch for all ranges (None) where `layers` is None."""
    return (None,) if layers is None else layers


def _pages(group: GroupCaches) -> list[list[Pages]]:
    """The group's pages as addresses."""
    return [[Pages(part.data_ptr(), part.stride(0), part.shape[1]) for part in parts] for parts in group_rows(group)]
