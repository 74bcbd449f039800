"""The loads of one tier: a bounded number of bytes under way, the rest waiting, request by request in turn.

A load is never cancelled: its memory stays with it until the tier is done with it, however late. Knows nothing about
the index, requests or who waits; it tells what became of each chunk.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvkeep.core.index import IndexEntry
from kvkeep.errors import TierError
from kvkeep.store.below.breaker import Breaker, Gate
from kvkeep.store.lent import Early
from kvkeep.tiers.tier import Bytes, Read, Tier

log = logging.getLogger("kvkeep.store")

SLICE_NBYTES = 8 << 20  # of one request, so that another's turn comes soon
EARLY_NBYTES = 256 << 20  # where a step waits for the first range of every chunk
UNDER_WAY_NBYTES = 64 << 20


@dataclass(eq=False)
class Coming:
    """One chunk on its way into the pool: its entry in the making, its ranges, the number of its tier, who waits.

    `early`: it is lent already. `whole`: not by its ranges, since whoever it is lent to waits for all of it.
    `gone`: the tier has no record of it any more.
    """

    entry: IndexEntry
    sizes: Sequence[int]
    tier: int
    waiters: list[Callable[[IndexEntry | None], None]] = field(default_factory=list)
    early: Early | None = None
    whole: bool = False
    gone: bool = False

    def read(self, memory: Bytes) -> Read:
        """What the tier is asked for."""
        into = memory[self.entry.offset : self.entry.offset + self.entry.nbytes]
        arrived = self.early.word.advance if self.early is not None and not self.whole else None
        return Read(self.entry.key, self.sizes, into, arrived, self._vanished)

    def tell(self, entry: IndexEntry | None) -> None:
        """Tells everyone who waits, once: the readable entry, or None if it does not come (in time)."""
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter(entry)

    def _vanished(self) -> None:
        self.gone = True


@dataclass(eq=False)
class TierReads:
    """`done(coming, sums)` is called once a chunk when nothing touches its memory any more; sums None: it did not come.

    Before that `late(coming)` is, where it takes longer than its limit. `reads` are how many the tier does at once;
    `hung` are slices under way although they are overdue, of `quarantined_nbytes`; `probes` those that are neither back
    nor overdue. A tier all of whose reads may hang gets no more of them until one is back.
    """

    name: str
    tier: Tier
    memory: Bytes
    done: Callable[[Coming, bytes | None], None]
    late: Callable[[Coming], None] = lambda coming: None
    reads: int = 1
    breaker: Breaker = field(default_factory=Breaker)
    slice_nbytes: int = SLICE_NBYTES
    most_nbytes: int = UNDER_WAY_NBYTES
    under_way_nbytes: int = 0
    quarantined_nbytes: int = 0
    hung: int = 0
    probes: int = 0
    _turns: deque[tuple[deque[list[Coming]], float]] = field(default_factory=deque)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def busy(self) -> bool:
        """Whether anything is under way or waiting; what hangs is neither."""
        return bool(self.under_way_nbytes > self.quarantined_nbytes or self._turns)

    @property
    def may_probe(self) -> bool:
        """Whether a read more may be sent after those that hang."""
        return self.hung + self.probes < self.reads

    def gate(self) -> Gate:
        """What the tier may be asked now."""
        return self.breaker.gate(asyncio.get_running_loop().time())

    def add(self, chunks: Sequence[Coming], limit_s: float) -> None:
        """Loads chunks of one request in order; one that takes longer than `limit_s` opens the breaker.

        What is lent already comes first, by its ranges where it can: a step waits for it.
        """
        early = [chunk for chunk in chunks if chunk.early is not None]
        slices = deque(_sliced([chunk for chunk in early if chunk.whole], self.slice_nbytes))
        slices += _sliced([chunk for chunk in early if not chunk.whole], EARLY_NBYTES)
        slices += _sliced([chunk for chunk in chunks if chunk.early is None], self.slice_nbytes)
        if slices:
            (self._turns.appendleft if early else self._turns.append)((slices, limit_s))
            self._start()

    def overdue(self, chunks: Sequence[Coming], text: str) -> None:
        """The tier is too late: its breaker opens, nobody waits for it any more and nothing new is started."""
        log.warning("tier %s: %s; it is left alone for a while", self.name, text)
        self.breaker.failed(asyncio.get_running_loop().time())
        turns, self._turns = self._turns, deque()
        for chunk in chunks:
            chunk.tell(None)
        for chunk in (one for slices, _ in turns for piece in slices for one in piece):
            self.done(chunk, None)

    def _start(self) -> None:
        while self._turns and self.under_way_nbytes - self.quarantined_nbytes < self.most_nbytes:
            slices, limit_s = self._turns.popleft()
            piece = slices.popleft()
            if slices:
                first = slices[0][0].early is not None
                (self._turns.appendleft if first else self._turns.append)((slices, limit_s))
            wanted = [chunk for chunk in piece if chunk.waiters]
            for chunk in piece:
                if not chunk.waiters:
                    self.done(chunk, None)  # whoever waited has given up before it began
            if wanted:
                task = asyncio.get_running_loop().create_task(self._load(wanted, limit_s))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                self.under_way_nbytes += sum(chunk.entry.nbytes for chunk in wanted)

    async def _load(self, chunks: list[Coming], limit_s: float) -> None:
        slice_ = Slice(self, chunks)
        timer = asyncio.get_running_loop().call_later(limit_s, slice_.fall_due)
        reads = [one.read(self.memory) for one in chunks]
        sums: Sequence[bytes | None] = [None] * len(chunks)
        try:
            sums = await self.tier.load(reads)
        except TierError as error:
            self.overdue(chunks, str(error))
        else:
            self.breaker.succeeded()
        finally:
            timer.cancel()
            slice_.end()
        for chunk, got in zip(chunks, sums, strict=True):
            self.done(chunk, got)
        self._start()


def _sliced(chunks: Sequence[Coming], most_nbytes: int) -> list[list[Coming]]:
    """The chunks in their order, in slices of at most `most_nbytes`; one that is larger is alone."""
    slices: list[list[Coming]] = []
    room = 0
    for chunk in chunks:
        if not slices or chunk.entry.nbytes > room:
            slices.append([])
            room = most_nbytes
        slices[-1].append(chunk)
        room -= chunk.entry.nbytes
    return slices


@dataclass
class Slice:
    """Chunks that are read together, and whether they have outlived their limit."""

    loads: TierReads
    chunks: list[Coming]
    due: bool = False

    @property
    def nbytes(self) -> int:
        """Of the pool, until they are back."""
        return sum(chunk.entry.nbytes for chunk in self.chunks)

    def fall_due(self) -> None:
        """The limit is over and the tier has not answered."""
        self.due = True
        self.loads.hung += 1
        self.loads.quarantined_nbytes += self.nbytes
        for chunk in self.chunks:
            self.loads.late(chunk)
        self.loads.overdue(self.chunks, "no answer within its limit")

    def end(self) -> None:
        """The tier is done with their memory."""
        self.loads.under_way_nbytes -= self.nbytes
        self.loads.hung -= self.due
        self.loads.quarantined_nbytes -= self.nbytes if self.due else 0
