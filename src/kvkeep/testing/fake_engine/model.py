"""A model in integers: the "KV" of a token is computed from the token and from the KV that its layer can still see.

So whoever reads garbage computes garbage, as a real model does, and a right value proves every byte before it.
Knows nothing about requests, stores or tensors; NumPy only.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.uint64]
PARTS = 2  # K and V
_MASK = 2**64 - 1
_K1, _K2, _K3 = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93


@dataclass(frozen=True)
class GroupShape:
    """A KV-cache group: its block size and sliding window in tokens (0: none), and how many layers it has."""

    block_tokens: int
    window: int = 0
    layers: int = 1


class FakeModel:
    """`caches[group]` is uint64 (ranks, layers, PARTS, num_blocks, block_tokens): the paged cache of all ranks.

    It is shared with processes that are forked later.
    """

    def __init__(self, groups: Sequence[GroupShape], ranks: int, num_blocks: int) -> None:
        self.groups = tuple(groups)
        self.caches: list[Values] = []
        self._seeds: list[Values] = []
        self._known: dict[tuple[int, tuple[int, ...]], Values] = {}
        for number, group in enumerate(self.groups):
            lanes = (ranks, group.layers, PARTS)
            self.caches.append(_shared((*lanes, num_blocks, group.block_tokens)))
            count = ranks * group.layers * PARTS
            seeds = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(1_000_003 * (number + 1))
            self._seeds.append(seeds.reshape(lanes))

    def forward(self, tokens: Sequence[int], span: tuple[int, int], tables: Sequence[Sequence[int]]) -> None:
        """Computes tokens [start, end) from what is in the cache, and writes them there."""
        for number, group in enumerate(self.groups):
            table, size, cache = np.array(tables[number]), group.block_tokens, self.caches[number]
            for place in range(*span):
                seen = np.arange(self.first_seen(number, place), place)
                blocks = table[seen // size]
                assert (blocks != 0).all(), f"token {place} of group {number} needs a block that was given up"
                sums = cache[..., blocks, seen % size].sum(axis=-1, dtype=np.uint64)
                cache[..., table[place // size], place % size] = self._mixed(number, sums, tokens[place])

    def sample(self, length: int, tables: Sequence[Sequence[int]], vocabulary: int) -> int:
        """The token that follows `length` tokens, from the KV of the last one."""
        block, place = divmod(length - 1, self.groups[0].block_tokens)
        return int(self.caches[0][0, 0, 0, tables[0][block], place]) % vocabulary

    def expected(self, group: int, tokens: tuple[int, ...]) -> Values:
        """What a group must hold of these tokens: uint64 (ranks, layers, PARTS, tokens)."""
        have = len(tokens)
        while have and (group, tokens[:have]) not in self._known:
            have -= 1
        values = self._known[group, tokens[:have]] if have else np.zeros((*self._seeds[group].shape, 0), np.uint64)
        for place in range(have, len(tokens)):
            sums = values[..., self.first_seen(group, place) :].sum(axis=-1, dtype=np.uint64)
            value = self._mixed(group, sums, tokens[place])
            values = np.concatenate([values, value[..., None]], axis=-1)
            self._known[group, tokens[: place + 1]] = values
        return values

    def expected_block(self, group: int, prefix: tuple[int, ...]) -> Values:
        """What a full block must hold that ends `prefix`: uint64 (ranks, layers, PARTS, block_tokens)."""
        return self.expected(group, prefix)[..., -self.groups[group].block_tokens :]

    def open_blocks(self, computed: int, tables: Sequence[Sequence[int]]) -> list[Values]:
        """A copy of each group's block that holds computed tokens and has room for more."""
        found = []
        for number, group in enumerate(self.groups):
            place, filled = divmod(computed, group.block_tokens)
            if filled:
                found.append(self.caches[number][..., tables[number][place], :].copy())
        return found

    def first_seen(self, group: int, place: int) -> int:
        """The first token that the token at `place` can see."""
        window = self.groups[group].window
        return max(0, place - window + 1) if window else 0

    def _mixed(self, group: int, sums: Values, token: int) -> Values:
        mixed = (sums ^ self._seeds[group]) * np.uint64(_K1) + np.uint64((token + 1) * _K2 & _MASK)
        mixed ^= mixed >> np.uint64(31)
        mixed *= np.uint64(_K3)
        mixed ^= mixed >> np.uint64(29)
        return mixed


def _shared(shape: tuple[int, ...]) -> Values:
    """Zeros in shared memory."""
    return np.frombuffer(mmap.mmap(-1, math.prod(shape) * 8), np.uint64).reshape(shape)
