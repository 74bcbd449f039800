"""Tiers in trouble: a read that hangs costs one deadline in all and no other reads, and every miss says its reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from kvkeep.store.below.fetches import FetchLimits, Found
from kvkeep.telemetry import Miss
from kvkeep.testing.doubles.gate_tier import ManualLoop

from .house import CHUNK, DEADLINE_S, House, digest, payload, sums


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
    house.walk.filler.opening = True
    (found,) = house.ask(1, 2, 3)
    assert (house.holds(found, 1), found.why) == (True, Miss.TIER_OPENING)
    assert house.ask(1)[0].why is None
    assert house.ask(2, deadline_s=0.0)[0].why is Miss.NOT_STORED, "whoever does not wait asks no tier"
    loop.run_until_complete(house.walk.admit("fast", house.fast))
    house.walk.filler.opening = False
    (found,) = house.ask(1, 2, 3)
    assert (house.holds(found, 1, 2), found.why) == (True, Miss.NOT_STORED)
    house.settle()


def test_where_one_tier_is_open_and_another_is_not_yet_a_miss_says_so(loop: ManualLoop) -> None:
    house = House(loop, tiers=1)
    house.walk.filler.opening = True
    house.on(house.fast, 1)
    (found,) = house.ask(1, 2)
    assert (house.holds(found, 1), found.why) == (True, Miss.TIER_OPENING)
    house.settle()


def test_a_miss_while_a_tier_is_left_alone_says_so(house: House) -> None:
    house.on(house.fast, 1, 2)
    house.fast.broken.add("load")
    assert house.ask(1)[0].why is Miss.TIER_FAILED
    assert house.ask(2)[0].why is Miss.TIER_LEFT_ALONE
    house.fast.broken.clear()
    house.loop.advance(1.1)
    house.ask(1)
    assert house.ask(2, 3)[0].why is Miss.NOT_STORED


def test_a_tier_that_fails_while_another_is_asked_is_not_read(house: House) -> None:
    house.on(house.fast, 1, 2)
    house.on(house.slow, 3)
    house.slow.shut.add("contains")
    first = house.ask(1, 2, 3)
    house.fast.broken.add("load")
    (failed,) = house.ask(1)  # the fast one has all of it: it is read, and fails
    assert failed.why is Miss.TIER_FAILED
    house.fast.broken.clear()
    house.slow.open("contains")
    house.loop.turn()
    assert (first[0].fetched.offsets, first[0].why) == ([], Miss.TIER_LEFT_ALONE)
    assert len([verb for verb, _ in house.fast.calls if verb == "load"]) == 1, "only the one that failed"


@pytest.mark.parametrize("verb", ["contains", "load"])
def test_a_bug_in_a_tier_is_a_miss_and_a_tier_left_alone_and_keeps_no_memory(
    house: House, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.on(house.fast, 1)

    async def bug(*_: object) -> None:
        raise LookupError("a plugin's own exception")

    with monkeypatch.context() as patch:
        patch.setattr(house.fast, verb, bug)
        found: list[Found] = []

        async def fetch() -> None:
            digests = [digest(1)]
            found.append(await house.walk.fetches.fetch(house.session, digests, FetchLimits(DEADLINE_S)))

        async def go() -> None:
            house.walk.tasks.start(fetch())

        house.loop.run_until_complete(go())
        with pytest.raises(LookupError):
            house.loop.turn()
        house.loop.turn()
    assert found[0].why in (Miss.TIER_FAILED, Miss.TIER_LEFT_ALONE)
    assert house.store.figures()["writing_nbytes"] == 0
    house.loop.advance(1.1)
    house.ask(1)
    (found_again,) = house.ask(1)
    assert house.holds(found_again, 1), "it works again"


def test_what_was_evicted_between_the_question_and_the_read_is_no_failure(house: House) -> None:
    house.on(house.fast, 1, 2)
    house.fast.shut.add("load")
    found = house.ask(1, 2)
    del house.fast.chunks[house.session.namespace + digest(2)]
    house.fast.open("load")
    house.loop.turn()
    assert (house.holds(found[0], 1), found[0].why) == (True, Miss.TIER_EVICTED)
    assert house.walk.reads[0].breaker.failures == 0


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
    assert house.walk.reads[0].quarantined_nbytes == CHUNK
    (found,) = house.ask(1)
    assert (found.fetched.offsets, found.why, found.took_s) == ([], Miss.TIER_FAILED, 0.0)
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
    assert house.walk.reads[0].quarantined_nbytes == 3 * CHUNK
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
    (line,) = house.walk.reads
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


# ---- a pool with little room to spare --------------------------------------------------------------------------


FIRST, SECOND = range(1, 11), range(101, 111)


def prompt(house: House, numbers: Sequence[int], steps: Sequence[int]) -> None:
    """Stores a prompt as an engine does: room for all of it at once, then this many chunks a step.

    In its last step the disk is busy with something else.
    """
    got = house.store.reserve(house.session, [digest(number) for number in numbers])
    for place, number in enumerate(numbers):
        offset = got.offsets[place]
        assert isinstance(offset, int), "it got no room"
        house.memory[offset : offset + CHUNK] = np.frombuffer(payload(number), dtype=np.uint8)
    first = 0
    for count in steps:
        places = range(first, first + count)
        entries = house.store.written(house.session, got.lease, places)
        assert all(house.store.commit(house.session, got.lease, places, [sums(numbers[one]) for one in places]))
        house.loop.call_soon(house.walk.committed, house.session, entries)
        first += count
        if first == len(numbers):
            house.fast.shut.add("store")
        house.loop.advance(0.02)
    house.store.release(house.session, got.lease)


def on_disk(house: House, numbers: Sequence[int]) -> list[int]:
    return [number for number in numbers if house.session.namespace + digest(number) in house.fast.chunks]


def test_a_pool_barely_larger_than_a_prompt_evicts_first_what_is_written(loop: ManualLoop) -> None:
    """Of a prompt's last step one chunk is being written and one waits when the next prompt wants its room."""
    house = House(loop, tiers=1, room=12, share=1.0)
    prompt(house, FIRST, steps=(2, 2, 2, 2, 2))
    assert on_disk(house, FIRST) == [*FIRST][:8]
    got = house.store.reserve(house.session, [digest(number) for number in SECOND])
    assert all(isinstance(place, int) for place in got.offsets)
    house.store.release(house.session, got.lease)
    house.fast.open("store")
    house.loop.advance(1.0)
    assert on_disk(house, FIRST) == [*FIRST]
    assert house.walk.flushes[0].figures["gone"] == 0
    house.settle()


