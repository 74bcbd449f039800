"""The copies of one request by the CPU, for a caller that goes through the layers by itself: at once, or by layer.

With a thread loads run ahead of the steps and stores behind them; without one each step makes its own copies. Knows
nothing about keys or the store. A copy that raises raises in the caller if the caller makes it; one that dies on the
thread has failed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple, Protocol

from kvkeep.core.units import SUM_NBYTES
from kvkeep.engine.copies.mode import CopyMode
from kvkeep.engine.copies.relay import finished
from kvkeep.engine.copies.thread import Copier, InlineCopier
from kvkeep.memory.pool import Lease
from kvkeep.transfer.rope.keys import Rotator, TextRotation
from kvkeep.transfer.transfer import Blocks, Transfer


class Means(NamedTuple):
    """What an engine works with: a clock in seconds, the thread that copies layers, what moves K (None: nothing)."""

    clock: Callable[[], float] = time.monotonic
    copier: Copier | None = None
    rotator: Rotator | None = None


ALONE = Means()


class Chunk(NamedTuple):
    """A chunk's memory, its blocks, the sums that it is verified by (b"": it is not)."""

    lease: Lease
    blocks: Sequence[Blocks]
    sums: bytes = b""


class LoadSteps(Protocol):
    """The scatters of a request."""

    @property
    def arrived(self) -> int:
        """How many chunks, from the first one on, have arrived in every layer so far."""

    @property
    def differs(self) -> bool:
        """Whether the chunk behind those is not what was written; else its copy was lost, and it is as good as ever."""

    def step(self, number: int) -> None:
        """The layer of this step has been written, for whatever the caller does next, when this returns."""

    def over(self) -> int:
        """After the last step: how many chunks have arrived."""

    def end(self) -> None:
        """Nothing is written any more when this returns."""


class StoreSteps(Protocol):
    """The gathers of a request."""

    def step(self, number: int) -> None:
        """The layer of this step has been computed."""

    def over(self) -> list[bytes]:
        """After the last layer's step: each chunk's sums when it has left; none at all if a copy died."""

    def end(self) -> None:
        """Nothing is read any more when this returns."""


class Copies(Protocol):
    """Makes the copies of requests; any thread may call. `at_once`: all of one is done at step 0, the only one."""

    def loads(self, chunks: Sequence[Chunk], rotation: TextRotation | None, at_once: bool) -> LoadSteps:
        """The steps of a retrieve, whose K moves by `rotation`."""

    def stores(self, chunks: Sequence[Chunk], at_once: bool) -> StoreSteps:
        """The steps of a store."""


class Ways:
    """`Copies` by the CPU: as `mode` says, or ("auto") in the way that has cost the caller less.

    `order` has each layer's range in the order of the steps.
    """

    def __init__(self, transfer: Transfer, order: Sequence[range], mode: str, means: Means) -> None:
        self.transfer = transfer
        self.order = order
        self.means = means
        self._choice = CopyMode(mode, possible=means.copier is not None)
        self._deciding = threading.Lock()

    def loads(
        self, chunks: Sequence[Chunk], rotation: TextRotation | None = None, at_once: bool = False
    ) -> RetrieveCopies:
        """As `Copies.loads`."""
        return RetrieveCopies(self, chunks, rotation, self._by_layer(at_once))

    def stores(self, chunks: Sequence[Chunk], at_once: bool = False) -> StoreCopies:
        """As `Copies.stores`."""
        return StoreCopies(self, chunks, self._by_layer(at_once))

    def took(self, layerwise: bool | None, seconds: float, chunks: int) -> None:
        """All steps of a request are over, and this is what they cost the caller."""
        if layerwise is not None:
            with self._deciding:
                self._choice.took(layerwise, seconds, chunks * self.transfer.shard.nbytes)

    def copier(self, layerwise: bool | None) -> tuple[Copier, bool]:
        """What makes the copies, and whether it is a thread."""
        copier = self.means.copier if layerwise else None
        return copier or InlineCopier(), copier is not None

    def _by_layer(self, at_once: bool) -> bool | None:
        """Whether each layer has a copy of its own; None: nor has it a step."""
        if at_once:
            return None
        with self._deciding:
            return self._choice.layerwise()


