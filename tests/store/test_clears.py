"""Whether a clear is for good: every tier did it, and none is missing that may hold what was cleared."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from kvkeep.errors import TierUnavailable
from kvkeep.store.below.tiers import VERB_LIMIT_S
from kvkeep.testing.doubles.gate_tier import ManualLoop
from kvkeep.tiers.tier import OPENING

from .house import DEADLINE_S, House, digest


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


def clearing(house: House) -> asyncio.Task[str]:
    task = house.loop.create_task(house.walk.clear(house.session.namespace))
    house.loop.turn()
    return task


def test_a_clear_that_every_tier_did_is_for_good(house: House) -> None:
    assert clearing(house).result() == ""


def test_a_clear_that_a_tier_did_not_do_names_it_and_reaches_the_others(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.on(house.slow, 1)

    async def full(namespace: bytes | None) -> None:
        raise TierUnavailable("no room for the epochs")

    monkeypatch.setattr(house.fast, "clear", full)
    why = house.loop.run_until_complete(house.walk.clear(house.session.namespace))
    assert why == "tier fast: no room for the epochs"
    assert house.slow.chunks == {}


def test_a_clear_that_ends_in_a_bug_of_a_tier_is_answered_and_reaches_the_others(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.on(house.slow, 1)

    async def bug(namespace: bytes | None) -> None:
        raise LookupError("a plugin's own exception")

    monkeypatch.setattr(house.fast, "clear", bug)
    why = house.loop.run_until_complete(house.walk.clear(house.session.namespace))
    assert why.startswith("tier fast: a bug: LookupError")
    assert house.slow.chunks == {}
    with pytest.raises(LookupError):
        house.loop.turn()  # as the task that it was


def test_a_tier_that_does_not_answer_is_not_for_good(house: House) -> None:
    house.fast.shut.add("clear")
    task = clearing(house)
    assert not task.done()
    house.loop.advance(VERB_LIMIT_S)
    assert task.result() == f"tier fast: no answer within {VERB_LIMIT_S:.0f} s"
    house.fast.open("clear")
    house.loop.turn()


def test_a_tier_that_is_not_there_may_hold_what_was_cleared(house: House) -> None:
    house.walk.left_out("disk", "it belongs to another process")
    assert clearing(house).result() == "tier disk: it belongs to another process"


def test_a_tier_that_is_being_opened_is_waited_for(loop: ManualLoop) -> None:
    house = House(loop, tiers=1)
    house.on(house.slow, 1)
    house.walk.left_out("slow", OPENING)
    task = clearing(house)
    assert not task.done()
    loop.run_until_complete(house.walk.admit("slow", house.slow))
    loop.turn()
    assert task.result() == ""
    assert house.slow.chunks == {}
    assert house.walk.out == {}
    house.settle()


def test_a_tier_that_is_being_opened_is_not_waited_for_for_ever(loop: ManualLoop) -> None:
    house = House(loop, tiers=1)
    house.walk.left_out("slow", OPENING)
    task = clearing(house)
    loop.advance(VERB_LIMIT_S)
    assert task.result() == f"tier slow: {OPENING}"
    house.walk.left_out("slow", "it is broken")
    loop.turn()
    house.settle()


def test_a_tier_that_comes_late_and_cannot_forget_is_named(loop: ManualLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(loop, tiers=1)

    async def full(namespace: bytes | None) -> None:
        raise TierUnavailable("no room")

    monkeypatch.setattr(house.slow, "clear", full)
    loop.run_until_complete(house.walk.clear(None))
    loop.run_until_complete(house.walk.admit("slow", house.slow))
    assert house.walk.out == {"slow": "it may hold what was cleared: no room"}
    house.settle()


def test_what_a_tier_still_gave_while_it_was_cleared_is_not_found_afterwards(house: House) -> None:
    house.on(house.slow, 1)
    house.fast.shut.add("clear")
    task = clearing(house)
    assert house.holds(house.ask(1)[0], 1), "the slow tier has not been asked to forget it yet"
    house.fast.open("clear")
    house.loop.turn()
    assert task.result() == ""
    assert house.ask(1)[0].fetched.offsets == []
    assert house.store.index.check() == ""


def test_what_a_tier_still_gave_while_it_was_discarded_is_not_found_afterwards(house: House) -> None:
    house.on(house.slow, 1)
    house.fast.shut.add("delete")
    keys = house.store.keys(house.session, [digest(1)])
    house.loop.create_task(house.walk.discard(keys))
    house.loop.turn()
    assert house.holds(house.ask(1)[0], 1), "the slow tier has not been asked to forget it yet"
    house.fast.open("delete")
    house.loop.turn()
    assert house.ask(1)[0].fetched.offsets == []


def test_what_is_discarded_while_a_tier_is_asked_is_given_to_nobody_also_where_it_does_not_answer(house: House) -> None:
    house.put(1, 2)
    house.fast.shut.add("contains")
    found = house.ask(1, 2, 3)
    assert house.store.discard(house.session, [digest(2)]) == 1
    house.loop.advance(DEADLINE_S)
    assert house.holds(found[0], 1)
    house.fast.open("contains")
