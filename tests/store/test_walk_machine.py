"""Random fetches, stores, clears, trouble and time over a store with two tiers, against what must hold at every moment.

A chunk's bytes tell its number and the clear before which it was made: whatever an answer gives must be that chunk, made
after the last clear that has ended. What an early answer covers is that chunk as far as its word says, and stays so until its lease
ends, whatever becomes of the read. At the end of all trouble nothing is pinned, nothing under way, and every key can be stored again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvkeep.core.allocator import FreeList
from kvkeep.core.index import Index
from kvkeep.core.policies.registry import policy_by_name
from kvkeep.memory.progress import Progress, ProgressTable
from kvkeep.store.below.fetches import FetchLimits, Found
from kvkeep.store.below.tiers import TierWalk
from kvkeep.store.openings import Opening
from kvkeep.store.sessions import Session, WriteLease
from kvkeep.store.store import Store
from kvkeep.testing.doubles.gate_tier import GateTier, ManualLoop

CHUNK, RANGE, ROOM, KEYS, WORDS = 8192, 4096, 8, 16, 8
VERBS = st.sampled_from(["load", "range", "store", "contains"])
NUMBERS = st.lists(st.integers(0, KEYS - 1), min_size=1, max_size=6, unique=True)
TIER, SESSION = st.integers(0, 1), st.integers(0, 1)


def digest(number: int) -> bytes:
    return number.to_bytes(4, "big") * 8


def payload(number: int, epoch: int) -> np.ndarray:
    return np.frombuffer(number.to_bytes(4, "big") + epoch.to_bytes(4, "big"), dtype=np.uint8).repeat(CHUNK // 8)


@dataclass
class Promised:
    """A chunk of an early answer; `seen` are the ranges that its word has counted so far.

    `bytes` is what it may be: an answer that is given during a clear may also be from before it.
    """

    session: Session
    lease: int
    word: Progress
    offset: int
    bytes: list[np.ndarray]
    seen: int = 0


class WalkMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = ManualLoop()
        self.memory = np.zeros(ROOM * CHUNK + WORDS * 4, dtype=np.uint8)
        self.store = Store(Index(FreeList(ROOM * CHUNK), policy_by_name("lru")), ROOM * CHUNK, 0.5)
        self.table = ProgressTable(self.memory, ROOM * CHUNK)
        self.walk = TierWalk(self.store, self.memory, self.table)
        self.early: list[Promised] = []
        self.tiers = [GateTier(), GateTier()]
        for number, tier in enumerate(self.tiers):
            self.walk.add(f"tier_{number}", tier, max_reads=1 + number)
        self.epoch = 0
        self.clearing = False
        self.sessions = [self.open(), self.open()]

    def open(self) -> Session:
        return self.store.open(
            Opening("machine", b"n" * 16, "", CHUNK, holders=(), verify_every=0, sizes=(RANGE, RANGE))
        )

    def teardown(self) -> None:
        for tier in self.tiers:
            tier.broken.clear()
            for verb in ("load", "range", "store", "contains"):
                tier.open(verb)
        for session in self.sessions:
            self.walk.tasks.cancel(session)
            self.store.close(session)
        self.loop.turn()
        assert [session.promised_nbytes for session in self.sessions] == [0, 0]
        for _ in range(8):
            self.loop.advance(30.0)
        figures = self.store.figures()
        assert [figures[f"{name}_nbytes"] for name in ("pinned", "writing", "dead", "quarantined")] == [0] * 4
        assert all(line.under_way_nbytes == line.quarantined_nbytes == 0 for line in self.walk.reads)
        assert [flush.held_nbytes for flush in self.walk.flushes] == [0, 0]
        assert self.table.free == WORDS
        assert all(line.hung == line.probes == 0 for line in self.walk.reads)
        assert not self.store.late
        assert not self.store.index._spared
        assert self.store.index.check() == ""
        self.loop.close()

    def in_loop(self, action) -> None:
        async def go() -> None:
            action()

        self.loop.run_until_complete(go())

    @rule(session=SESSION, numbers=NUMBERS, wait=st.sampled_from([0.0, 0.5, 100.0]), early=st.booleans())
    def fetch(self, session: int, numbers: list[int], wait: float, early: bool) -> None:
        one = self.sessions[session]

        def answered(found: Found) -> None:
            assert len(found.fetched.offsets) <= len(numbers)
            assert sum(found.sources.values()) == len(found.fetched.offsets)
            assert early or not found.progress
            for place, (number, offset) in enumerate(zip(numbers, found.fetched.offsets, strict=False)):
                made = [payload(number, epoch) for epoch in (self.epoch - self.clearing, self.epoch)]
                if place in found.progress:
                    word = Progress(self.memory[found.progress[place] :][:4].view(np.uint32))
                    self.early.append(Promised(one, found.fetched.lease, word, offset, made))
                else:
                    assert any((self.memory[offset : offset + CHUNK] == octets).all() for octets in made), number

        async def fetch() -> None:
            digests = [digest(number) for number in numbers]
            answered(await self.walk.fetches.fetch(one, digests, FetchLimits(wait, early=early)))

        self.in_loop(lambda: self.walk.tasks.start(fetch(), owner=one))

    @rule(session=SESSION, numbers=NUMBERS, late=st.booleans())
    def put(self, session: int, numbers: list[int], late: bool) -> None:
        one = self.sessions[session]
        got = self.store.reserve(one, [digest(number) for number in numbers])
        places = [place for place, where in enumerate(got.offsets) if isinstance(where, int)]
        for place in places:
            offset = got.offsets[place]
            self.memory[offset : offset + CHUNK] = payload(numbers[place], self.epoch)
        if not late and places:
            entries = self.store.written(one, got.lease, places)
            assert all(self.store.commit(one, got.lease, places, [b"s" * 32] * len(places)))
            self.in_loop(lambda: self.walk.committed(one, entries))
            self.store.release(one, got.lease)

    @rule(session=SESSION, numbers=NUMBERS)
    def release_all(self, session: int, numbers: list[int]) -> None:
        for lease in list(self.sessions[session].leases)[: len(numbers)]:
            self.store.release(self.sessions[session], lease)

    @rule(session=SESSION)
    def commit_late(self, session: int) -> None:
        one = self.sessions[session]
        for lease, held in list(one.leases.items()):
            if isinstance(held, WriteLease):
                places = list(held.entries)
                entries = self.store.written(one, lease, places)
                done = self.store.commit(one, lease, places, [b"s" * 32] * len(places))
                readable = [entry for entry, ok in zip(entries, done, strict=True) if ok]
                self.in_loop(lambda readable=readable: self.walk.committed(one, readable))
                self.store.release(one, lease)

    @rule(tier=TIER, verb=VERBS)
    def hang(self, tier: int, verb: str) -> None:
        self.tiers[tier].shut.add(verb)

    @rule(tier=TIER, verb=VERBS)
    def go_on(self, tier: int, verb: str) -> None:
        self.in_loop(lambda: self.tiers[tier].open(verb))

    @rule(tier=TIER, verb=VERBS)
    def hang_on(self, tier: int, verb: str) -> None:
        """What hangs goes on hanging, what comes from now on does not."""
        self.tiers[tier].shut.discard(verb)

    @rule(tier=TIER, verb=VERBS)
    def break_(self, tier: int, verb: str) -> None:
        self.tiers[tier].broken.add(verb)

    @rule(tier=TIER)
    def mend(self, tier: int) -> None:
        self.tiers[tier].broken.clear()

    @rule(tier=TIER, numbers=NUMBERS)
    def keep(self, tier: int, numbers: list[int]) -> None:
        for number in numbers:
            self.tiers[tier].keep(b"n" * 16 + digest(number), payload(number, self.epoch).tobytes(), b"s" * 32)

    @rule(tier=TIER, number=st.integers(0, KEYS - 1))
    def lose(self, tier: int, number: int) -> None:
        self.tiers[tier].chunks.pop(b"n" * 16 + digest(number), None)

    @rule(seconds=st.sampled_from([0.0, 0.02, 0.5, 5.0, 70.0]))
    def pass_time(self, seconds: float) -> None:
        self.loop.advance(seconds)

    @rule()
    def clear(self) -> None:
        self.epoch += 1
        self.store.clear(self.sessions[0], everything=False)
        for tier in self.tiers:
            tier.open("clear")
        self.clearing = True
        self.loop.run_until_complete(self.walk.clear(b"n" * 16))
        self.clearing = False

    @rule(session=SESSION)
    def end_session(self, session: int) -> None:
        self.walk.tasks.cancel(self.sessions[session])
        self.store.close(self.sessions[session])
        self.sessions[session] = self.open()

    @invariant()
    def what_a_word_counts_is_there_and_stays(self) -> None:
        self.early = [one for one in self.early if one.lease in one.session.leases]
        for one in self.early:
            one.seen = max([one.seen, *(count for count in (1, 2) if one.word.has(count))])
            held = self.memory[one.offset : one.offset + one.seen * RANGE]
            assert any((held == made[: held.size]).all() for made in one.bytes)

    @invariant()
    def adds_up(self) -> None:
        assert all(0 <= line.probes <= line.max_reads for line in self.walk.reads)
        assert self.store.index.check() == ""
        for session in self.sessions:
            most = self.store.pool_nbytes * self.store.max_pinned_share
            assert 0 <= session.pinned_nbytes + session.promised_nbytes <= most


TestWalkMachine = WalkMachine.TestCase
TestWalkMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
