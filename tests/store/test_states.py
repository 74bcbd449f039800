"""Fetches that end where a state is: which state is taken, what is read for it, and what comes back in trouble."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from kvkeep.core.allocator import FreeList
from kvkeep.core.index import Index
from kvkeep.core.policies.registry import policy_by_name
from kvkeep.errors import WireError
from kvkeep.store.below.fetches import FetchLimits, Found
from kvkeep.store.below.tiers import TierWalk
from kvkeep.store.openings import Opening, states_of
from kvkeep.store.sessions import Session
from kvkeep.store.store import Store
from kvkeep.telemetry import Miss
from kvkeep.testing.doubles.gate_tier import GateTier, ManualLoop

SIZES, STATE_SIZES = (4096, 4096), (4096,)
ROOM_NBYTES = 32 * 8192
DEADLINE_S, LIMIT_S = 0.5, 2.0


def digest(number: int) -> bytes:
    return number.to_bytes(4, "big") * 8


def sums(number: int, side: Session) -> bytes:
    return number.to_bytes(4, "big") * 4 * len(side.opening.sizes)


def payload(number: int, side: Session) -> bytes:
    return (number + len(side.opening.sizes)).to_bytes(4, "big") * (sum(side.opening.sizes) // 4)


@dataclass
class House:
    """A store over one tier in a loop with its own time, and one session of a recurrent model."""

    loop: ManualLoop
    tier: GateTier = field(default_factory=GateTier)

    def __post_init__(self) -> None:
        self.memory = np.zeros(ROOM_NBYTES, dtype=np.uint8)
        self.store = Store(Index(FreeList(ROOM_NBYTES), policy_by_name("lru")), ROOM_NBYTES)
        self.walk = TierWalk(self.store, self.memory)
        self.walk.add("disk", self.tier)
        self.session = self.store.open(
            Opening("test", b"n" * 16, "", 8192, verify_every=1, sizes=SIZES, state_sizes=STATE_SIZES)
        )
        assert self.session.states is not None
        self.states = self.session.states

    def put(self, side: Session, *numbers: int) -> None:
        """Stores chunks or states in the pool only."""
        got = self.store.reserve(side, [digest(one) for one in numbers])
        for number, offset in zip(numbers, got.offsets, strict=True):
            assert isinstance(offset, int), offset
            octets = payload(number, side)
            self.memory[offset : offset + len(octets)] = np.frombuffer(octets, dtype=np.uint8)
        places = range(len(numbers))
        assert all(self.store.commit(side, got.lease, places, [sums(one, side) for one in numbers]))
        self.store.release(side, got.lease)

    def keep(self, side: Session, *numbers: int) -> None:
        """Puts chunks or states into the tier only."""
        for number in numbers:
            self.tier.keep(side.namespace + digest(number), payload(number, side), sums(number, side))

    def ask(self, *numbers: int) -> list[Found]:
        found: list[Found] = []

        async def fetch() -> None:
            digests = [digest(number) for number in numbers]
            found.append(await self.walk.fetches.fetch(self.session, digests, FetchLimits(DEADLINE_S, LIMIT_S)))

        async def go() -> None:
            self.walk.tasks.start(fetch(), owner=self.session)

        self.loop.run_until_complete(go())
        self.loop.turn()
        return found

    def read(self) -> list[bytes]:
        """The keys that the tier was asked to load."""
        return [key for verb, keys in self.tier.calls if verb == "load" for key in keys]

    def check(self, found: Found, *numbers: int) -> None:
        """It is the run of these chunks, and the state at the end of the last one."""
        assert found.state is not None
        for side, got, wanted in (
            (self.session, found.fetched, numbers),
            (self.states, found.state.fetched, numbers[-1:]),
        ):
            assert len(got.offsets) == len(wanted)
            for place, (offset, number) in enumerate(zip(got.offsets, wanted, strict=True)):
                octets = payload(number, side)
                assert self.memory[offset : offset + len(octets)].tobytes() == octets
                assert got.sums[place] == sums(number, side)
        assert sum(found.sources.values()) == len(numbers)

    def settle(self) -> None:
        """Nothing is held once every lease is released."""
        for side in self.session.sides:
            for lease in list(side.leases):
                self.store.release(side, lease)
            assert side.promised_nbytes == 0
        self.loop.advance(LIMIT_S)
        figures = self.store.figures()
        assert (figures["pinned_nbytes"], figures["writing_nbytes"], figures["dead_nbytes"]) == (0, 0, 0)
        assert self.store.index.check() == ""


@pytest.fixture
def house() -> Iterator[House]:
    loop = ManualLoop()
    house = House(loop)
    yield house
    house.settle()
    loop.close()


def test_the_run_ends_at_the_last_state(house: House) -> None:
    house.put(house.session, 1, 2, 3, 4)
    house.put(house.states, 1, 3)
    (found,) = house.ask(1, 2, 3, 4)
    house.check(found, 1, 2, 3)
    assert found.why is Miss.NO_STATE


def test_a_state_at_the_very_end_leaves_nothing_to_explain(house: House) -> None:
    house.put(house.session, 1, 2)
    house.put(house.states, 2)
    (found,) = house.ask(1, 2)
    house.check(found, 1, 2)
    assert found.why is None


def test_without_a_state_nothing_is_held_and_nothing_is_read(house: House) -> None:
    house.put(house.session, 1, 2)
    house.keep(house.session, 3)
    (found,) = house.ask(1, 2, 3)
    assert (found.state, found.fetched.lease, found.why) == (None, 0, Miss.NO_STATE)
    assert house.store.figures()["pinned_nbytes"] == 0
    assert house.read() == []


def test_where_nothing_is_kept_that_is_the_reason(house: House) -> None:
    (found,) = house.ask(1, 2)
    assert (found.fetched.lease, found.why) == (0, Miss.NOT_STORED)


def test_a_state_beyond_the_run_is_of_no_use_and_an_earlier_one_is_taken(house: House) -> None:
    house.put(house.session, 1, 2, 4)
    house.put(house.states, 1, 4)
    (found,) = house.ask(1, 2, 3, 4)
    house.check(found, 1)


def test_from_a_tier_only_what_leads_to_a_state_is_read(house: House) -> None:
    house.put(house.session, 1)
    house.keep(house.session, 2, 3, 4)
    house.keep(house.states, 3)
    (found,) = house.ask(1, 2, 3, 4)
    house.check(found, 1, 2, 3)
    assert found.sources == {"pool": 1, "disk": 2}
    assert set(house.read()) == {house.session.namespace + digest(2), house.session.namespace + digest(3)} | {
        house.states.namespace + digest(3)
    }


def test_a_state_that_does_not_come_gives_way_to_the_one_before(house: House) -> None:
    house.put(house.session, 1, 2, 3)
    house.put(house.states, 1)
    house.tier.keep(house.states.namespace + digest(3), b"short", b"")
    (found,) = house.ask(1, 2, 3)
    house.check(found, 1)
    assert found.why is Miss.TIER_FAILED


def test_where_the_only_state_does_not_come_that_is_the_reason(house: House) -> None:
    house.put(house.session, 1, 2, 3)
    house.tier.keep(house.states.namespace + digest(3), b"short", b"")
    (found,) = house.ask(1, 2, 3)
    assert (found.state, found.fetched.lease, found.why) == (None, 0, Miss.TIER_FAILED)


def test_a_tier_that_does_not_say_in_time_is_done_without(house: House) -> None:
    house.put(house.session, 1, 2)
    house.put(house.states, 1)
    house.keep(house.states, 2)
    house.tier.shut.add("contains")
    found = house.ask(1, 2)
    assert found == []
    house.loop.advance(DEADLINE_S)
    house.check(found[0], 1)
    assert found[0].why is Miss.TIER_LATE
    nothing = house.ask(3)
    house.loop.advance(DEADLINE_S)
    assert (nothing[0].state, nothing[0].why) == (None, Miss.TIER_LATE)
    house.tier.open("contains")


def test_a_tier_that_cannot_say_is_done_without(house: House) -> None:
    house.put(house.session, 1, 2)
    house.put(house.states, 1)
    house.tier.broken.add("contains")
    house.check(house.ask(1, 2)[0], 1)


@pytest.mark.parametrize("how", ["hangs", "fails"])
def test_a_tier_that_does_not_say_costs_one_deadline_in_all(house: House, how: str) -> None:
    house.keep(house.session, 1)
    house.keep(house.states, 1)
    (house.tier.shut if how == "hangs" else house.tier.broken).add("contains")
    house.ask(1)
    house.loop.advance(DEADLINE_S)
    assert house.walk.reads[0].breaker.failures == (how == "fails"), "a request that waits less says nothing"
    house.loop.advance(LIMIT_S - DEADLINE_S)
    assert house.walk.reads[0].breaker.failures == 1
    asked = len(house.tier.calls)
    (found,) = house.ask(1) if how == "fails" else [*house.ask(1), *house.ask(1)][:1]
    assert (found.state, found.why, found.took_s) == (None, Miss.TIER_LEFT_ALONE, 0.0)
    assert len(house.tier.calls) <= asked + 1, "a probe at most"
    house.tier.open("contains")


def test_a_tier_that_failed_is_tried_again_for_those_who_ask_for_states(house: House) -> None:
    house.keep(house.session, 1)
    house.keep(house.states, 1)
    house.tier.broken.add("load")
    house.ask(1)
    house.tier.broken.clear()
    house.loop.advance(1.1)
    assert house.ask(1)[0].state is None, "the probe is not waited for"
    house.check(house.ask(1)[0], 1)


@pytest.mark.parametrize("verb", ["contains", "load"])
def test_a_session_that_ends_meanwhile_is_not_answered_and_holds_nothing(house: House, verb: str) -> None:
    house.put(house.session, 1)
    house.keep(house.session, 2)
    house.keep(house.states, 2)
    house.tier.shut.add(verb)
    found = house.ask(1, 2)
    house.walk.tasks.cancel(house.session)
    house.store.close(house.session)
    house.tier.open(verb)
    house.loop.advance(LIMIT_S)
    assert found == []
    assert house.store.figures()["pinned_nbytes"] == 0


def test_a_chunk_that_is_discarded_while_its_state_is_read_is_given_to_nobody(house: House) -> None:
    house.put(house.session, 1, 2, 3)
    house.put(house.states, 1)
    house.keep(house.states, 3)
    house.tier.shut.add("load")
    found = house.ask(1, 2, 3)
    assert house.store.discard(house.session, [digest(2)]) == 1
    house.tier.open("load")
    house.loop.turn()
    house.check(found[0], 1)


def test_a_clear_and_a_discard_take_chunks_and_states(house: House) -> None:
    house.put(house.session, 1, 2)
    house.put(house.states, 1, 2)
    assert house.store.discard(house.session, [digest(2)]) == 2
    house.check(house.ask(1, 2)[0], 1)
    for side in house.session.sides:
        for lease in list(side.leases):
            house.store.release(side, lease)
    assert house.store.clear(house.session, everything=False) == 2
    assert house.store.figures()["chunks"] == 0
    assert house.store.namespaces_of(house.session) == [b"n" * 16, states_of(b"n" * 16)]


def test_a_new_name_is_one_for_states_too(house: House) -> None:
    house.put(house.session, 1)
    house.put(house.states, 1)
    house.store.rename(house.session, b"m" * 16)
    (found,) = house.ask(1)
    assert found.state is None
    assert house.states.namespace == states_of(b"m" * 16) != states_of(b"n" * 16)


def test_sizes_of_states_that_are_not_padded_are_refused(house: House) -> None:
    with pytest.raises(WireError, match="state"):
        house.store.open(
            Opening("test", b"n" * 16, "", 8192, holders=(), verify_every=0, sizes=SIZES, state_sizes=(100,))
        )
