"""A step's copies layer by layer: what a layer needs is there before it runs, and leaves while the next one runs.

Knows nothing about plans, requests or the engine's calls. Loads are submitted in the order of the ranges; a layer waits
for its own only, which waits for what a tier still reads of it. A store is complete when every range of every chunk has
been handed over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from kvkeep.engine.copies.patience import Patience
from kvkeep.engine.copies.thread import Copier
from kvkeep.errors import CopyFailed
from kvkeep.memory.pool import Lease
from kvkeep.trace import Trace
from kvkeep.transfer.transfer import Blocks, Transfer

COPY_LIMIT_S = 60.0


class Copy(NamedTuple):
    """The blocks of one chunk and its memory; `place` is its op's in the plan, `seal` that its ranges are summed."""

    place: int
    blocks: Sequence[Blocks]
    lease: Lease
    seal: bool = False


class Tools(NamedTuple):
    """What copies are made with."""

    transfer: Transfer
    copier: Copier
    trace: Trace
    clock: Callable[[], float]
    patience: Patience


class LayerLoads:
    """Scatters of one step by layer; they are all on their way once this exists.

    A layer that ran without having waited may have run before its blocks were there: that is a failure of every copy.
    """

    def __init__(self, tools: Tools, copies: Sequence[Copy]) -> None:
        self._tools = tools
        self._copies = copies
        self._ranges = [tools.copier.submit(partial(self._scatter, n)) for n in _numbers(tools)]
        self._waited: set[int] = set()

    def wait(self, number: int) -> None:
        """Returns when this range has arrived, or has failed."""
        finished(self._ranges[number])
        self._waited.add(number)

    def failed(self) -> set[int]:
        """When every range has arrived: the places of the copies of which any has failed."""
        everything = {copy.place for copy in self._copies}
        places = everything if len(self._waited) < len(self._ranges) else set()
        for one in self._ranges:
            missing = finished(one)
            places |= everything if missing is None else set(missing)
        return places

    def _scatter(self, number: int) -> list[int]:
        start_s = self._tools.clock()
        missing = [copy.place for copy in self._copies if not self._scattered(copy, number)]
        self._tools.trace.span(f"load layer {number}", "copies", start_s, self._tools.clock())
        return missing

    def _scattered(self, copy: Copy, number: int) -> bool:
        """Copies a range once it is there; what was given up meanwhile may be another's, and counts as failed."""
        if not self._tools.patience.arrived(copy.lease, number + 1):
            return False
        held = self._tools.transfer.scatter(copy.lease, copy.blocks, b"", range(number, number + 1))
        return held and not copy.lease.failed


class LayerStores:
    """Gathers of one step by layer."""

    def __init__(self, tools: Tools, copies: Sequence[Copy]) -> None:
        self._tools = tools
        self._copies = copies
        self._ranges: dict[int, Future[list[bytes]]] = {}

    def save(self, number: int) -> None:
        """The layer has been computed. One that is computed in parts comes several times: the last time counts."""
        self._ranges[number] = self._tools.copier.submit(partial(self._gather, number))

    def finish(self) -> dict[int, bytes]:
        """When every range has left: each copy's sums by its place; empty if any failed."""
        numbers = _numbers(self._tools)
        for number in numbers:
            if number not in self._ranges:
                self.save(number)
        parts = [finished(self._ranges[number]) for number in numbers]
        sums = [[part[row] for part in parts if part is not None] for row in range(len(self._copies))]
        if None in parts:
            return {}
        return {copy.place: b"".join(one) for copy, one in zip(self._copies, sums, strict=True)}

    def _gather(self, number: int) -> list[bytes]:
        start_s = self._tools.clock()
        only, gather = range(number, number + 1), self._tools.transfer.gather
        sums = [gather(copy.blocks, copy.lease, copy.seal, only) for copy in self._copies]
        self._tools.trace.span(f"store layer {number}", "copies", start_s, self._tools.clock())
        return sums


def finished(job: Future[list[int]] | Future[list[bytes]]) -> list | None:  # type: ignore[type-arg]
    """A copy's result when it has ended, None if it died.

    TimeoutError after COPY_LIMIT_S: whatever it may still write, nobody goes on as if it had ended.
    """
    try:
        return job.result(COPY_LIMIT_S)
    except CopyFailed:
        return None


def _numbers(tools: Tools) -> range:
    return range(len(tools.transfer.shard.ranges))
