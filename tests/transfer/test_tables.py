from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.core.layout import GroupLayout, LayerLayout, ShardLayout
from kvkeep.memory.pool import Lease
from kvkeep.transfer.device.tables import (
    CopyJob,
    Pages,
    Part,
    address_of,
    block_rows,
    copies,
    cut,
    edges_of,
    merged,
    parts_of,
    width_of,
)
from kvkeep.transfer.transfer import Blocks

SHARD = ShardLayout(
    8,
    (
        GroupLayout(2, 0, (LayerLayout("a", (24, 40)), LayerLayout("b", (7,)))),
        GroupLayout(4, 0, (LayerLayout("c", (64,)),)),
    ),
)
PARTS = (
    Part(0, 0, Pages(1000, 24, 24), 0),
    Part(0, 0, Pages(5000, 100, 40), 4 * 24),
    Part(0, 1, Pages(9000, 7, 7), 4096),
    Part(1, 2, Pages(20_000, 64, 64), 8192),
)


def job(*blocks: Blocks, pieces: tuple[int, ...] = (0,)) -> CopyJob:
    return CopyJob(blocks, Lease(np.zeros(SHARD.nbytes, np.uint8), SHARD, pieces))


def test_parts_lie_one_after_the_other_in_their_range():
    pages = [[[PARTS[0].pages, PARTS[1].pages], [PARTS[2].pages]], [[PARTS[3].pages]]]
    assert parts_of(SHARD, pages) == PARTS


@pytest.mark.parametrize(
    ("numbers", "width"),
    [([0, 64], 16), ([64, 8], 8), ([12], 4), ([16, 6], 2), ([32, 33], 1), ([], 16), ([1 << 40, 4096], 16)],
)
def test_the_widest_access_divides_everything(numbers: list[int], width: int):
    assert width_of(numbers) == width


def test_a_page_goes_to_its_place_in_its_chunk():
    one, two = job(Blocks(0, 1, (7, 8)), Blocks(1, 0, (3,))), job(Blocks(0, 0, (2,)))
    at, beside = address_of(one.lease), address_of(two.lease)
    assert block_rows([one, two], 0).tolist() == [[7, at, 1], [8, at, 2], [2, beside, 0]]
    assert copies(PARTS, [one, two]).tolist() == [
        [1000 + 7 * 24, at + 24, 24],
        [1000 + 8 * 24, at + 48, 24],
        [1000 + 2 * 24, beside, 24],
        [5000 + 700, at + 96 + 40, 40],
        [5000 + 800, at + 96 + 80, 40],
        [5000 + 200, beside + 96, 40],
        [9000 + 49, at + 4096 + 7, 7],
        [9000 + 56, at + 4096 + 14, 7],
        [9000 + 14, beside + 4096, 7],
        [20_000 + 192, at + 8192, 64],
    ]
    assert len(copies(PARTS, [])) == 0
    assert len(copies(PARTS, [job(Blocks(0, 0, ()))])) == 0


def test_block_ids_may_be_an_array():
    lease = Lease(np.zeros(SHARD.nbytes, np.uint8), SHARD, (0,))
    listed, packed = ([CopyJob([Blocks(0, 1, ids)], lease)] for ids in ((5, 3), np.array([5, 3], np.intp)))
    assert (
        block_rows(packed, 0).tolist()
        == block_rows(listed, 0).tolist()
        == [[5, address_of(lease), 1], [3, address_of(lease), 2]]
    )
    assert len(block_rows([CopyJob([Blocks(0, 0, np.zeros(0, np.intp))], lease)], 0)) == 0


def test_neighbouring_blocks_are_one_copy_unless_the_engine_leaves_gaps():
    rows = merged(copies(PARTS, [one := job(Blocks(0, 0, (5, 6, 7, 3)))]))
    at = address_of(one.lease)
    assert rows.tolist() == [
        [1000 + 5 * 24, at, 72],
        [1000 + 3 * 24, at + 72, 24],
        *([5000 + 100 * block, at + 96 + 40 * place, 40] for place, block in enumerate((5, 6, 7, 3))),
        [9000 + 35, at + 4096, 21],
        [9000 + 21, at + 4096 + 21, 7],
    ]


@st.composite
def some_rows(draw: st.DrawFn) -> np.ndarray:
    """Copies among which many go on where the last one ended; their places ascend and do not overlap."""
    rows, page, place = [], 100, 5000
    for _ in range(draw(st.integers(0, 12))):
        page = page if draw(st.booleans()) else draw(st.integers(0, 4000))
        place += draw(st.sampled_from([0, 0, 3]))
        nbytes = draw(st.integers(1, 9))
        rows.append((page, place, nbytes))
        page, place = page + nbytes, place + nbytes
    return np.array(rows, np.int64).reshape(-1, 3)


def byte_pairs(rows: np.ndarray) -> list[tuple[int, int]]:
    return [(page + i, place + i) for page, place, nbytes in rows.tolist() for i in range(nbytes)]


@given(some_rows())
def test_merging_moves_the_same_bytes_in_as_few_copies_as_there_are_runs(rows: np.ndarray):
    fewer = merged(rows)
    assert byte_pairs(fewer) == byte_pairs(rows)
    for (page, place, nbytes), (next_page, next_place, _) in zip(fewer.tolist(), fewer.tolist()[1:], strict=False):
        assert (page + nbytes, place + nbytes) != (next_page, next_place)


@given(some_rows(), st.lists(st.integers(4990, 5120), max_size=6, unique=True).map(sorted))
def test_cutting_moves_the_same_bytes_and_crosses_no_edge(rows: np.ndarray, edges: list[int]):
    pieces = cut(rows, edges)
    assert byte_pairs(pieces) == byte_pairs(rows)
    assert (pieces[:, 2] > 0).all()
    for _, place, nbytes in pieces.tolist():
        assert not [edge for edge in edges if place < edge < place + nbytes]
    assert len(pieces) <= len(rows) + len(edges)


def test_edges_are_where_another_piece_begins():
    one, two = job(pieces=(0, 4096)), job(pieces=(0,))
    assert edges_of([one, two]) == [address_of(one.lease) + 4096]
