"""Write-through: what became readable in the pool is written to a tier in the background, after what is being read.

One Flush a tier, so that a slow one holds up no other. It holds only what it is writing, and drops what it cannot keep
up with, counted. Knows nothing about sockets, sessions or how a tier keeps its chunks.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvkeep.core.index import Entry, Index
from kvkeep.errors import TierError
from kvkeep.store.breaker import Breaker, Gate
from kvkeep.store.loads import Loads
from kvkeep.tiers.tier import Stored, Write

log = logging.getLogger("kvkeep.store")

COUNTERS = ("stored", "present", "refused", "dropped", "gone")
_TURN = 64  # chunks of the backlog that come due at once


@dataclass(frozen=True)
class FlushOptions:
    """Bounds: a batch and all batches together (bytes held), what may wait (chunks) and for how long (seconds)."""

    batch_nbytes: int
    held_nbytes: int
    max_waiting: int = 65_536
    max_age_s: float = 60.0
    poll_s: float = 0.01


class Due(NamedTuple):
    """A chunk that waits to be written: its ranges, since when."""

    sizes: Sequence[int]
    since_s: float


@dataclass(eq=False)
class Flush:
    """Writes to the tier of `loads` what `submit` names; its reads go first, and their trouble is not its own."""

    index: Index
    loads: Loads
    options: FlushOptions
    figures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))
    breaker: Breaker = field(default_factory=Breaker)
    held_nbytes: int = 0
    _writing: int = 0
    _due: OrderedDict[bytes, Due] = field(default_factory=OrderedDict)
    _backlog: deque[tuple[bytes, Sequence[int]]] = field(default_factory=deque)
    _batches: set[asyncio.Task[None]] = field(default_factory=set)
    _pump: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Chunks that are not written yet, those being written included."""
        return len(self._due) + len(self._backlog) + self._writing

    def submit(self, entry: Entry, sizes: Sequence[int]) -> None:
        """A chunk is readable in the pool; it is written when its turn comes, if it is still there."""
        if len(self._due) >= self.options.max_waiting:
            self.figures["dropped"] += 1  # the newest: a prefix is worth more from its beginning
            return
        self._due[entry.key] = Due(sizes, asyncio.get_running_loop().time())
        self._start()

    def catch_up(self, chunks: Iterable[tuple[bytes, Sequence[int]]]) -> None:
        """What the pool had before the tier came, keys and ranges: written in turns, what is new between them."""
        self._backlog.extend(chunks)
        if self._backlog:
            self._start()

    async def drain(self, limit_s: float) -> int:
        """Waits until all is written, at most `limit_s`; how many chunks were not."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + limit_s
        while self.waiting and loop.time() < end_s:
            await asyncio.sleep(self.options.poll_s)
        if self._pump is not None:
            self._pump.cancel()
        return self.waiting

    def _start(self) -> None:
        if self._pump is None:
            self._pump = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        """Starts batches while there is something to write, then ends."""
        now_s = asyncio.get_running_loop().time
        while self._due or self._backlog:
            self._forget_old(now_s())
            if not self._due:
                turn = [self._backlog.popleft() for _ in range(min(_TURN, len(self._backlog)))]
                self._due.update((key, Due(sizes, now_s())) for key, sizes in turn)
            gate = self.breaker.gate(now_s())
            full = self._batches and self.held_nbytes + self.options.batch_nbytes > self.options.held_nbytes
            if gate is Gate.OPEN or self.loads.gate() is Gate.OPEN:
                self.figures["dropped"] += len(self._due) + len(self._backlog)
                self._due.clear()
                self._backlog.clear()
            elif self.loads.busy or full or (gate is Gate.HALF_OPEN and self._batches):
                await asyncio.sleep(self.options.poll_s)
            else:
                self._start_batch()
                await asyncio.sleep(0)  # lookups go on between two batches
        self._pump = None

    def _forget_old(self, now_s: float) -> None:
        while self._due and now_s - next(iter(self._due.values())).since_s > self.options.max_age_s:
            self._due.popitem(last=False)
            self.figures["dropped"] += 1

    def _start_batch(self) -> None:
        entries: list[Entry] = []
        writes: list[Write] = []
        nbytes = 0
        while self._due and (not writes or nbytes < self.options.batch_nbytes):
            key, due = self._due.popitem(last=False)
            entry = self.index.hold(key)
            if entry is None or entry.nbytes != sum(due.sizes):
                self.figures["gone"] += 1  # evicted, or cleared
                self.index.unpin([entry] if entry is not None else [])
                continue
            assert entry.sums is not None
            payload = self.loads.memory[entry.offset : entry.offset + entry.nbytes]
            entries.append(entry)
            writes.append(Write(key, due.sizes, payload, entry.sums))
            nbytes += entry.nbytes
        if not writes:
            return
        self.held_nbytes += nbytes
        self._writing += len(writes)
        task = asyncio.get_running_loop().create_task(self._write(entries, writes, nbytes))
        self._batches.add(task)
        task.add_done_callback(self._batches.discard)

    async def _write(self, entries: list[Entry], writes: list[Write], nbytes: int) -> None:
        try:
            stored = await self.loads.tier.store(writes)
        except TierError as error:
            stored = [Stored.REFUSED] * len(writes)
            self.breaker.failed(asyncio.get_running_loop().time())
            log.warning("tier %s takes nothing for a while: %s", self.loads.name, error)
        else:
            self.breaker.succeeded()
        finally:
            self.held_nbytes -= nbytes
            self._writing -= len(writes)
            self.index.unpin(entries)
        for one in stored:
            self.figures[one.value] += 1
