"""Tiers in trouble: a read that hangs costs one deadline in all and no other reads, and every miss says its reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvkeep.store.store import Why
from kvkeep.testing.gate_tier import ManualLoop

from .house import CHUNK, DEADLINE_S, House, digest


@pytest.fixture
def loop() -> Iterator[ManualLoop]:
    loop = ManualLoop()
    yield loop
    loop.close()


@pytest.fixture
def house(loop: ManualLoop) -> Iterator[House]:
    house = House(loop)
    yield house
    house.settle()


# ---- why it was a miss -----------------------------------------------------------------------------------------


def test_before_a_tier_is_open_a_miss_says_so(loop: ManualLoop) -> None:
    house = House(loop, tiers=0)
    house.put(1)
    house.on(house.fast, 2)
    house.walk.promotions.opening = True
    (found,) = house.ask(1, 2, 3)
    assert (house.holds(found, 1), found.why) == (True, Why.OPENING)
    assert house.ask(1)[0].why is None
    assert house.ask(2, deadline_s=0.0)[0].why is Why.ABSENT, "whoever does not wait asks no tier"
    loop.run_until_complete(house.walk.admit("fast", house.fast))
    house.walk.promotions.opening = False
    (found,) = house.ask(1, 2, 3)
    assert (house.holds(found, 1, 2), found.why) == (True, Why.ABSENT)
    house.settle()


def test_where_one_tier_is_open_and_another_is_not_yet_a_miss_says_so(loop: ManualLoop) -> None:
    house = House(loop, tiers=1)
    house.walk.promotions.opening = True
    house.on(house.fast, 1)
    (found,) = house.ask(1, 2)
    assert (house.holds(found, 1), found.why) == (True, Why.OPENING)
    house.settle()


def test_a_miss_while_a_tier_is_left_alone_says_so(house: House) -> None:
    house.on(house.fast, 1, 2)
    house.fast.broken.add("load")
    assert house.ask(1)[0].why is Why.NOT_LOADED
    assert house.ask(2)[0].why is Why.LEFT_ALONE
    house.fast.broken.clear()
    house.loop.advance(1.1)
    house.ask(1)
    assert house.ask(2, 3)[0].why is Why.ABSENT


def test_what_was_evicted_between_the_question_and_the_read_is_no_failure(house: House) -> None:
    house.on(house.fast, 1, 2)
    house.fast.shut.add("load")
    found = house.ask(1, 2)
    del house.fast.chunks[house.session.namespace + digest(2)]
    house.fast.open("load")
    house.loop.turn()
    assert (house.holds(found[0], 1), found[0].why) == (True, Why.EVICTED)
    assert house.walk.loads[0].breaker.failures == 0


# ---- reads that hang -------------------------------------------------------------------------------------------


def test_a_prefix_whose_read_hangs_costs_its_first_request_one_deadline_and_later_ones_nothing(house: House) -> None:
    house.on(house.fast, 1, 2)
    house.fast.shut.add("load")
    first = house.ask(1, 2)
    house.loop.advance(DEADLINE_S)
    assert first[0].took_s == DEADLINE_S
    for _ in range(8):
        (found,) = house.ask(1, 2)
        assert (found.fetched.offsets, found.took_s) == ([], 0.0)
        house.loop.advance(70.0)
    house.fast.open("load")
    house.loop.turn()
    assert house.holds(house.ask(1, 2)[0], 1, 2), "what came late is there for others"


def test_a_chunk_whose_read_hangs_is_not_waited_for_when_its_tier_works_again(loop: ManualLoop) -> None:
    house = House(loop, tiers=1, reads=4)
    house.on(house.fast, 1, 2, 3)
    house.fast.shut.add("load")
    house.ask(1)
    house.loop.advance(DEADLINE_S)
    house.fast.shut.clear()  # the next ones go through, the first one hangs on
    house.loop.advance(1.1)
    house.ask(2)  # the probe
    (found,) = house.ask(2, 3)
    assert house.holds(found, 2, 3), "one read that hangs does not shut the tier"
    assert house.walk.loads[0].quarantined_nbytes == CHUNK
    (found,) = house.ask(1)
    assert (found.fetched.offsets, found.why, found.took_s) == ([], Why.NOT_LOADED, 0.0)
    house.fast.open("load")
    house.settle()


def test_what_is_computed_while_its_read_hangs_is_kept(loop: ManualLoop) -> None:
    house = House(loop, tiers=1, reads=4)
    house.on(house.fast, 1)
    house.fast.shut.add("load")
    house.ask(1)
    house.loop.advance(DEADLINE_S)
    (offset,) = house.put(1)
    before = house.memory[offset : offset + CHUNK].copy()
    assert house.holds(house.ask(1)[0], 1), "the pool has it, whatever the tier does"
    house.fast.open("load")
    house.loop.turn()
    assert (house.memory[offset : offset + CHUNK] == before).all()
    assert house.holds(house.ask(1)[0], 1)
    house.settle()


def test_only_as_many_reads_as_a_tier_can_do_at_once_hang(loop: ManualLoop) -> None:
    house = House(loop, tiers=1, reads=3, room=32)
    house.on(house.fast, *range(20))
    house.fast.shut.add("load")
    for number in range(20):
        house.ask(number)
        house.loop.advance(70.0)
    assert len([verb for verb, _ in house.fast.calls if verb == "load"]) == 3
    assert house.walk.loads[0].quarantined_nbytes == 3 * CHUNK
    house.fast.open("load")
    house.settle()


def test_a_probe_takes_a_chunk_that_does_not_hang(loop: ManualLoop) -> None:
    house = House(loop, tiers=1, reads=2)
    house.on(house.fast, 1, 2)
    house.fast.shut.add("load")
    house.ask(1)
    house.loop.advance(DEADLINE_S)
    house.fast.shut.clear()
    house.loop.advance(1.1)
    house.ask(1, 2)
    assert house.store.index.contains([house.session.namespace + digest(2)]) == [True]
    house.fast.open("load")
    house.settle()


def test_a_tier_with_a_read_that_hangs_is_written_to(loop: ManualLoop) -> None:
    house = House(loop, tiers=1, reads=2)
    house.on(house.fast, 1, 2)
    house.fast.shut.add("load")
    house.ask(1)
    house.loop.advance(DEADLINE_S)
    house.fast.shut.clear()
    house.loop.advance(1.1)
    house.ask(2)
    house.put(5)
    house.loop.turn()
    assert house.session.namespace + digest(5) in house.fast.chunks
    house.fast.open("load")
    house.settle()


def test_what_hangs_takes_nothing_from_what_may_be_under_way(loop: ManualLoop) -> None:
    house = House(loop, tiers=1, reads=4)
    (line,) = house.walk.loads
    line.most_nbytes = CHUNK
    house.on(house.fast, 1, 2, 3)
    house.fast.shut.add("load")
    house.ask(1)
    house.loop.advance(DEADLINE_S)
    house.fast.shut.clear()
    house.loop.advance(1.1)
    house.ask(2)
    assert house.holds(house.ask(2, 3)[0], 2, 3)
    house.fast.open("load")
    house.settle()