class RetrieveCopies:
    """`LoadSteps`; a chunk that fails in any layer ends what has arrived, and later layers leave it alone."""

    def __init__(
        self, ways: Ways, chunks: Sequence[Chunk], rotation: TextRotation | None, layerwise: bool | None
    ) -> None:
        self._ways = ways
        self._chunks = chunks
        self._rotation = rotation
        self._layerwise = layerwise
        self._copier, self._ahead = ways.copier(layerwise)
        self._pieces: list[range | None] = list(ways.order) if layerwise else [None]
        self._jobs: list[Future[list[int]]] = []
        self._spent_s = 0.0
        self.arrived = len(chunks)
        self.differs = False

    def step(self, number: int) -> None:
        """As `LoadSteps.step`."""
        if not self._chunks:
            return
        start_s = self._ways.means.clock()
        wanted = len(self._pieces) if self._ahead else min(number + 1, len(self._pieces))
        while len(self._jobs) < wanted:
            self._jobs.append(self._copier.submit(partial(self._scatter, self._pieces[len(self._jobs)])))
        if finished(self._jobs[min(number, wanted - 1)]) is None:
            self.arrived, self.differs = 0, False
        self._spent_s += self._ways.means.clock() - start_s

    def over(self) -> int:
        """As `LoadSteps.over`."""
        self._ways.took(self._layerwise, self._spent_s, len(self._chunks))
        return self.arrived

    def end(self) -> None:
        """As `LoadSteps.end`."""
        for job in self._jobs:
            finished(job)

    def _scatter(self, layer: range | None) -> list[int]:
        part = slice(layer.start * SUM_NBYTES, layer.stop * SUM_NBYTES) if layer is not None else slice(None)
        for place, (lease, blocks, sums) in enumerate(self._chunks[: self.arrived]):
            if not self._ways.transfer.scatter(lease, blocks, sums[part], layer):
                self.arrived, self.differs = place, True
                break
            if self._rotation is not None:
                self._rotation.in_place(place, layer)
        return []


class StoreCopies:
    """`StoreSteps`."""

    def __init__(self, ways: Ways, chunks: Sequence[Chunk], layerwise: bool | None) -> None:
        self._ways = ways
        self._chunks = chunks
        self._layerwise = layerwise
        self._copier, _ = ways.copier(layerwise)
        self._jobs: list[Future[list[bytes]]] = []
        self._spent_s = 0.0

    def step(self, number: int) -> None:
        """As `StoreSteps.step`."""
        start_s = self._ways.means.clock()
        if self._layerwise and self._chunks:
            self._jobs.append(self._copier.submit(partial(self._gather, self._ways.order[number])))
        self._spent_s += self._ways.means.clock() - start_s

    def over(self) -> list[bytes]:
        """As `StoreSteps.over`."""
        if not self._chunks:
            return []
        start_s = self._ways.means.clock()
        if not self._layerwise:
            self._jobs.append(self._copier.submit(partial(self._gather, None)))
        parts = [finished(job) for job in self._jobs]
        self._ways.took(self._layerwise, self._spent_s + self._ways.means.clock() - start_s, len(self._chunks))
        if None in parts:
            return []
        # in the order of the chunk's ranges, which need not be that of the steps
        order = sorted(range(len(parts)), key=lambda step: self._ways.order[step].start)
        return [b"".join((parts[step] or [])[place] for step in order) for place in range(len(self._chunks))]

    def end(self) -> None:
        """As `StoreSteps.end`."""
        for job in self._jobs:
            finished(job)

    def _gather(self, layer: range | None) -> list[bytes]:
        return [self._ways.transfer.gather(blocks, lease, True, layer) for lease, blocks, _ in self._chunks]
