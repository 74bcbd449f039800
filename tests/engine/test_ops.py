"""From tokens and tables to copies: pure, so every case is a line."""

from __future__ import annotations

import pytest

from kvkeep.core.layout import GroupLayout, LayerLayout, ShardLayout
from kvkeep.engine.plan import LoadOp
from kvkeep.engine.scheduler.ops import advance, aligned, gather_op, rewind, scatter_ops
from kvkeep.engine.scheduler.request import Match, OpenChunk
from kvkeep.transfer.transfer import Blocks
from kvkeep.wire.messages import StoreLease

LAYERS = (LayerLayout("l", (64,)),)


def shard(*groups: tuple[int, int], chunk_tokens: int = 16) -> ShardLayout:
    """A shard with groups of (block_tokens, window)."""
    return ShardLayout(chunk_tokens, tuple(GroupLayout(tokens, window, LAYERS) for tokens, window in groups))


def match(chunks: int, first: int = 0) -> Match:
    return Match(first, StoreLease(b"boot", 1), offsets=range(1000, 1000 + chunks), hits=chunks)


def table(tokens: int, block_tokens: int, base: int = 1) -> list[int]:
    return list(range(base, base + -(-tokens // block_tokens)))


def blocks_of(ops: list[LoadOp]) -> list[tuple[int, tuple[Blocks, ...]]]:
    return [(op.offset, op.blocks) for op in ops]


# ---- loads -----------------------------------------------------------------------------------------------------


def test_whole_chunks_are_loaded_block_by_block_from_their_own_places() -> None:
    ops = scatter_ops(shard((4, 0)), "r", match(2), (0, 32), tables=[table(40, 4)])
    assert ops == [
        LoadOp(b"boot", "r", 0, 1000, blocks=(Blocks(0, 0, (1, 2, 3, 4)),)),
        LoadOp(b"boot", "r", 16, 1001, blocks=(Blocks(0, 0, (5, 6, 7, 8)),)),
    ]


def test_a_load_starts_at_the_first_block_that_the_engine_lacks() -> None:
    ops = scatter_ops(shard((4, 0)), "r", match(2), (8, 32), tables=[table(40, 4)])
    assert blocks_of(ops) == [(1000, (Blocks(0, 2, (3, 4)),)), (1001, (Blocks(0, 0, (5, 6, 7, 8)),))]
    assert [op.start for op in ops] == [8, 16]


def test_the_match_may_begin_before_the_load() -> None:
    ops = scatter_ops(shard((4, 0)), "r", match(3, first=1), (32, 64), tables=[table(64, 4)])
    assert blocks_of(ops) == [
        (1001, (Blocks(0, 0, (9, 10, 11, 12)),)),
        (1002, (Blocks(0, 0, (13, 14, 15, 16)),)),
    ]


@pytest.mark.parametrize(
    ("span", "blocks"),
    [
        ((0, 512), [(0, (0, 16)), (1, (0, 16))]),
        ((272, 512), [(1, (1, 16))]),  # block 16, tokens 256 to 271, is the engine's own and is not written
        ((0, 511), [(0, (0, 16)), (1, (0, 16))]),  # the last block comes whole, the engine computes its last token
    ],
)
def test_a_prompt_of_two_chunks_and_a_rest(span: tuple[int, int], blocks: list[tuple[int, tuple[int, int]]]) -> None:
    ops = scatter_ops(shard((16, 0), chunk_tokens=256), "r", match(2), span, tables=[table(700, 16, base=100)])
    assert blocks_of(ops) == [
        (1000 + chunk, (Blocks(0, first, tuple(100 + chunk * 16 + place for place in range(first, end))),))
        for chunk, (first, end) in blocks
    ]


@pytest.mark.parametrize("end", [29, 30, 31, 32])
def test_the_last_block_is_copied_whole(end: int) -> None:
    ops = scatter_ops(shard((4, 0)), "r", match(2), (0, end), tables=[table(32, 4)])
    assert ops[-1].blocks == (Blocks(0, 0, (5, 6, 7, 8)),)


def test_blocks_behind_the_end_are_left_alone() -> None:
    ops = scatter_ops(shard((4, 0)), "r", match(2), (0, 21), tables=[table(40, 4)])
    assert ops[-1].blocks == (Blocks(0, 0, (5, 6)),)


@pytest.mark.parametrize(
    ("window", "first_seen_block"),
    [(1, 8), (2, 7), (4, 7), (5, 7), (6, 6), (9, 6), (10, 5), (32, 0), (33, 0), (1000, 0)],
)
def test_of_a_window_only_what_the_next_token_sees(window: int, first_seen_block: int) -> None:
    # 32 tokens in blocks of 4: the token at 32 sees tokens 33 - window to 31
    ops = scatter_ops(shard((4, window)), "r", match(2), (0, 32), tables=[table(40, 4)])
    loaded = [block_id for op in ops for run in op.blocks for block_id in run.block_ids]
    assert loaded == list(range(first_seen_block + 1, 9))
    assert [op.offset for op in ops] == [1000, 1001], "a chunk without a block to copy still counts as loaded"


def test_the_null_blocks_of_a_window_are_left_out() -> None:
    ops = scatter_ops(shard((4, 100)), "r", match(2), (0, 32), tables=[[0, 0, 0, 0, 0, 6, 7, 8]])
    assert blocks_of(ops) == [(1000, ()), (1001, (Blocks(0, 1, (6, 7, 8)),))]


def test_groups_have_their_own_block_sizes_and_windows() -> None:
    ops = scatter_ops(shard((8, 0), (4, 6)), "r", match(2), (0, 32), tables=[table(32, 8), [0] * 6 + [60, 61]])
    assert blocks_of(ops) == [
        (1000, (Blocks(0, 0, (1, 2)),)),
        (1001, (Blocks(0, 0, (3, 4)), Blocks(1, 2, (60, 61)))),
    ]


@pytest.mark.parametrize(
    ("computed", "groups", "right"),
    [
        (0, [(16, 0)], True),
        (16, [(16, 0)], True),
        (8, [(16, 0)], False),
        (8, [(8, 0), (16, 0)], False),
        (8, [(4, 9)], True),
    ],
)
def test_a_load_begins_on_a_boundary_of_every_group(computed: int, groups: list[tuple[int, int]], right: bool) -> None:
    assert aligned(shard(*groups, chunk_tokens=32), computed) is right


# ---- stores ----------------------------------------------------------------------------------------------------


def opened(number: int, groups: int = 1) -> OpenChunk:
    return OpenChunk(number, StoreLease(b"boot", 7), 0, 4096, next_slots=[0] * groups)


def test_a_group_without_a_window_is_gathered_once_when_it_is_full() -> None:
    chunk, tables = opened(1), [table(40, 4)]
    assert [gather_op(shard((4, 0)), chunk, final, tables) for final in (0, 16, 17, 31)] == [None] * 4
    op = gather_op(shard((4, 0)), chunk, 32, tables)
    assert op is not None
    assert (op.offset, op.blocks, op.seal) == (4096, (Blocks(0, 0, (5, 6, 7, 8)),), True)
    advance(chunk, op, step=3)
    assert chunk.sealed_in == 3
    rewind(chunk)
    assert (chunk.next_slots, chunk.sealed_in) == ([0], 0)
    assert gather_op(shard((4, 0)), chunk, 40, tables) == op


def test_a_window_is_gathered_as_its_blocks_fill_and_the_rest_with_the_seal() -> None:
    both = shard((8, 0), (4, 6))
    chunk, tables = opened(0, groups=2), [table(16, 8), table(16, 4, base=50)]
    steps = []
    for step, final in enumerate((3, 4, 11, 12, 13, 16), start=1):
        tables[1][: max(0, final - 12) // 4] = [0] * (max(0, final - 12) // 4)  # what leaves the window is freed
        op = gather_op(both, chunk, final, tables)
        steps.append(op and (op.blocks, op.seal))
        if op is not None:
            advance(chunk, op, step)
    assert steps == [
        None,
        ((Blocks(1, 0, (50,)),), False),
        ((Blocks(1, 1, (51,)),), False),
        ((Blocks(1, 2, (52,)),), False),
        None,
        ((Blocks(0, 0, (1, 2)), Blocks(1, 3, (53,))), True),
    ]
    assert chunk.sealed_in == 6


@pytest.mark.parametrize("gone", [[0, 51, 52, 53], [50, 0, 52, 53], [50, 51, 52]])
def test_a_block_that_is_gone_before_it_was_gathered_ends_the_chunk(gone: list[int]) -> None:
    with pytest.raises(LookupError, match="group 1 no longer has all blocks of chunk 0"):
        gather_op(shard((8, 0), (4, 6)), opened(0, groups=2), 16, [table(16, 8), gone])
