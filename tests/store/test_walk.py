"""Fetches down the tiers and writes to them: joins, deadlines, late reads, room, clears, trouble; and what comes back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvkeep.errors import TierBusy
from kvkeep.store.openings import Opening
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


# ---- the walk --------------------------------------------------------------------------------------------------


def test_a_prefix_spread_over_pool_and_tiers_is_one_hit(house: House) -> None:
    house.put(1)
    house.on(house.fast, 2, 4)
    house.on(house.slow, 2, 3, 9)
    (found,) = house.ask(1, 2, 3, 4, 5)
    assert house.holds(found, 1, 2, 3, 4)
    assert found.sources == {"pool": 1, "fast": 2, "slow": 1}
    assert found.why is Miss.NOT_STORED
    (again,) = house.ask(1, 2, 3, 4)
    assert again.sources == {"pool": 4}
    assert again.why is None


def test_a_fetch_for_what_no_tier_has_evicts_nothing_and_reads_nothing(loop: ManualLoop) -> None:
    house = House(loop, room=4, share=1.0)
    house.put(1, 2, 3, 4)
    house.loop.turn()
    (found,) = house.ask(7, 8)
    assert (found.fetched.offsets, found.why) == ([], Miss.NOT_STORED)
    assert house.store.figures()["evictions"] == 0
    assert [verb for verb, _ in house.fast.calls if verb == "load"] == []
    house.settle()


def test_a_hole_ends_the_run_and_nothing_behind_it_is_read(house: House) -> None:
    house.on(house.fast, 1, 3)
    (found,) = house.ask(1, 2, 3)
    assert house.holds(found, 1)
    assert house.store.index.contains([house.session.namespace + digest(3)]) == [False]


def test_what_nobody_can_find_after_its_session_goes_to_no_tier(loop: ManualLoop) -> None:
    house = House(loop, tiers=1)
    house.put(1)
    house.store.rename(house.session, b"o" * 16, lasting=False)
    house.put(2)

    async def comes_late() -> None:
        house.walk.add("late", house.slow)

    house.loop.run_until_complete(comes_late())
    house.loop.turn()
    for tier in (house.fast, house.slow):
        assert [key[16:] for verb, keys in tier.calls if verb == "store" for key in keys] == [digest(1)]
    (found,) = house.ask(1, 2)
    assert found.why is Miss.NOT_STORED
    (found,) = house.ask(2)
    assert house.holds(found, 2)
    house.settle()


def test_without_sizes_or_a_deadline_only_the_pool_is_looked_at(house: House) -> None:
    house.on(house.fast, 1)
    (found,) = house.ask(1, deadline_s=0.0)
    assert found.why is Miss.NOT_STORED
    plain = house.store.open(Opening("test", b"n" * 16, "", CHUNK, holders=()))
    (found,) = house.ask(1, session=plain)
    assert found.why is Miss.NOT_STORED
    assert house.fast.calls == []
    house.store.close(plain)


def test_one_read_serves_all_who_wait_for_it(house: House) -> None:
    house.on(house.fast, 1, 2)
    house.fast.shut.add("load")
    first, second = house.ask(1, 2), house.ask(1, 2)
    assert (first, second) == ([], [])
    house.fast.open("load")
    house.loop.turn()
    assert house.holds(first[0], 1, 2)
    assert house.holds(second[0], 1, 2)
    assert len([verb for verb, _ in house.fast.calls if verb == "load"]) == 1


def test_a_chunk_of_another_shape_is_a_miss(house: House) -> None:
    house.fast.keep(house.session.namespace + digest(1), b"x" * 4096, sums(1))
    (found,) = house.ask(1)
    assert (found.fetched.offsets, found.why) == ([], Miss.TIER_FAILED)


def test_what_a_bad_tier_lost_is_a_miss_and_what_was_before_it_a_hit(house: House) -> None:
    house.on(house.fast, 1, 2, 3)
    house.fast.shut.add("load")
    waiting = house.ask(1, 2, 3)
    house.fast.keep(house.session.namespace + digest(2), b"torn", sums(2))  # it said that it had it
    house.fast.open("load")
    house.loop.turn()
    assert house.holds(waiting[0], 1)
    assert waiting[0].why is Miss.TIER_FAILED


# ---- room ------------------------------------------------------------------------------------------------------


def test_it_takes_what_fits_now_and_never_waits_for_room(loop: ManualLoop) -> None:
    house = House(loop, room=4, share=1.0)
    house.put(11, 12)
    (pinned,) = house.ask(11, 12)
    house.on(house.fast, 1, 2, 3)
    (found,) = house.ask(1, 2, 3)
    assert found.why in (Miss.POOL_FULL, Miss.PINNED_SHARE)
    assert len(found.fetched.offsets) <= 2
    assert pinned.fetched.lease
    house.settle()


def test_a_session_s_waiting_requests_pin_at_most_their_share(loop: ManualLoop) -> None:
    house = House(loop, room=40, share=0.5)
    house.on(house.fast, *range(100))
    house.fast.shut.add("load")
    waiting = [house.ask(*range(40)), house.ask(*range(40, 80))]
    assert waiting[1][0].why is Miss.PINNED_SHARE
    house.fast.open("load")
    house.loop.turn()
    assert house.holds(waiting[0][0], *range(20))
    assert waiting[0][0].why is Miss.PINNED_SHARE
    assert house.store.figures()["pinned_nbytes"] == 20 * CHUNK
    house.settle()


def test_eight_requests_in_the_queue_all_get_their_turn(loop: ManualLoop) -> None:
    house = House(loop, room=40, share=0.5)
    house.on(house.fast, *range(40), *range(100, 140))
    for turn in range(8):
        (found,) = house.ask(*(range(40) if turn % 2 else range(100, 140)))
        assert len(found.fetched.offsets) == 20
        house.store.release(house.session, found.fetched.lease)
    assert loop.now_s == 0.0, "no deadline was needed"
    house.settle()


def test_promoted_chunks_age_tail_first(loop: ManualLoop) -> None:
    house = House(loop, room=4, share=1.0)
    house.on(house.fast, 1, 2, 3)
    (found,) = house.ask(1, 2, 3)
    house.store.release(house.session, found.fetched.lease)
    house.put(7, 8)
    keys = [house.session.namespace + digest(n) for n in (1, 2, 3)]
    assert house.store.index.contains(keys) == [True, True, False]
    house.settle()


def test_a_run_whose_end_was_promoted_ages_tail_first_as_a_whole(loop: ManualLoop) -> None:
    house = House(loop, room=4, share=1.0)
    house.put(1)
    house.loop.turn()
    house.on(house.fast, 2, 3)
    (found,) = house.ask(1, 2, 3)
    house.store.release(house.session, found.fetched.lease)
    house.put(7, 8)
    keys = [house.session.namespace + digest(n) for n in (1, 2, 3)]
    assert house.store.index.contains(keys) == [True, True, False]
    house.settle()


# ---- time ------------------------------------------------------------------------------------------------------


def test_at_its_deadline_a_request_gets_what_has_come(house: House) -> None:
    house.on(house.fast, 1)
    house.on(house.slow, 2)
    house.slow.shut.add("load")
    found = house.ask(1, 2)
    assert found == []
    house.loop.advance(DEADLINE_S)
    assert house.holds(found[0], 1)
    assert found[0].why in (Miss.TIER_LATE, Miss.TIER_FAILED)
    house.slow.open("load")


def test_a_hung_read_keeps_its_memory_and_costs_one_deadline(house: House) -> None:
    house.on(house.fast, 1, 2)
    house.fast.shut.add("load")
    found = house.ask(1)
    house.loop.advance(DEADLINE_S)
    assert found[0].fetched.offsets == []
    assert house.walk.reads[0].quarantined_nbytes == CHUNK
    (second,) = house.ask(2)  # the breaker is open: nobody waits again
    assert second.fetched.offsets == []
    others = house.put(*range(20, 28))  # what is lent meanwhile is not the late read's
    before = house.memory.copy()
    house.fast.open("load")
    house.loop.turn()
    for offset in others:
        assert (house.memory[offset : offset + CHUNK] == before[offset : offset + CHUNK]).all()
    (third,) = house.ask(1)
    assert house.holds(third, 1)
    assert third.sources == {"pool": 1}, "what came late is there for others"
    (fourth,) = house.ask(2)
    assert house.holds(fourth, 2), "what came late showed that the tier works"


def test_a_tier_that_does_not_say_what_it_has_costs_one_deadline(house: House) -> None:
    house.on(house.fast, 1)
    house.fast.shut.add("contains")
    found = house.ask(1)
    assert found == []
    house.loop.advance(DEADLINE_S)
    assert found[0].why is Miss.TIER_LATE
    assert len(house.ask(1)) == 1
    house.fast.open("contains")


@pytest.mark.parametrize("verb", ["load", "contains"])
def test_a_request_that_waits_less_says_nothing_about_the_tier(house: House, verb: str) -> None:
    house.on(house.fast, 1)
    house.fast.shut.add(verb)
    found = house.ask(1, deadline_s=DEADLINE_S / 10, limit_s=DEADLINE_S)
    house.loop.advance(DEADLINE_S / 10)
    assert (found[0].why, found[0].took_s) == (Miss.TIER_LATE, DEADLINE_S / 10)
    house.loop.advance(DEADLINE_S / 2)
    assert house.walk.reads[0].breaker.failures == 0
    house.loop.advance(DEADLINE_S / 2)
    assert house.walk.reads[0].breaker.failures == 1, "but that it did not answer within its limit does"
    house.fast.open(verb)


@pytest.mark.parametrize("verb", ["load", "contains"])
def test_a_tier_that_answers_after_its_request_has_gone_has_not_failed(house: House, verb: str) -> None:
    house.on(house.fast, 1)
    house.fast.shut.add(verb)
    house.ask(1, deadline_s=DEADLINE_S / 10, limit_s=DEADLINE_S)
    house.loop.advance(DEADLINE_S / 2)
    house.fast.open(verb)
    house.loop.advance(DEADLINE_S)
    assert house.walk.reads[0].breaker.failures == 0
    assert house.holds(house.ask(1)[0], 1)


def test_a_tier_that_failed_is_tried_with_a_probe_that_nobody_waits_for(house: House) -> None:
    house.on(house.fast, 1)
    house.fast.broken.add("load")
    (found,) = house.ask(1)
    assert found.why is Miss.TIER_FAILED
    calls = len(house.fast.calls)
    (found,) = house.ask(1)
    assert len(house.fast.calls) == calls, "it is left alone"
    house.fast.broken.clear()
    house.fast.shut.add("load")
    house.loop.advance(1.1)
    (found,) = house.ask(1)
    assert found.fetched.offsets == [], "the probe is not waited for"
    house.fast.open("load")
    house.loop.turn()
    (found,) = house.ask(1)
    assert house.holds(found, 1)


@pytest.mark.parametrize("verb", ["load", "contains"])
def test_a_tier_that_hangs_gets_no_more_probes(house: House, verb: str) -> None:
    house.on(house.fast, *range(8))
    house.fast.shut.add(verb)
    for number in range(8):
        house.ask(number)
        house.loop.advance(70.0)
    assert len([one for one, _ in house.fast.calls if one == verb]) <= 2
    house.fast.open(verb)


def test_a_later_request_does_not_queue_behind_a_long_one(loop: ManualLoop) -> None:
    house = House(loop, room=80, share=1.0, tiers=1)
    (line,) = house.walk.reads
    line.slice_nbytes = line.most_nbytes = 2 * CHUNK
    house.on(house.fast, *range(60))
    house.fast.shut.add("load")
    long, short = house.ask(*range(40)), house.ask(50, 51)
    house.fast.open("load")
    house.loop.turn()
    assert house.holds(long[0], *range(40))
    assert house.holds(short[0], 50, 51)
    loads = [keys[0][16:] for verb, keys in house.fast.calls if verb == "load"]
    assert loads.index(digest(50)) <= 2
    house.settle()


# ---- sessions and clears ---------------------------------------------------------------------------------------


def test_the_fetches_of_a_session_that_ended_hold_nothing(house: House) -> None:
    other = house.join()
    house.on(house.fast, 1)
    house.put(0)
    house.fast.shut.add("load")
    found = house.ask(0, 1, session=other)
    house.walk.tasks.cancel(other)
    house.store.close(other)
    house.fast.open("load")
    house.loop.turn()
    assert found == []


def test_what_was_cleared_while_it_came_is_not_given(house: House) -> None:
    house.on(house.fast, 1)
    house.fast.shut.add("load")
    found = house.ask(1)
    house.store.clear(house.session, everything=False)
    house.fast.open("load")
    house.loop.turn()
    assert found[0].fetched.offsets == []


def test_clear_reaches_every_tier(house: House) -> None:
    house.on(house.fast, 1)
    house.on(house.slow, 2)
    house.slow.keep(b"x" * 16 + digest(2), payload(2), sums(2))
    house.loop.run_until_complete(house.walk.clear(house.session.namespace))
    assert (len(house.fast.chunks), len(house.slow.chunks)) == (0, 1)


def test_a_chunk_that_failed_is_deleted_everywhere(house: House) -> None:
    house.on(house.fast, 1, 2)
    house.loop.run_until_complete(house.walk.discard([house.session.namespace + digest(1)]))
    assert list(house.fast.chunks) == [house.session.namespace + digest(2)]


@pytest.mark.parametrize("verb", ["clear", "delete"])
def test_a_tier_that_hangs_in_a_clear_holds_nobody_up_for_long(house: House, verb: str) -> None:
    house.on(house.slow, 1)
    key = house.session.namespace + digest(1)
    house.fast.shut.add(verb)
    steps = house.walk.clear(house.session.namespace) if verb == "clear" else house.walk.discard([key])
    task = house.loop.create_task(steps)
    house.loop.turn()
    assert not task.done()
    house.loop.advance(5.1)
    assert task.done(), "the one below was not reached"
    assert house.slow.chunks == {}
    assert house.walk.reads[0].breaker.failures == 1
    house.fast.open(verb)


def test_a_tier_of_which_we_ask_too_much_has_not_failed(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async def busy(_: object) -> None:
        raise TierBusy("too much is waiting")

    house.on(house.slow, 1)
    with monkeypatch.context() as patch:
        patch.setattr(house.fast, "clear", busy)
        house.loop.run_until_complete(house.walk.clear(house.session.namespace))
    assert house.slow.chunks == {}
    assert house.walk.reads[0].breaker.failures == 0


# ---- writes ----------------------------------------------------------------------------------------------------


def test_what_is_stored_reaches_every_tier(house: House) -> None:
    house.put(1, 2, 3)
    house.loop.turn()
    for tier in (house.fast, house.slow):
        assert tier.chunks == {house.session.namespace + digest(n): (payload(n), sums(n)) for n in (1, 2, 3)}


def test_sums_that_could_not_be_verified_are_not_written(loop: ManualLoop) -> None:
    """A session that says nothing of its ranges may commit any sums, also in a namespace in which others say it."""
    house = House(loop, tiers=0)
    plain = house.store.open(Opening("test", house.session.namespace, "", CHUNK, holders=()))
    house.put(2)
    got = house.store.reserve(plain, [digest(1)])
    entries = house.store.written(plain, got.lease, [0])
    assert house.store.commit(plain, got.lease, [0], [b"short"]) == [True]
    house.walk.committed(plain, entries)
    loop.run_until_complete(house.walk.admit("fast", house.fast))
    for _ in range(20):
        loop.advance(0.1)
    assert house.fast.chunks == {house.session.namespace + digest(2): (payload(2), sums(2))}


def test_a_tier_is_not_asked_for_a_chunk_whose_sums_are_of_another_shape(house: House) -> None:
    """It is a miss, as one of another size is: the pool has the key, so nothing could be brought under it."""
    plain = house.store.open(Opening("test", house.session.namespace, "", CHUNK, holders=()))
    got = house.store.reserve(plain, [digest(1)])
    assert house.store.commit(plain, got.lease, [0], [b"short"]) == [True]
    house.on(house.fast, 1)
    (found,) = house.ask(1)
    assert (found.fetched.lease, found.why) == (0, Miss.NOT_STORED)
    house.settle()


def test_a_chunk_from_a_lower_tier_is_written_to_those_above(house: House) -> None:
    house.on(house.slow, 1)
    house.ask(1)
    house.loop.turn()
    assert list(house.fast.chunks) == [house.session.namespace + digest(1)]


def test_a_tier_that_comes_late_gets_what_the_pool_has(loop: ManualLoop) -> None:
    """What is new soon has its turn; what was stored without sums, by another shape or is gone by then is not written."""
    house = House(loop, room=200, tiers=0)
    plain = house.store.open(Opening("test", b"p" * 16, "", CHUNK, holders=()))
    other = house.join("o")
    house.put(500, session=plain)
    house.put(*range(70))
    house.put(7, session=other)
    house.store.close(other)
    house.fast.shut.add("store")
    loop.run_until_complete(house.walk.admit("fast", house.fast))
    house.put(100)
    loop.turn()
    house.store.discard(house.session, [digest(69)])
    house.fast.open("store")
    for _ in range(20):
        house.loop.advance(0.1)
    wanted = {house.session.namespace + digest(n): (payload(n), sums(n)) for n in (100, *range(69))}
    wanted[b"o" * 16 + digest(7)] = (payload(7), sums(7))
    assert house.fast.chunks == wanted
    order = [int.from_bytes(key[16:20], "big") for key in house.fast.chunks]
    assert order.index(100) < order.index(64), "what is new waits for one turn, not for all that is old"
    assert house.walk.flushes[0].figures["gone"] == 1
    assert house.walk.flushes[0].waiting == 0
    house.store.close(plain)
    house.settle()


def test_a_late_tier_that_takes_nothing_is_not_caught_up_with(loop: ManualLoop) -> None:
    house = House(loop, room=200, tiers=0)
    house.put(*range(100))
    house.fast.broken.add("store")
    loop.run_until_complete(house.walk.admit("fast", house.fast))
    house.loop.advance(0.1)
    figures = house.walk.flushes[0].figures
    assert (figures["refused"] + figures["dropped"], house.walk.flushes[0].waiting) == (100, 0)
    house.settle()


def test_a_tier_that_comes_late_does_not_bring_back_what_was_cleared(loop: ManualLoop) -> None:
    house = House(loop, tiers=0)
    other = house.join("o")
    house.on(house.fast, 1)
    house.fast.keep(b"o" * 16 + digest(1), payload(1), sums(1))
    loop.run_until_complete(house.walk.clear(house.session.namespace))
    house.fast.shut.add("clear")
    admitted = loop.create_task(house.walk.admit("fast", house.fast))
    loop.turn()
    assert house.walk.reads == [], "it is not asked before it has forgotten"
    loop.run_until_complete(house.walk.clear(other.namespace))
    house.fast.open("clear")
    loop.turn()
    assert admitted.done()
    assert house.fast.chunks == {}
    assert house.ask(1)[0].why is Miss.NOT_STORED
    house.store.close(other)
    house.settle()


def test_a_late_tier_that_hangs_when_it_is_to_forget_is_left_out(loop: ManualLoop) -> None:
    house = House(loop, tiers=0)
    house.on(house.fast, 1)
    loop.run_until_complete(house.walk.clear(None))
    house.fast.shut.add("clear")
    admitted = loop.create_task(house.walk.admit("fast", house.fast))
    loop.turn()
    loop.advance(5.1)
    assert admitted.done()
    assert house.walk.reads == []
    assert house.fast.closed
    house.fast.open("clear")
    house.settle()


def test_a_late_tier_that_cannot_forget_is_left_out(loop: ManualLoop) -> None:
    house = House(loop, tiers=0)
    house.on(house.fast, 1)
    loop.run_until_complete(house.walk.clear(None))
    house.fast.broken.add("clear")
    loop.run_until_complete(house.walk.admit("fast", house.fast))
    assert house.walk.reads == []
    assert house.fast.closed


def test_writes_wait_for_reads_and_hold_little(loop: ManualLoop) -> None:
    house = House(loop, room=32, tiers=1)
    house.on(house.fast, 50)
    house.fast.shut |= {"load", "store"}
    waiting = house.ask(50)
    house.put(*range(10))
    house.loop.advance(0.1)
    assert "store" not in [verb for verb, _ in house.fast.calls]
    house.fast.open("load")
    house.loop.advance(0.1)
    assert house.holds(waiting[0], 50)
    assert 0 < house.walk.flushes[0].held_nbytes <= house.store.pool_nbytes // 8
    house.fast.open("store")
    for _ in range(20):
        house.loop.advance(0.1)
    assert len(house.fast.chunks) == 11
    house.settle()


def test_a_tier_that_takes_nothing_costs_writes_and_no_hits(loop: ManualLoop) -> None:
    house = House(loop, tiers=1)
    house.on(house.fast, 9)
    house.fast.broken.add("store")
    house.put(1, 2)
    house.loop.advance(0.1)
    assert house.walk.flushes[0].figures["refused"] >= 1
    (found,) = house.ask(9)
    assert house.holds(found, 9)
    house.fast.broken.clear()
    house.loop.advance(2.0)
    house.put(3)
    house.loop.advance(0.1)
    assert house.session.namespace + digest(3) in house.fast.chunks
    house.settle()


def test_writes_that_are_too_old_are_dropped(loop: ManualLoop) -> None:
    house = House(loop, tiers=1)
    house.on(house.fast, 9)
    house.fast.shut.add("load")
    house.ask(9, deadline_s=1000.0)
    house.put(1)
    house.loop.advance(0.1)
    house.loop.advance(61.0)
    assert house.walk.flushes[0].figures["dropped"] == 1
    house.fast.open("load")
    house.loop.turn()
    house.settle()


def test_the_end_counts_the_chunks_that_it_could_not_write(loop: ManualLoop) -> None:
    house = House(loop, tiers=1)
    house.fast.shut.add("store")
    house.put(1, 2)
    left = house.loop.create_task(house.walk.aclose(1.0))
    for _ in range(30):
        house.loop.advance(0.1)
    assert left.result() == (2, 2)
    house.fast.open("store")
    house.settle()


def test_the_end_writes_what_waits_and_says_what_it_could_not(loop: ManualLoop) -> None:
    house = House(loop, tiers=1)
    house.put(1, 2)
    left = house.loop.create_task(house.walk.aclose(1.0))
    house.loop.turn()
    for _ in range(30):
        house.loop.advance(0.1)
    assert left.result() == (0, 0)
    assert house.fast.closed
    assert len(house.fast.chunks) == 2


def ended(house: House) -> tuple[int, int]:
    """What its end says was written nowhere, and could have been."""
    left = house.loop.create_task(house.walk.aclose(1.0))
    for _ in range(80):
        house.loop.advance(0.1)
    return left.result()


def test_the_end_counts_what_a_tier_refused_dropped_or_lost(loop: ManualLoop) -> None:
    house = House(loop, tiers=1)
    house.fast.broken.add("store")
    house.put(1, 2)
    house.loop.turn()
    house.put(3)  # dropped: it takes nothing for a while
    house.loop.turn()
    house.fast.broken.clear()
    house.loop.advance(1.1)
    house.put(4, 5)
    house.loop.turn()
    del house.fast.chunks[house.session.namespace + digest(5)]
    assert ended(house) == (4, 4)


def test_the_end_counts_once_what_any_tier_has(house: House) -> None:
    house.put(1, 2, 3)
    house.loop.turn()
    for tier, number in ((house.fast, 1), (house.slow, 2), (house.fast, 3), (house.slow, 3)):
        del tier.chunks[house.session.namespace + digest(number)]
    assert ended(house) == (1, 1)


@pytest.mark.parametrize("how", ["broken", "shut"])
def test_a_tier_that_does_not_say_what_it_has_has_nothing_at_the_end(
    house: House, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    house.put(1)
    house.loop.turn()
    getattr(house.fast, how).add("contains")
    getattr(house.slow, how).add("contains")
    assert ended(house) == (1, 1)
    assert "tier fast does not say what it has" in caplog.text
    house.fast.open("contains")
    house.slow.open("contains")


def test_what_nobody_could_find_again_is_not_lost_at_the_end(house: House) -> None:
    """Without sums no tier keeps it."""
    plain = house.store.open(Opening("test", b"p" * 16, "", CHUNK, holders=()))
    house.put(1)
    house.put(2, session=plain)
    house.loop.turn()
    assert ended(house) == (1, 0)
    house.store.close(plain)


@pytest.mark.parametrize("name", ["pool", "", "Disk", "a tier", "1st", "x" * 33, "disk\n"])
def test_a_tier_s_name_can_be_a_label_of_metrics(house: House, name: str) -> None:
    with pytest.raises(ValueError, match="a tier's name"):
        house.walk.add(name, house.walk.reads[0].tier)
