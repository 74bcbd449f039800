"""Fetches that are answered before their chunks have come: what a word says, and whose memory it is until the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvkeep.memory.progress import Progress
from kvkeep.telemetry import Miss
from kvkeep.testing.doubles.gate_tier import ManualLoop

from .house import CHUNK, DEADLINE_S, House, digest, payload, sums

RANGE = CHUNK // 2


@pytest.fixture
def house() -> Iterator[House]:
    loop = ManualLoop()
    house = House(loop)
    house.fast.shut |= {"load", "range"}
    yield house
    house.fast.open("load")
    house.fast.open("range")
    house.settle()
    loop.close()


def step(house: House) -> None:
    """The next range of all chunks comes."""
    house.fast.open("load")
    house.fast.open("range")
    house.fast.shut.add("range")
    house.loop.turn()


def counts(words: dict[int, Progress]) -> list[int | str]:
    """What each word says, in the order of the places."""
    return ["failed" if one.failed else sum(one.has(n) for n in (1, 2)) for _, one in sorted(words.items())]


def test_it_is_answered_when_its_chunks_are_located_and_words_tell_what_has_come(house: House) -> None:
    house.put(1)
    house.on(house.fast, 2, 3)
    (found,) = house.ask(1, 2, 3, 4, early=True)
    assert (len(found.fetched.offsets), found.why, found.sources) == (3, Miss.NOT_STORED, {"pool": 1, "fast": 2})
    words = house.progress_of(found)
    assert list(words) == [1, 2], "what the pool has needs no word"
    step(house)
    assert counts(words) == [0, 0]
    step(house)
    assert counts(words) == [1, 1]
    for number, offset in zip((2, 3), found.fetched.offsets[1:], strict=True):
        assert house.memory[offset : offset + RANGE].tobytes() == payload(number)[:RANGE]
        assert not house.memory[offset + RANGE : offset + CHUNK].any(), "it is still to come"
    step(house)
    assert counts(words) == [2, 2]
    assert house.holds(found, 1, 2, 3)
    assert house.walk.promotions.figures["lent_early"] == 2


def test_what_has_come_is_pinned_until_the_lease_ends_and_readable_for_others(house: House) -> None:
    house.on(house.fast, 1)
    (found,) = house.ask(1, 2, early=True)
    for _ in range(3):
        step(house)
    assert house.store.figures()["pinned_nbytes"] == CHUNK
    (other,) = house.ask(1)
    assert (other.fetched.offsets, other.progress) == (found.fetched.offsets, {})
    house.store.release(house.session, other.fetched.lease)
    assert house.store.figures()["pinned_nbytes"] == CHUNK
    house.store.release(house.session, found.fetched.lease)
    assert house.store.figures()["pinned_nbytes"] == 0


def test_the_last_of_all_that_was_asked_for_comes_first_and_whole(house: House) -> None:
    house.on(house.fast, 1, 2, 3)
    (found,) = house.ask(1, 2, 3, early=True)
    house.fast.open("load")
    house.loop.turn()
    assert counts(house.progress_of(found)) == [0, 0, 2]
    first = next(keys for verb, keys in house.fast.calls if verb == "load")
    assert first == (house.session.namespace + digest(3),)


def test_two_that_want_the_same_share_the_read_and_the_word(house: House) -> None:
    house.on(house.fast, 1, 2)
    first, second = house.ask(1, 2, 9, early=True), house.ask(1, 2, 9, early=True)
    waiting = house.ask(1, 2)
    assert first[0].progress == second[0].progress
    house.store.release(house.session, first[0].fetched.lease)
    assert waiting == []
    for _ in range(3):
        step(house)
    assert house.holds(waiting[0], 1, 2)
    assert house.holds(second[0], 1, 2)
    assert len([verb for verb, _ in house.fast.calls if verb == "load"]) == 1


def test_a_read_that_fails_says_so_and_keeps_its_memory_as_long_as_the_lease(house: House) -> None:
    house.on(house.fast, 1, 2)
    (found,) = house.ask(1, 2, 9, early=True)
    words = house.progress_of(found)
    step(house)
    step(house)
    house.fast.keep(house.session.namespace + digest(2), b"torn", sums(2))
    step(house)
    assert counts(words) == [2, "failed"]
    before = house.memory[found.fetched.offsets[1] :][:CHUNK].tobytes()
    house.put(*range(20, 34))  # all the room that there is
    assert house.memory[found.fetched.offsets[1] :][:CHUNK].tobytes() == before
    assert house.store.figures()["dead_nbytes"] == CHUNK
    assert house.walk.promotions.figures["failed_early"] == 1
    house.store.release(house.session, found.fetched.lease)
    assert house.store.figures()["dead_nbytes"] == 0
    assert house.store.index.contains([house.session.namespace + digest(2)]) == [False]


@pytest.mark.parametrize("verb", ["load", "range"])
def test_a_tier_that_hangs_fails_the_words_in_time_and_keeps_the_memory_for_the_reader(house: House, verb: str) -> None:
    house.on(house.fast, 1)
    (found,) = house.ask(1, 9, early=True)
    words = house.progress_of(found)
    if verb == "range":
        step(house)
    house.loop.advance(DEADLINE_S)
    assert counts(words) == ["failed"]
    house.store.release(house.session, found.fetched.lease)
    others = house.put(*range(20, 28))
    before = house.memory[: house.store.pool_nbytes].copy()
    for _ in range(3):
        step(house)
    for offset in others:
        assert (house.memory[offset : offset + CHUNK] == before[offset : offset + CHUNK]).all()


def test_what_waits_for_its_turn_too_long_fails_and_comes_for_others(house: House) -> None:
    house.walk.reads[0].most_nbytes = CHUNK
    house.on(house.fast, 1, 2)
    house.ask(1, deadline_s=10.0)
    (found,) = house.ask(2, 9, early=True)
    assert [verb for verb, _ in house.fast.calls if verb == "load"] == ["load"], "the second one waits"
    house.loop.advance(DEADLINE_S)
    words = house.progress_of(found)
    assert counts(words) == ["failed"]
    for _ in range(4):
        step(house)
    assert counts(words) == ["failed"], "once given up it stays so, whatever has come"
    assert house.holds(house.ask(2)[0], 2)


def test_what_is_cleared_while_it_is_read_fails_and_its_memory_is_not_lent_meanwhile(house: House) -> None:
    house.on(house.fast, 1)
    (found,) = house.ask(1, 9, early=True)
    step(house)
    house.store.clear(house.session, everything=False)
    house.fast.open("range")
    house.loop.turn()
    assert counts(house.progress_of(found)) == ["failed"]
    assert not set(house.put(*range(20, 34))) & set(found.fetched.offsets)
    house.store.release(house.session, found.fetched.lease)
    assert house.store.index.contains([house.session.namespace + digest(1)]) == [False]


def test_a_session_that_ends_while_its_chunks_are_read_holds_them_until_it_is_closed(house: House) -> None:
    other = house.join()
    house.on(house.fast, 1)
    (found,) = house.ask(1, 9, session=other, early=True)
    house.walk.tasks.cancel(other)
    house.store.linger(other)
    for _ in range(3):
        step(house)
    assert counts(house.progress_of(found)) == [2]
    assert house.store.figures()["pinned_nbytes"] == CHUNK
    house.store.close(other)
    assert house.store.figures()["pinned_nbytes"] == 0
    assert house.holds(house.ask(1)[0], 1)


def test_a_lease_that_ends_first_leaves_the_read_to_others(house: House) -> None:
    house.on(house.fast, 1)
    (found,) = house.ask(1, 9, early=True)
    house.store.release(house.session, found.fetched.lease)
    assert house.session.pinned_nbytes == 0
    for _ in range(3):
        step(house)
    assert house.holds(house.ask(1)[0], 1)


def test_without_words_it_waits_as_ever(house: House) -> None:
    taken = [house.table.take() for _ in range(house.table.free - 1)]
    house.on(house.fast, 1, 2)
    found = house.ask(1, 2, early=True)
    assert found == []
    for _ in range(3):
        step(house)
    assert (house.holds(found[0], 1, 2), found[0].progress) == (True, {})
    for one in taken:
        house.table.give_back(one)


def test_what_a_tier_that_is_left_alone_still_reads_is_not_promised(house: House) -> None:
    house.on(house.fast, 1)
    house.ask(1)
    house.loop.advance(DEADLINE_S)
    (found,) = house.ask(1, early=True)
    assert (found.fetched.offsets, found.progress, found.took_s) == ([], {}, 0.0)
    for _ in range(3):
        step(house)
    (found,) = house.ask(1, early=True)
    assert (house.holds(found, 1), found.progress) == (True, {})


def test_a_tier_that_tells_no_progress_is_there_at_the_end(house: House) -> None:
    house.on(house.fast, 1)
    waiting = house.ask(1)
    (found,) = house.ask(1, early=True)  # the read has begun, without a word
    words = house.progress_of(found)
    assert counts(words) == [0]
    step(house)
    assert counts(words) == [2]
    assert house.holds(waiting[0], 1)


def test_its_chunks_count_as_the_session_s_share(house: House) -> None:
    house.on(house.fast, *range(20))
    (found,) = house.ask(*range(20), early=True)
    assert (len(found.fetched.offsets), found.why) == (8, Miss.PINNED_SHARE)
    assert house.session.pinned_nbytes == 8 * CHUNK
    assert house.ask(*range(20))[0].why is Miss.PINNED_SHARE
