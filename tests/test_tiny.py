"""kvkeep in ten lines: keep the KV cache of a prompt, give it back into other blocks, compare the bytes.

Read this test first. `open_cache` starts a store process, which owns the memory; `store` copies the blocks of a prompt
into it, `retrieve` copies them back. vLLM's connector goes the same way, with a scheduler between.
"""

from __future__ import annotations

import pytest
import torch

from kvkeep import Config, GroupCaches, Model, open_cache

BLOCK_TOKENS, NUM_BLOCKS = 16, 32


@pytest.mark.process
def test_what_was_kept_comes_back() -> None:
    # an engine's paged cache: for each of 2 layers K and V, in blocks of 16 tokens, 2 heads of 8 numbers
    caches = {f"layer {n}": torch.randn(2, NUM_BLOCKS, BLOCK_TOKENS, 2, 8) for n in range(2)}
    group = GroupCaches(caches, NUM_BLOCKS, BLOCK_TOKENS, window=0)
    prompt = list(range(100))  # token ids; the engine computed their KV into the blocks 1 to 7

    with open_cache([group], Model("tiny"), Config(pool_size="16 MiB", chunk_tokens=32)) as cache:
        assert cache.store(prompt, [[1, 2, 3, 4, 5, 6, 7]]) == 96  # three whole chunks of 32 tokens
        assert cache.lookup(prompt) == 96
        arrived = cache.retrieve(prompt, [[11, 12, 13, 14, 15, 16, 17]])
        assert arrived.sum() == 96  # true for each token whose bytes are there: the engine computes only the last 4
        assert not cache.retrieve([7, *prompt], [[21, 22, 23, 24, 25, 26, 27]]).any(), "another text is a miss"

    for layer in caches.values():
        assert torch.equal(layer[:, 11:17], layer[:, 1:7])
