"""Checks that the pool's chunks and the engine's blocks hold what the fake model computes.

Knows nothing about scheduling or the store.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvkeep.core.layout import ChunkLayout
from kvkeep.testing.fake_engine.model import PARTS, FakeModel
from kvkeep.testing.fake_engine.request import FakeRequest


def check_chunk(model: FakeModel, layout: ChunkLayout, chunk: npt.NDArray[np.uint8], prefix: tuple[int, ...]) -> None:
    """AssertionError unless `chunk` starts with the chunk that ends `prefix`, padding included."""
    tokens = layout.chunk_tokens
    for rank, shard in enumerate(layout.shards):
        base = layout.shard_offset(rank)
        for range_ in shard.ranges:
            right = model.expected(range_.group, prefix)[rank, range_.layer, :, -tokens:]
            raw = chunk[base + range_.offset : base + range_.offset + range_.nbytes]
            held = raw.view(np.uint64).reshape(PARTS, tokens)
            assert (held == right).all(), f"the pool's chunk that ends {prefix} is wrong on rank {rank}"
            padding = chunk[base + range_.offset + range_.nbytes : base + range_.offset + range_.padded_nbytes]
            assert not padding.any(), "padding is not zero"


def check_table(model: FakeModel, request: FakeRequest, group: int) -> None:
    """AssertionError unless a request has all blocks of a group that its next token sees, and they are right."""
    right = model.expected(group, tuple(request.tokens[: request.computed]))
    cache, size = model.caches[group], model.groups[group].block_tokens
    seen = np.arange(model.first_seen(group, request.computed), request.computed)
    blocks = np.array(request.tables[group])[seen // size]
    assert (blocks != 0).all(), f"{request.name}: group {group} gave up a block that is still seen"
    held = cache[..., blocks, seen % size]
    assert (held == right[..., seen]).all(), f"{request.name}: a computed block of group {group} is wrong"
