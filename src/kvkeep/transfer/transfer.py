"""The `Transfer` interface: copies between the blocks of an engine's paged cache and a chunk's shard in the pool.

The checks that every transfer makes are here too. Knows nothing about devices, leases' owners or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from kvkeep.core.layout import Range, ShardLayout
from kvkeep.core.units import SUM_NBYTES
from kvkeep.errors import BlockError
from kvkeep.memory.page_lock import PinCalls
from kvkeep.memory.pool import Bytes, Lease

NULL_BLOCK = 0


class Blocks(NamedTuple):
    """A run of a chunk's blocks in one group: the engine's block for each slot from `first` on."""

    group: int
    first: int
    block_ids: Sequence[int] | npt.NDArray[np.intp]


class Transfer(Protocol):
    """Moves whole blocks of one rank. Both verbs have finished with source and destination when they return.

    `layers` are the numbers of the shard's ranges that are moved (None: all), and sums are those of these ranges.
    """

    @property
    def shard(self) -> ShardLayout:
        """How this rank's part of a chunk is arranged."""

    def gather(self, blocks: Sequence[Blocks], lease: Lease, seal: bool, layers: range | None = None) -> bytes:
        """Copies blocks into a chunk; with `seal` returns the 16-byte sum of every range in order, else nothing."""

    def scatter(self, lease: Lease, blocks: Sequence[Blocks], sums: bytes, layers: range | None = None) -> bool:
        """Copies a chunk's blocks out; with `sums` it verifies every range first and copies nothing if one differs."""

    def check(self, blocks: Sequence[Blocks], unique: bool) -> None:
        """BlockError if a block does not exist, is the null block, or (with `unique`) is named twice."""


class Opened(NamedTuple):
    """A transfer, what page-locks the pool for it (None: nothing needs to), and a text about it for people.

    `states` copies the states of a model that has recurrent layers: a state is one block of each of its groups.
    """

    transfer: Transfer
    pin_calls: PinCalls | None = None
    text: str = ""
    states: Transfer | None = None


def check_blocks(shard: ShardLayout, num_blocks: Sequence[int], blocks: Sequence[Blocks], unique: bool) -> None:
    """The check of `Transfer.check` for a cache that has `num_blocks` of each group.

    A plan is checked once, before anything is copied: NumPy's clipping take would silently read another block.
    """
    for group, first, block_ids in blocks:
        end = first + len(block_ids)
        if first < 0 or end > shard.blocks(group):
            raise BlockError(f"slot {first if first < 0 else end} is outside of a chunk's blocks of group {group}")
    for group, count in enumerate(num_blocks):
        runs = [np.asarray(run.block_ids, np.intp) for run in blocks if run.group == group]
        ids = np.concatenate(runs) if runs else np.zeros(0, np.intp)
        wrong = (ids <= 0) | (ids >= count)
        if wrong.any():
            block_id = int(ids[wrong][0])
            what = "is the null block" if block_id == NULL_BLOCK else "does not exist"
            raise BlockError(f"block {block_id} of group {group} {what}")
        if unique and ids.size and (named := np.bincount(ids)).max() > 1:
            raise BlockError(f"block {named.argmax()} of group {group} is named twice")


def seal_range(range_: Range, view: Bytes) -> bytes:
    """Zero the padding of a filled range and return its sum."""
    if range_.nbytes < range_.padded_nbytes:
        view[range_.nbytes :] = 0
    return xxhash.xxh3_128_digest(view.data)


def seal_ranges(ranges: Sequence[Range], views: Sequence[Bytes]) -> bytes:
    """Seal all ranges in order and return their sums: the end of a gather that completes a chunk."""
    return b"".join(seal_range(range_, view) for range_, view in zip(ranges, views, strict=True))


def ranges_hold(views: Sequence[Bytes], sums: bytes) -> bool:
    """Whether every range has the sum that was taken when it was written."""
    wanted = [sums[i : i + SUM_NBYTES] for i in range(0, len(sums), SUM_NBYTES)]
    return len(wanted) == len(views) and all(
        xxhash.xxh3_128_digest(view.data) == sum_ for view, sum_ in zip(views, wanted, strict=True)
    )
