"""Write-through: chunks that became readable in the pool are written to a tier in the background; reads go first.

One Flush a tier, so that a slow tier holds up no other. It pins only what it is writing, and drops and counts what it
cannot keep up with. Knows nothing about sockets, sessions or how a tier keeps its chunks.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvkeep.core.index import Index, IndexEntry
from kvkeep.errors import TierError
from kvkeep.store.below.breaker import Breaker, Gate
from kvkeep.store.below.due import Due, DueChunks
from kvkeep.store.below.reads import TierReads
from kvkeep.tiers.tier import Stored, Write

log = logging.getLogger("kvkeep.store")

COUNTERS = ("stored", "present", "refused", "dropped", "gone")
SAY_S = 60.0  # between two lines about chunks that went too early
_TURN = 64  # chunks of the backlog that come due at once


@dataclass(frozen=True)
class FlushOptions:
    """Bounds: bytes of one batch and of all batches being written, chunks that may wait, and how long (seconds).

    The pool evicts the first `spared_nbytes` of the chunks that wait last.
    """

    batch_nbytes: int
    held_nbytes: int
    spared_nbytes: int = 0
    max_waiting: int = 65_536
    max_age_s: float = 60.0
    poll_s: float = 0.01


@dataclass(eq=False)
class Flush:
    """Writes to the tier of `reads` the chunks that `submit` names; it has a breaker of its own."""

    index: Index
    reads: TierReads
    options: FlushOptions
    figures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))
    breaker: Breaker = field(default_factory=Breaker)
    held_nbytes: int = 0
    _writing: int = 0
    _unsaid: int = 0
    _say_at_s: float = 0.0
    _backlog: deque[tuple[bytes, Sequence[int]]] = field(default_factory=deque)
    _pump: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self._due = DueChunks(self.index, self.options.spared_nbytes)

    @property
    def waiting(self) -> int:
        """How many chunks are not written yet, those being written included."""
        return len(self._due) + len(self._backlog) + self._writing

    def submit(self, entry: IndexEntry, sizes: Sequence[int]) -> None:
        """Queue a readable chunk; it is written if the pool still has it by then."""
        if len(self._due) >= self.options.max_waiting:
            self.figures["dropped"] += 1  # the newest: a prefix is worth more from its beginning
            return
        self._due.add(Due(entry.key, sizes, asyncio.get_running_loop().time()))
        self._start()

    def catch_up(self, chunks: Iterable[tuple[bytes, Sequence[int]]]) -> None:
        """Queue what the pool had before the tier came (keys, sizes of ranges), a few at a time between new chunks."""
        self._backlog.extend(chunks)
        if self._backlog:
            self._start()

    async def drain(self, limit_s: float) -> int:
        """Wait until all is written, at most `limit_s`; return how many chunks were not."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + limit_s
        while self.waiting and loop.time() < end_s:
            await asyncio.sleep(self.options.poll_s)
        if self._pump is not None:
            self._pump.cancel()
        return self.waiting

    def _start(self) -> None:
        if self._pump is None:
            self._pump = self.reads.tasks.start(self._run())

    async def _run(self) -> None:
        """Start batches while there is something to write, then end."""
        now_s = asyncio.get_running_loop().time
        while self._due or self._backlog:
            self._forget_old(now_s())
            if not self._due:
                for key, sizes in [self._backlog.popleft() for _ in range(min(_TURN, len(self._backlog)))]:
                    self._due.add(Due(key, sizes, now_s()))
            gate = self.breaker.gate(now_s())
            full = self._writing and self.held_nbytes + self.options.batch_nbytes > self.options.held_nbytes
            if gate is Gate.OPEN or self.reads.gate() is Gate.OPEN:
                self.figures["dropped"] += len(self._due) + len(self._backlog)
                self._due.clear()
                self._backlog.clear()
            elif self.reads.busy or full or (gate is Gate.HALF_OPEN and self._writing):
                await asyncio.sleep(self.options.poll_s)
            else:
                self._start_batch()
                await asyncio.sleep(0)  # lookups go on between two batches
        self._pump = None

    def _forget_old(self, now_s: float) -> None:
        while self._due and now_s - self._due.since_s > self.options.max_age_s:
            self._due.pop()
            self.figures["dropped"] += 1

    def _start_batch(self) -> None:
        entries: list[IndexEntry] = []
        writes: list[Write] = []
        nbytes = 0
        while self._due and (not writes or nbytes < self.options.batch_nbytes):
            due = self._due.pop()
            entry = self.index.hold(due.key)
            if entry is None or entry.nbytes != sum(due.sizes):
                self._lost()
                self.index.unpin([entry] if entry is not None else [])
                continue
            assert entry.sums is not None
            payload = self.reads.memory[entry.offset : entry.offset + entry.nbytes]
            entries.append(entry)
            writes.append(Write(due.key, due.sizes, payload, entry.sums))
            nbytes += entry.nbytes
        if not writes:
            return
        self.held_nbytes += nbytes
        self._writing += len(writes)
        self.reads.tasks.start(self._write(entries, writes, nbytes))

    def _lost(self) -> None:
        """Count a chunk that was evicted or cleared before it was written, and log that now and then."""
        self.figures["gone"] += 1
        self._unsaid += 1
        if (now_s := asyncio.get_running_loop().time()) >= self._say_at_s:
            text = "tier %s: %d chunks were evicted from the pool (or cleared) before they were written: %s"
            cure = "a larger pool_size keeps them until the tier has caught up"
            log.warning(text, self.reads.name, self._unsaid, cure)
            self._unsaid, self._say_at_s = 0, now_s + SAY_S

    async def _write(self, entries: list[IndexEntry], writes: list[Write], nbytes: int) -> None:
        try:
            stored = await self.reads.tier.store(writes)
        except TierError as error:
            stored = [Stored.REFUSED] * len(writes)
            self.breaker.failed(asyncio.get_running_loop().time())
            log.warning("tier %s takes nothing for a while: %s", self.reads.name, error)
        else:
            self.breaker.succeeded()
        finally:
            self.held_nbytes -= nbytes
            self._writing -= len(writes)
            self.index.unpin(entries)
        for outcome in stored:
            self.figures[outcome.value] += 1