def test_what_waits_to_be_written_keeps_nobody_from_getting_room(
    loop: ManualLoop, caplog: pytest.LogCaptureFixture
) -> None:
    house = House(loop, tiers=1, room=12, share=1.0)
    house.fast.shut.add("store")
    prompt(house, FIRST, steps=(10,))
    prompt(house, SECOND, steps=(10,))
    assert house.store.index.contains([house.session.namespace + digest(110)]) == [True]
    house.fast.open("store")
    house.loop.advance(1.0)
    assert on_disk(house, SECOND) == [*SECOND]
    assert house.walk.flushes[0].figures["gone"] == 10 - len(on_disk(house, FIRST)) > 0
    assert caplog.text.count("before they were written") == 1
    house.settle()


def test_what_waits_to_be_written_takes_half_of_the_pool_from_what_is_used_most(loop: ManualLoop) -> None:
    """A prompt that is asked for again and again stays, however slow the disk is."""
    house = House(loop, tiers=1, room=16, share=1.0)
    house.put(1, 2, 3)
    house.loop.advance(1.0)
    house.fast.shut.add("store")
    for number in range(100, 140):
        house.put(number)
        (found,) = house.ask(1, 2, 3)
        assert found.sources == {"pool": 3}
        house.store.release(house.session, found.fetched.lease)
    house.fast.open("store")
    house.settle()
