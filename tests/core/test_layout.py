from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.core.layout import ChunkLayout, GroupLayout, LayerLayout, ShardLayout, chunk_tokens_for, padded_nbytes
from kvkeep.core.units import ALIGN_NBYTES

BLOCK_SIZES = (1, 3, 16, 32, 64, 784)
layers = st.lists(st.integers(1, 9000), min_size=1, max_size=2).map(lambda parts: LayerLayout("l", tuple(parts)))
groups = st.builds(
    GroupLayout,
    block_tokens=st.sampled_from(BLOCK_SIZES),
    window=st.sampled_from((0, 128)),
    layers=st.lists(layers, min_size=1, max_size=4).map(tuple),
)


@st.composite
def chunks(draw: st.DrawFn) -> ChunkLayout:
    by_rank = draw(st.lists(st.lists(groups, min_size=1, max_size=3).map(tuple), min_size=1, max_size=3))
    sizes = [group.block_tokens for rank in by_rank for group in rank]
    tokens = chunk_tokens_for(draw(st.integers(1, 2000)), sizes)
    return ChunkLayout(tuple(ShardLayout(tokens, rank) for rank in by_rank))


@settings(max_examples=150, deadline=None)
@given(chunks())
def test_ranges_fill_a_chunk_without_gap_or_overlap(chunk: ChunkLayout):
    end = 0
    for rank, shard in enumerate(chunk.shards):
        assert chunk.shard_offset(rank) == end
        wanted = [(g, n) for g, group in enumerate(shard.groups) for n in range(len(group.layers))]
        assert [(one.group, one.layer) for one in shard.ranges] == wanted
        inside = 0
        for one in shard.ranges:
            group = shard.groups[one.group]
            assert one.offset == inside
            assert one.offset % ALIGN_NBYTES == 0
            assert shard.blocks(one.group) * group.block_tokens == shard.chunk_tokens
            assert one.nbytes == sum(group.layers[one.layer].part_nbytes) * shard.blocks(one.group)
            assert one.nbytes <= one.padded_nbytes < one.nbytes + ALIGN_NBYTES
            inside += one.padded_nbytes
        assert shard.nbytes == inside
        assert shard.nbytes % ALIGN_NBYTES == 0
        end += inside
    assert chunk.nbytes == end
    assert chunk.chunk_tokens == chunk.shards[0].chunk_tokens


# What one token takes in one layer: fp8 of 384 and 656 bytes (DeepSeek's with its scales), MLA in bf16, the indexer of
# DeepSeek's sparse attention, and K and V of 8 heads of 128 in bf16.
REAL_TOKENS = {"fp8": (384,), "fp8 with scales": (656,), "mla": (1152,), "indexer": (132,), "k and v": (2048, 2048)}


@st.composite
def real_groups(draw: st.DrawFn) -> GroupLayout:
    """Layers of real geometries in blocks of 1 to 256 tokens; several in one group, as MLA beside its indexer."""
    block_tokens = draw(st.sampled_from((1, 16, 64, 128, 256)))
    kinds = draw(st.lists(st.sampled_from(list(REAL_TOKENS)), min_size=1, max_size=3))
    layers = [LayerLayout(kind, tuple(block_tokens * part for part in REAL_TOKENS[kind])) for kind in kinds]
    return GroupLayout(block_tokens, draw(st.sampled_from((0, 512))), tuple(layers) * draw(st.integers(1, 3)))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(real_groups(), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4), st.data())
def test_every_range_of_every_shard_starts_at_a_4_kib_multiple_of_the_chunk(ranks, data):
    """In the chunk, and so in the pool and in a record: also where chunks are small, and in a part of a chunk."""
    sizes = [group.block_tokens for rank in ranks for group in rank]
    tokens = chunk_tokens_for(data.draw(st.integers(1, 512)), sizes)
    chunk = ChunkLayout(tuple(ShardLayout(tokens, rank) for rank in ranks))
    ends = [0]
    for rank, shard in enumerate(chunk.shards):
        for one in shard.ranges:
            layer = shard.groups[one.group].layers[one.layer]
            start = chunk.shard_offset(rank) + one.offset
            assert start % 4096 == 0
            assert start == ends[-1], "ranges overlap, or leave a gap that nobody sums"
            assert one.nbytes == tokens * sum(REAL_TOKENS[layer.name]), "a token of another size"
            ends.append(start + one.padded_nbytes)
    assert chunk.nbytes == ends[-1]


@pytest.mark.parametrize(
    ("kind", "padded"), [("fp8", 8192), ("fp8 with scales", 12288), ("mla", 20480), ("indexer", 4096)]
)
def test_a_chunk_of_one_small_block_is_padded(kind, padded):
    shard = ShardLayout(16, (GroupLayout(16, 0, (LayerLayout(kind, (16 * REAL_TOKENS[kind][0],)),) * 2),))
    assert [(one.offset, one.padded_nbytes) for one in shard.ranges] == [(0, padded), (padded, padded)]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5000), st.lists(st.sampled_from(BLOCK_SIZES), min_size=1, max_size=4))
def test_a_chunk_is_the_smallest_common_multiple_that_is_large_enough(wanted: int, sizes: list[int]):
    tokens = chunk_tokens_for(wanted, sizes)
    assert tokens >= wanted
    assert all(tokens % size == 0 for size in sizes)
    step = math.lcm(*sizes)
    assert not [n for n in range(step, tokens, step) if n >= wanted], "a smaller one would do"


@pytest.mark.parametrize(("wanted", "sizes", "tokens"), [(256, [16], 256), (256, [16, 784], 784), (100, [16, 3], 144)])
def test_known_chunk_sizes(wanted: int, sizes: list[int], tokens: int):
    assert chunk_tokens_for(wanted, sizes) == tokens


@pytest.mark.parametrize(("nbytes", "padded"), [(0, 0), (1, 4096), (4096, 4096), (4097, 8192)])
def test_padding(nbytes: int, padded: int):
    assert padded_nbytes(nbytes) == padded


@pytest.mark.parametrize("block_tokens", [48, 0, -16, 128])
def test_a_chunk_that_is_no_multiple_names_the_group(block_tokens: int):
    one = LayerLayout("l", (8,))
    with pytest.raises(ValueError, match=f"chunk_tokens 64 .* group 1's block size {block_tokens}"):
        ShardLayout(64, (GroupLayout(16, 0, (one,)), GroupLayout(block_tokens, 0, (one,))))


def test_layers_are_found_by_name_in_any_order():
    """A group has its layers together; a forward pass goes through the groups in turn."""
    first, second = (tuple(LayerLayout(name, (8,)) for name in names) for names in (("a", "c"), ("b",)))
    shard = ShardLayout(16, (GroupLayout(16, 0, first), GroupLayout(8, 0, second)))
    assert shard.in_order([]) == [0, 1, 2]
    assert shard.in_order(["a", "b", "c"]) == [0, 2, 1]
    assert shard.chosen(range(1, 3)) == list(shard.ranges[1:])
    assert shard.chosen(None) == shard.ranges
    for names in (["a"], ["a", "b", "c", "c"], ["a", "b", "x"]):
        with pytest.raises(ValueError, match="every layer is named once"):
            shard.in_order(names)
    twice = ShardLayout(16, (GroupLayout(16, 0, first), GroupLayout(8, 0, first)))
    with pytest.raises(ValueError, match="two layers have one name"):
        twice.in_order([])
