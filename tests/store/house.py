"""A store over two tiers in a loop with its own time, and chunks whose bytes tell their number."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kvkeep.core.allocator import FreeList
from kvkeep.core.index import Index
from kvkeep.core.policies.registry import policy_by_name
from kvkeep.memory.progress import TABLE_NBYTES, Progress, ProgressTable, region_nbytes
from kvkeep.store.below.fetches import FetchLimits, Found
from kvkeep.store.below.tiers import TierWalk
from kvkeep.store.openings import Opening
from kvkeep.store.sessions import Session
from kvkeep.store.store import Store
from kvkeep.testing.doubles.gate_tier import GateTier, ManualLoop

CHUNK = 8192
SIZES = (4096, 4096)
DEADLINE_S = 0.5


def digest(number: int) -> bytes:
    return number.to_bytes(4, "big") * 8


def payload(number: int) -> bytes:
    return number.to_bytes(4, "big") * (CHUNK // 4)


def sums(number: int) -> bytes:
    return number.to_bytes(4, "big") * 8


@dataclass
class House:
    """A store of `room` chunks over two tiers in a loop with its own time."""

    loop: ManualLoop
    room: int = 16
    share: float = 0.5
    fast: GateTier = field(default_factory=GateTier)
    slow: GateTier = field(default_factory=GateTier)
    tiers: int = 2
    reads: int = 1  # that a tier does at once

    def __post_init__(self) -> None:
        self.memory = np.zeros(region_nbytes(self.room * CHUNK), dtype=np.uint8)
        self.table = ProgressTable(self.memory, self.room * CHUNK)
        self.store = Store(Index(FreeList(self.room * CHUNK), policy_by_name("lru")), self.room * CHUNK, self.share)
        self.walk = TierWalk(self.store, self.memory, self.table)
        for name, tier in [("fast", self.fast), ("slow", self.slow)][: self.tiers]:
            self.walk.add(name, tier, max_reads=self.reads)
        self.session = self.join()

    def join(self, name: str = "n") -> Session:
        return self.store.open(Opening("test", name.encode() * 16, "", CHUNK, holders=(), verify_every=0, sizes=SIZES))

    def on(self, tier: GateTier, *numbers: int) -> None:
        for number in numbers:
            tier.keep(self.session.namespace + digest(number), payload(number), sums(number))

    def ask(
        self,
        *numbers: int,
        session: Session | None = None,
        deadline_s: float = DEADLINE_S,
        limit_s: float = 0.0,
        early: bool = False,
    ) -> list[Found]:
        """The answers of a fetch: one as soon as it is answered."""
        found: list[Found] = []

        async def fetch(asking: Session) -> None:
            limits = FetchLimits(deadline_s, limit_s, early)
            found.append(await self.walk.fetches.fetch(asking, [digest(n) for n in numbers], limits))

        async def go() -> None:
            asking = session or self.session
            self.walk.tasks.start(fetch(asking), owner=asking)

        self.loop.run_until_complete(go())
        self.loop.turn()
        return found

    def holds(self, found: Found, *numbers: int) -> bool:
        """Whether the pool has exactly the bytes of these chunks where the answer says."""
        offsets = found.fetched.offsets
        return len(offsets) == len(numbers) and all(
            self.memory[offset : offset + CHUNK].tobytes() == payload(number)
            for offset, number in zip(offsets, numbers, strict=True)
        )

    def progress_of(self, found: Found) -> dict[int, Progress]:
        """The words of an early answer, by place."""
        return {place: Progress(self.memory[at : at + 4].view(np.uint32)) for place, at in found.progress.items()}

    def put(self, *numbers: int, session: Session | None = None) -> list[int]:
        """Stores chunks in the pool as an engine does; where they are."""
        session = session or self.session
        got = self.store.reserve(session, [digest(n) for n in numbers])
        for number, offset in zip(numbers, got.offsets, strict=True):
            assert isinstance(offset, int), offset
            self.memory[offset : offset + CHUNK] = np.frombuffer(payload(number), dtype=np.uint8)
        places = range(len(numbers))
        entries = self.store.written(session, got.lease, places)
        assert all(self.store.commit(session, got.lease, places, [sums(n) for n in numbers]))

        async def go() -> None:
            self.walk.committed(session, entries)

        self.loop.run_until_complete(go())
        self.store.release(session, got.lease)
        return [place for place in got.offsets if isinstance(place, int)]

    def settle(self) -> None:
        """Everything is given back and adds up."""
        for one in list(self.session.leases):
            self.store.release(self.session, one)
        self.loop.advance(1.0)
        figures = self.store.figures()
        assert (figures["pinned_nbytes"], figures["writing_nbytes"], figures["dead_nbytes"]) == (0, 0, 0)
        assert (self.session.promised_nbytes, self.session.pinned_nbytes) == (0, 0)
        assert self.table.free == TABLE_NBYTES // 4
        assert self.store.index.check() == ""
        assert all(line.under_way_nbytes == line.quarantined_nbytes == 0 for line in self.walk.reads)
