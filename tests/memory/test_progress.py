"""Progress of chunks that are still being read: it never falls, failure is for good, and a freed number is not touched."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.memory.progress import FAILED, TABLE_NBYTES, ProgressTable, progress_at, region_nbytes, table_of
from kvkeep.memory.region import Region

POOL = 2 * 4096
RANGES = 5


@pytest.mark.parametrize("pool_nbytes", [4096, 4097, 3 * 4096])
def test_they_are_behind_the_pool_and_no_two_are_the_same(pool_nbytes: int) -> None:
    with Region.create(region_nbytes(pool_nbytes)) as region:
        table = table_of(region)
        taken = [table.take() for _ in range(table.free)]
        offsets = {writer.offset for writer in taken}
        assert len(offsets) == len(taken) == TABLE_NBYTES // 4
        assert min(offsets) >= pool_nbytes
        assert max(offsets) == region.nbytes - 4
        assert table.free == 0


def test_another_mapping_sees_what_the_store_says() -> None:
    with Region.create(region_nbytes(POOL)) as ours, Region.attach(os.dup(ours.fd)) as theirs:
        writer = table_of(ours).take()
        progress = progress_at(theirs, writer.offset)
        assert not progress.has(1)
        writer.advance(2)
        assert [progress.has(ranges) for ranges in (1, 2, 3)] == [True, True, False]
        writer.fail()
        assert progress.failed
        assert not progress.has(1), "nothing of it may be used any more"
        del progress


@given(st.lists(st.integers(1, RANGES) | st.sampled_from(["fail", "end"]), max_size=12))
def test_it_never_goes_back_and_is_not_touched_after_its_end(reports: list[int | str]) -> None:
    memory = np.zeros(4, np.uint8)
    table = ProgressTable(memory, 0)
    writer, most, over = table.take(), 0, False
    for report in reports:
        if report == "end" and not over:
            table.give_back(writer)
            over = True
        elif report == "fail":
            writer.fail()
            most = most if over else FAILED
        elif report != "end":
            writer.advance(int(report))
            most = most if over else max(most, int(report))
        assert int(memory.view(np.uint32)[0]) == most
        assert writer.failed == (most == FAILED and not over)
    assert table.free == over


def test_a_word_that_is_taken_again_begins_at_nothing_whatever_a_late_reader_tells() -> None:
    table = ProgressTable(np.zeros(4, np.uint8), 0)
    first = table.take()
    first.fail()
    table.give_back(first)
    second = table.take()
    first.advance(RANGES)
    first.fail()
    assert (second.offset, second.failed) == (first.offset, False)


def test_threads_that_tell_at_once_leave_the_furthest() -> None:
    memory = np.zeros(4, np.uint8)
    writer = ProgressTable(memory, 0).take()
    threads = [threading.Thread(target=lambda n=n: [writer.advance(k) for k in range(1, n)]) for n in range(2, 300, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert int(memory.view(np.uint32)[0]) == 281
