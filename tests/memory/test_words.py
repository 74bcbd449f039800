"""Progress words: they never go back, failure is for good, and one that was given back is touched by nobody."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.memory.progress import FAILED, WORDS_NBYTES, Words, arrival_at, region_nbytes, words_behind
from kvkeep.memory.region import Region

POOL = 2 * 4096
RANGES = 5


@pytest.mark.parametrize("pool_nbytes", [4096, 4097, 3 * 4096])
def test_they_are_behind_the_pool_and_no_two_are_the_same(pool_nbytes: int) -> None:
    with Region.create(region_nbytes(pool_nbytes)) as region:
        words = words_behind(region)
        taken = [words.take() for _ in range(words.free)]
        offsets = {one.offset for one in taken}
        assert len(offsets) == len(taken) == WORDS_NBYTES // 4
        assert min(offsets) >= pool_nbytes
        assert max(offsets) == region.nbytes - 4
        assert words.free == 0


def test_another_mapping_sees_what_the_store_says() -> None:
    with Region.create(region_nbytes(POOL)) as ours, Region.attach(os.dup(ours.fd)) as theirs:
        word = words_behind(ours).take()
        arrival = arrival_at(theirs, word.offset)
        assert not arrival.has(1)
        word.advance(2)
        assert [arrival.has(ranges) for ranges in (1, 2, 3)] == [True, True, False]
        word.fail()
        assert arrival.failed
        assert not arrival.has(1), "nothing of it may be used any more"
        del arrival


@given(st.lists(st.integers(1, RANGES) | st.sampled_from(["fail", "end"]), max_size=12))
def test_it_never_goes_back_and_is_not_touched_after_its_end(told: list[int | str]) -> None:
    memory = np.zeros(4, np.uint8)
    words = Words(memory, 0)
    word, most, over = words.take(), 0, False
    for one in told:
        if one == "end" and not over:
            words.give_back(word)
            over = True
        elif one == "fail":
            word.fail()
            most = most if over else FAILED
        elif one != "end":
            word.advance(int(one))
            most = most if over else max(most, int(one))
        assert int(memory.view(np.uint32)[0]) == most
        assert word.failed == (most == FAILED and not over)
    assert words.free == over


def test_a_word_that_is_taken_again_begins_at_nothing_whatever_a_late_reader_tells() -> None:
    words = Words(np.zeros(4, np.uint8), 0)
    first = words.take()
    first.fail()
    words.give_back(first)
    second = words.take()
    first.advance(RANGES)
    first.fail()
    assert (second.offset, second.failed) == (first.offset, False)


def test_threads_that_tell_at_once_leave_the_furthest() -> None:
    memory = np.zeros(4, np.uint8)
    word = Words(memory, 0).take()
    threads = [threading.Thread(target=lambda n=n: [word.advance(k) for k in range(1, n)]) for n in range(2, 300, 40)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert int(memory.view(np.uint32)[0]) == 281
