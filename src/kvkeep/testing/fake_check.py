"""Whether a chunk in the pool holds what a fake model computes, as integers.

Knows nothing about requests, scheduling or the store.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvkeep.core.layout import ChunkLayout
from kvkeep.testing.fake_model import PARTS, FakeModel


def check_chunk(model: FakeModel, layout: ChunkLayout, chunk: npt.NDArray[np.uint8], prefix: tuple[int, ...]) -> None:
    """AssertionError unless `chunk` starts with the chunk that ends `prefix`, padding included."""
    tokens = layout.chunk_tokens
    for rank, shard in enumerate(layout.shards):
        base = layout.shard_offset(rank)
        for one in shard.ranges:
            right = model.expected(one.group, prefix)[rank, one.layer, :, -tokens:]
            raw = chunk[base + one.offset : base + one.offset + one.nbytes]
            held = raw.view(np.uint64).reshape(PARTS, tokens)
            assert (held == right).all(), f"the pool's chunk that ends {prefix} is wrong on rank {rank}"
            padding = chunk[base + one.offset + one.nbytes : base + one.offset + one.padded_nbytes]
            assert not padding.any(), "padding is not zero"
