"""Plays a clock, and transfers that fail on demand.

Knows nothing about requests, stores or engines.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from kvkeep.core.layout import ShardLayout
from kvkeep.core.units import SUM_NBYTES
from kvkeep.memory.pool import Lease
from kvkeep.transfer.transfer import Blocks, Transfer, check_blocks

T = TypeVar("T")


@dataclass
class ManualClock:
    """A clock in seconds that stands still until it is moved; call it where a `Callable[[], float]` is wanted."""

    now_s: float = 0.0

    def __call__(self) -> float:
        """The time in seconds."""
        return self.now_s

    def advance(self, by_s: float) -> None:
        """Moves the clock forward."""
        assert by_s >= 0, "a clock does not go back"
        self.now_s += by_s


@dataclass
class FaultyTransfer:
    """`inner`, but some scatters fail before they touch anything; whatever it does copy is right.

    A scatter fails (returns False) if its number, counted from 0 on this rank, is in `failing_calls`, or if it names
    one of `failing_blocks`. `failures` counts them.
    """

    inner: Transfer
    failing_calls: set[int] = field(default_factory=set)
    failing_blocks: set[int] = field(default_factory=set)
    calls: int = 0
    failures: int = 0

    @property
    def shard(self) -> ShardLayout:
        """As `Transfer.shard`."""
        return self.inner.shard

    def gather(self, blocks: Sequence[Blocks], lease: Lease, seal: bool, layers: range | None = None) -> bytes:
        """As `Transfer.gather`."""
        return self.inner.gather(blocks, lease, seal, layers)

    def scatter(self, lease: Lease, blocks: Sequence[Blocks], sums: bytes, layers: range | None = None) -> bool:
        """As `Transfer.scatter`, unless this one is to fail."""
        number, self.calls = self.calls, self.calls + 1
        named = {block_id for run in blocks for block_id in run.block_ids}
        if number in self.failing_calls or named & self.failing_blocks:
            self.failures += 1
            return False
        return self.inner.scatter(lease, blocks, sums, layers)

    def check(self, blocks: Sequence[Blocks], unique: bool) -> None:
        """As `Transfer.check`."""
        self.inner.check(blocks, unique)


@dataclass
class StillTransfer:
    """Moves nothing and finds every sum right: what is left is the cost of everything around the copies."""

    shard: ShardLayout

    def gather(self, blocks: Sequence[Blocks], lease: Lease, seal: bool, layers: range | None = None) -> bytes:
        """Sums that are all zero."""
        return bytes(SUM_NBYTES * len(self.shard.chosen(layers))) if seal else b""

    def scatter(self, lease: Lease, blocks: Sequence[Blocks], sums: bytes, layers: range | None = None) -> bool:
        """Always succeeds."""
        return True

    def check(self, blocks: Sequence[Blocks], unique: bool) -> None:
        """As `Transfer.check`, for as many blocks as there are."""
        check_blocks(self.shard, [1 << 31] * len(self.shard.groups), blocks, unique=unique)


@dataclass
class HeldCopier:
    """Keeps copies until it is told to run some, or until somebody waits for one."""

    waiting: dict[bool, deque[Callable[[], None]]] = field(default_factory=lambda: {False: deque(), True: deque()})

    def submit(self, call: Callable[[], T], background: bool = False) -> Future[T]:
        """As `Copier.submit`."""
        job: HeldFuture[T] = HeldFuture(self)
        self.waiting[background].append(lambda: job.set_result(call()))
        return job

    def run(self, count: int) -> None:
        """Runs the next `count` copies."""
        for _ in range(min(count, sum(map(len, self.waiting.values())))):
            (self.waiting[False] or self.waiting[True]).popleft()()

    def close(self) -> None:
        """As `Copier.close`."""
        self.run(sum(map(len, self.waiting.values())))


class HeldFuture(Future[T]):
    """A copy that is run, after all that were submitted before it, when it is waited for."""

    def __init__(self, copier: HeldCopier) -> None:
        super().__init__()
        self._copier = copier

    def result(self, timeout: float | None = None) -> T:
        """As `Future.result`, without a wait."""
        while not self.done():
            self._copier.run(1)
        return super().result(timeout)
