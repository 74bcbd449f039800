"""Records read by their ranges: in which order, what is told, and what a fault in the middle makes of it."""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.testing.doubles.faulty_files import FaultyDisk, flip_bit
from kvkeep.testing.suites.tiers import key, memory_for, write_of
from kvkeep.tiers.disk.disk import DiskTier
from kvkeep.tiers.disk.reads import PIECE_NBYTES, pieces
from kvkeep.tiers.record import header_nbytes, record_nbytes
from kvkeep.tiers.tier import Write

RANGE = PIECE_NBYTES
SIZES = (RANGE,) * 3
CHUNKS = [write_of(key(number), SIZES) for number in range(6)]
RECORD = record_nbytes(SIZES)
HEADER = header_nbytes(len(SIZES))
ROOM = 16 << 20


def path_of(root: Path, one: bytes) -> str:
    return f"{root}/{one[:16].hex()}/{one[16:17].hex()}/{one[16:].hex()}"


async def loaded(tier: DiskTier, *writes: Write) -> tuple[list[bool], list[tuple[int, int]]]:
    """Which came back, byte for byte, and (place, ranges) as it was told, in order; what was told was right then."""
    told: list[tuple[int, int]] = []
    reads = [memory_for(one.key, one.sizes)[0] for one in writes]

    def tell(place: int, ranges: int) -> None:
        end = sum(writes[place].sizes[:ranges])
        assert reads[place].into[:end].tobytes() == writes[place].payload[:end].tobytes()
        told.append((place, ranges))

    sums = await tier.load([one._replace(arrived=partial(tell, place)) for place, one in enumerate(reads)])
    for one, write, read in zip(sums, writes, reads, strict=True):
        assert one is None or (one, bytes(read.into)) == (write.sums, bytes(write.payload))
    return [one is not None for one in sums], told


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40))
def test_pieces_are_the_ranges_in_order_and_no_smaller_than_they_need_to_be(pages: list[int]) -> None:
    sizes = [4096 * count for count in pages]
    cut = pieces(sizes)
    assert [number for one in cut for number in range(one.first, one.end)] == list(range(len(sizes)))
    for one in cut:
        assert (one.start_nbytes, one.end_nbytes) == (sum(sizes[: one.first]), sum(sizes[: one.end]))
        assert one.end_nbytes - one.start_nbytes >= PIECE_NBYTES or one is cut[-1]
        assert sum(sizes[one.first : one.end - 1]) < PIECE_NBYTES


def test_the_first_ranges_of_all_come_before_the_later_ones_of_any(run: Any, opened: Any) -> None:
    async def test() -> None:
        async with opened(size=ROOM, threads=2) as tier:
            await tier.store(CHUNKS)
            good, told = await loaded(tier, *CHUNKS)
            assert all(good)
            for thread in range(2):  # each on its own has them in this order
                mine = [(ranges, place) for place, ranges in told if place % 2 == thread]
                assert mine == [(ranges, place) for ranges in (1, 2, 3) for place in range(thread, 6, 2)]
            assert tier.figures().hits == 6

    run(test)


@pytest.mark.parametrize("direct", [True, False])
def test_a_flipped_bit_is_never_told_of_as_good(run: Any, opened: Any, root: Path, direct: bool) -> None:
    async def test() -> None:
        async with opened(size=ROOM, direct=direct) as tier:
            await tier.store(CHUNKS)
            for bit in range(0, RECORD * 8, 8 * 39119):
                flip_bit(path_of(root, CHUNKS[1].key), bit)
                good, told = await loaded(tier, *CHUNKS[:3])
                assert good == [True, False, True], bit
                most = max(0, bit // 8 - HEADER) // RANGE
                assert [ranges for place, ranges in told if place == 1] == list(range(1, most + 1)), bit
                assert not os.path.exists(path_of(root, CHUNKS[1].key)), "a bad record is gone"
                await tier.store(CHUNKS[1:2])

    run(test)


@pytest.mark.parametrize("nbytes", [0, 100, HEADER, HEADER + RANGE, RECORD - 1, RECORD + 4096])
def test_a_record_of_another_length_is_a_miss_from_the_start(run: Any, opened: Any, root: Path, nbytes: int) -> None:
    async def test() -> None:
        async with opened(size=ROOM) as tier:
            await tier.store(CHUNKS[:2])
            os.truncate(path_of(root, CHUNKS[0].key), nbytes)
            good, told = await loaded(tier, *CHUNKS[:2])
            assert good == [False, True]
            assert [place for place, _ in told] == [1, 1, 1]

    run(test)


def test_a_swapped_record_and_an_absent_one_are_told_of_not_at_all(run: Any, opened: Any, root: Path) -> None:
    async def test() -> None:
        async with opened(size=ROOM) as tier:
            await tier.store(CHUNKS[:2])
            os.replace(path_of(root, CHUNKS[0].key), path_of(root, CHUNKS[1].key))
            good, told = await loaded(tier, *CHUNKS[:3])
            assert (good, told) == ([False] * 3, [])

    run(test)


@pytest.mark.parametrize("failing", range(1, 10))
def test_a_read_that_fails_is_that_chunk_s_answer_and_nothing_stays_open(run: Any, opened: Any, failing: int) -> None:
    async def test() -> None:
        disk, reads = FaultyDisk(), 0

        def fault(call: str, _path: str) -> int:
            nonlocal reads
            reads += call == "readv"
            return errno.EIO if call == "readv" and reads == failing else 0

        async with opened(disk.files, size=ROOM) as tier:
            await tier.store(CHUNKS[:3])
            before = set(disk.paths)
            disk.fault = fault
            good, told = await loaded(tier, *CHUNKS[:3])
            assert sorted(good) == [False, True, True]
            lost = good.index(False)
            assert (lost, 3) not in told
            assert set(disk.paths) == before
            disk.fault = lambda _call, _path: 0
            assert (await loaded(tier, *CHUNKS[:3]))[0] == [True] * 3, "the record is still there"

    run(test)


@pytest.mark.parametrize("short", [4096, 64 << 10])
def test_short_reads_are_made_whole(run: Any, opened: Any, short: int) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files, size=ROOM) as tier:
            await tier.store(CHUNKS[:2])
            disk.short = short
            good, told = await loaded(tier, *CHUNKS[:2])
            assert good == [True, True]
            assert len(told) == 6

    run(test)
