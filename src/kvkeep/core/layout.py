"""How a chunk's bytes are arranged: a shard for each rank, in it a range for each layer, group by group.

Computes sizes and offsets. Knows nothing about memory, tensors, tokens' values or who reads the bytes.

A chunk is its shards, one after the other. A shard is one **range** for each layer, group by group. Every range starts
at a multiple of 4 KiB and is padded with zeros to the next. Inside a range the parts of the pages follow each other:
all K pages, then all V pages (an engine whose page is one piece has one part), each part's pages in the order of the
blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from kvkeep.core.units import ALIGN_NBYTES

VERSION = 1
"""The version of these rules: a new one whenever a byte of a chunk would lie elsewhere. Every identity has it."""


class Range(NamedTuple):
    """One layer of one group in a shard: its offset, its bytes, and its bytes with the padding."""

    group: int
    layer: int
    offset: int
    nbytes: int
    padded_nbytes: int


@dataclass(frozen=True)
class LayerLayout:
    """One layer's page of a block: `part_nbytes` are the sizes of its parts (K and V, or one packed piece)."""

    name: str
    part_nbytes: tuple[int, ...]

    @property
    def page_nbytes(self) -> int:
        """Bytes of all parts together."""
        return sum(self.part_nbytes)


@dataclass(frozen=True)
class GroupLayout:
    """A KV-cache group: its layers share a block table, blocks of `block_tokens`, and a sliding `window` (0: none)."""

    block_tokens: int
    window: int
    layers: tuple[LayerLayout, ...]


@dataclass(frozen=True)
class ShardLayout:
    """The part of a chunk that one rank holds.

    Raises ValueError if `chunk_tokens` is not a multiple of every group's block size.
    """

    chunk_tokens: int
    groups: tuple[GroupLayout, ...]

    def __post_init__(self) -> None:
        for index, group in enumerate(self.groups):
            if group.block_tokens <= 0 or self.chunk_tokens % group.block_tokens:
                raise ValueError(
                    f"chunk_tokens {self.chunk_tokens} is not a multiple of group {index}'s "
                    f"block size {group.block_tokens}"
                )

    def blocks(self, group: int) -> int:
        """How many blocks of `group` one chunk holds."""
        return self.chunk_tokens // self.groups[group].block_tokens

    @cached_property
    def ranges(self) -> tuple[Range, ...]:
        """The shard's ranges in their order, without gaps."""
        ranges: list[Range] = []
        offset = 0
        for index, group in enumerate(self.groups):
            for position, layer in enumerate(group.layers):
                nbytes = layer.page_nbytes * self.blocks(index)
                padded = padded_nbytes(nbytes)
                ranges.append(Range(index, position, offset, nbytes, padded_nbytes=padded))
                offset += padded
        return tuple(ranges)

    def chosen(self, layers: range | None) -> Sequence[Range]:
        """The ranges with these indexes; None: all."""
        return self.ranges if layers is None else [self.ranges[index] for index in layers]

    @cached_property
    def range_indexes(self) -> dict[str, int]:
        """The index of each layer's range, by the layer's name."""
        return {self.groups[range_.group].layers[range_.layer].name: index for index, range_ in enumerate(self.ranges)}

    def in_order(self, names: Sequence[str]) -> list[int]:
        """The index of each layer's range, in the order of `names` (none: as they are arranged).

        Raises ValueError unless every layer is named once, there and here.
        """
        known = self.range_indexes
        if len(known) < len(self.ranges):
            raise ValueError("two layers have one name: each is registered once, in one group")
        wrong = set(names) ^ set(known) or {name for name in names if names.count(name) > 1}
        if names and wrong:
            raise ValueError(f"every layer is named once: look at {min(wrong)!r}")
        return [known[name] for name in names or known]

    @cached_property
    def nbytes(self) -> int:
        """The shard's size with all padding."""
        return sum(range_.padded_nbytes for range_ in self.ranges)


@dataclass(frozen=True)
class ChunkLayout:
    """A whole chunk: one shard a rank, in rank order."""

    shards: tuple[ShardLayout, ...]

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk, the same for all shards."""
        return self.shards[0].chunk_tokens

    @cached_property
    def nbytes(self) -> int:
        """What one chunk takes in the pool."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def sizes(self) -> list[int]:
        """Its ranges' sizes with their padding, in order."""
        return [range_.padded_nbytes for shard in self.shards for range_ in shard.ranges]

    def shard_offset(self, rank: int) -> int:
        """Where the shard of `rank` starts in the chunk (bytes)."""
        return sum(shard.nbytes for shard in self.shards[:rank])


def padded_nbytes(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment of ranges."""
    return -(-nbytes // ALIGN_NBYTES) * ALIGN_NBYTES


def chunk_tokens_for(wanted: int, block_sizes: Iterable[int]) -> int:
    """The smallest multiple of all block sizes that is at least `wanted` tokens."""
    step = math.lcm(*block_sizes)
    return -(-wanted // step) * step
