"""Tiers in trouble: every miss says its reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvkeep.store.store import Why
from kvkeep.testing.gate_tier import ManualLoop

from .house import House, digest


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
