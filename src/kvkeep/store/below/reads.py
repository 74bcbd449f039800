"""The reads of one tier: a bounded number of bytes at once, the rest in a queue, request by request in turn.

A read is never cancelled: its memory stays with it until the tier is done with it, however late. What is late opens the
tier's breaker, and the tier is asked for nothing until a probe has come back. Knows nothing about requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from kvkeep.errors import TierError
from kvkeep.store.below.breaker import Breaker, Gate
from kvkeep.store.below.promotions import Promotion, Promotions
from kvkeep.store.tasks import Tasks
from kvkeep.tiers.tier import Bytes, Tier

log = logging.getLogger("kvkeep.store")

SLICE_NBYTES = 8 << 20  # of one request, so that another's turn comes soon
EARLY_NBYTES = 256 << 20  # where a step waits for the first range of every chunk
UNDER_WAY_NBYTES = 64 << 20
BUG = "it died of a bug, whose traceback is in the log"


class Until(NamedTuple):
    """When a lookup ends (loop time), and how long it lets a tier be silent before the tier has failed (seconds)."""

    end_s: float
    limit_s: float

    @property
    def left_s(self) -> float:
        """The seconds that are left to wait."""
        return max(0.0, self.end_s - asyncio.get_running_loop().time())


@dataclass(eq=False)
class TierReads:
    """Reads `tier`, the `number`-th of all, into the pool's `memory`; it does `max_reads` at once.

    `hung` are slices that are still being read after their limit, of `quarantined_nbytes`; `probes` are those that are
    neither back nor late. A tier all of whose reads may hang gets no more of them until one is back.
    """

    name: str
    tier: Tier
    number: int
    memory: Bytes
    promotions: Promotions
    tasks: Tasks
    max_reads: int = 1
    breaker: Breaker = field(default_factory=Breaker)
    slice_nbytes: int = SLICE_NBYTES
    most_nbytes: int = UNDER_WAY_NBYTES
    under_way_nbytes: int = 0
    quarantined_nbytes: int = 0
    hung: int = 0
    probes: int = 0
    _queue: deque[tuple[deque[list[Promotion]], float]] = field(default_factory=deque)

    @property
    def busy(self) -> bool:
        """Whether anything is under way or waits; what hangs is neither."""
        return bool(self.under_way_nbytes > self.quarantined_nbytes or self._queue)

    def gate(self) -> Gate:
        """What the tier may be asked now."""
        return self.breaker.gate(asyncio.get_running_loop().time())

    async def contains(self, keys: Sequence[bytes], until: Until) -> list[bool]:
        """Which keys the tier says it has, none if it fails; TimeoutError if it has not said so in time."""
        task = await self.tasks.wait(self._contains(keys, until.limit_s), until.left_s)
        if not task.done():
            raise TimeoutError
        if task.exception() is not None:
            self.overdue(BUG)
            return [False] * len(keys)
        return task.result()

    def probe(self, keys: Sequence[bytes], sizes: Sequence[int], limit_s: float) -> None:
        """Try a tier that had failed with the first of these chunks that it has; nobody waits for it."""
        if self.hung + self.probes < self.max_reads:  # else what hangs tells by coming back
            self.probes += 1
            self.breaker.probing(asyncio.get_running_loop().time())
            self.tasks.start(self._probe(keys, sizes, limit_s))

    def add(self, promotions: Sequence[Promotion], limit_s: float) -> None:
        """Read the chunks of one request in order; a slice that takes longer than `limit_s` opens the breaker.

        What is lent already comes first, range by range where it can: a step waits for it.
        """
        early = [chunk for chunk in promotions if chunk.early is not None]
        slices = deque(_sliced([chunk for chunk in early if chunk.whole], self.slice_nbytes))
        slices += _sliced([chunk for chunk in early if not chunk.whole], EARLY_NBYTES)
        slices += _sliced([chunk for chunk in promotions if chunk.early is None], self.slice_nbytes)
        if slices:
            (self._queue.appendleft if early else self._queue.append)((slices, limit_s))
            self._start()

    def overdue(self, text: str, promotions: Sequence[Promotion] = ()) -> None:
        """The tier has failed: open its breaker, send away who waits for these, start nothing that is queued."""
        log.warning("tier %s: %s; it is left alone for a while", self.name, text)
        self.breaker.failed(asyncio.get_running_loop().time())
        queue, self._queue = self._queue, deque()
        for promotion in promotions:
            promotion.give_up()
        for promotion in (chunk for slices, _ in queue for piece in slices for chunk in piece):
            self.promotions.settle(promotion, None)

    async def _contains(self, keys: Sequence[bytes], limit_s: float) -> list[bool]:
        timer = asyncio.get_running_loop().call_later(limit_s, self.overdue, "it does not say what it has")
        try:
            return await self.tier.contains(keys)
        except TierError as error:
            self.overdue(str(error))
            return [False] * len(keys)
        finally:
            timer.cancel()

    async def _probe(self, keys: Sequence[bytes], sizes: Sequence[int], limit_s: float) -> None:
        try:
            has = await self.tier.contains(keys)
            here = [key for key, there in zip(keys, has, strict=True) if there and self.promotions.get(key) is None]
            promotions, _ = self.promotions.reserve(here[:1], sizes, [self.number] * len(here[:1]))
            self.add(promotions, limit_s)
            for promotion in promotions:
                await asyncio.wait({promotion.outcome})
        except TierError as error:
            self.overdue(str(error))
        finally:
            self.probes -= 1

    def _start(self) -> None:
        while self._queue and self.under_way_nbytes - self.quarantined_nbytes < self.most_nbytes:
            slices, limit_s = self._queue.popleft()
            piece = slices.popleft()
            if slices:
                first = slices[0][0].early is not None
                (self._queue.appendleft if first else self._queue.append)((slices, limit_s))
            self.under_way_nbytes += _nbytes(piece)
            reading = self.tasks.start(self._read(piece, limit_s))
            reading.add_done_callback(partial(self._ended, piece))

    async def _read(self, piece: list[Promotion], limit_s: float) -> None:
        late = asyncio.get_running_loop().call_later(limit_s, self._fall_due, piece)
        sums: Sequence[bytes | None] = [None] * len(piece)
        try:
            sums = await self.tier.load([promotion.read(self.memory) for promotion in piece])
        except TierError as error:
            self.overdue(str(error), piece)
        else:
            self.breaker.succeeded()
        finally:
            late.cancel()
            self._back(piece)
        for promotion, got in zip(piece, sums, strict=True):
            self.promotions.settle(promotion, got)
        self._start()

    def _ended(self, piece: Sequence[Promotion], reading: asyncio.Task[None]) -> None:
        """After a bug, as a plugin's, its chunks come to an end too: else they would be waited for for ever."""
        if not reading.cancelled() and reading.exception() is not None:
            self.overdue(BUG, piece)
            for promotion in piece:
                if self.promotions.get(promotion.entry.key) is promotion:
                    self.promotions.settle(promotion, None)

    def _fall_due(self, piece: list[Promotion]) -> None:
        """Its limit is over and the tier has not answered."""
        self.hung += 1
        self.quarantined_nbytes += _nbytes(piece)
        for promotion in piece:
            self.promotions.late(promotion)
        self.overdue("no answer within its limit", piece)

    def _back(self, piece: list[Promotion]) -> None:
        """The tier is done with the memory of these."""
        was_late = any(map(self.promotions.is_late, piece))
        self.under_way_nbytes -= _nbytes(piece)
        self.hung -= was_late
        self.quarantined_nbytes -= _nbytes(piece) if was_late else 0


def _nbytes(piece: Sequence[Promotion]) -> int:
    return sum(promotion.entry.nbytes for promotion in piece)


def _sliced(promotions: Sequence[Promotion], most_nbytes: int) -> list[list[Promotion]]:
    """The chunks in their order, in slices of at most `most_nbytes`; one that is larger is alone."""
    slices: list[list[Promotion]] = []
    room = 0
    for promotion in promotions:
        if not slices or promotion.entry.nbytes > room:
            slices.append([])
            room = most_nbytes
        slices[-1].append(promotion)
        room -= promotion.entry.nbytes
    return slices
