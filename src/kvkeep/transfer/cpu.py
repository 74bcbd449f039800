"""Gathers and scatters whole blocks with NumPy: the path on CPUs, and what every other transfer is tested against.

Knows nothing about keys, the store or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvkeep.core.layout import ShardLayout
from kvkeep.memory.pool import Bytes, Lease
from kvkeep.transfer.pages import GroupCaches, group_rows, shard_of
from kvkeep.transfer.transfer import Blocks, check_blocks, ranges_hold, seal_range


class _Part(NamedTuple):
    """One part of a layer's pages: the engine's array of (blocks, bytes), and where a chunk's are in their range."""

    pages: Bytes
    start: int
    end: int
    dense: bool  # no gaps between the engine's pages


class ReferenceTransfer:
    """Copies for one rank over registered caches.

    Raises LayoutMismatch, naming the layer, for a cache that has no dense pages; the caches must be on the CPU.
    """

    def __init__(self, groups: Sequence[GroupCaches], chunk_tokens: int) -> None:
        self._num_blocks = [group.num_blocks for group in groups]
        rows = [group_rows(group) for group in groups]
        self._shard = shard_of(groups, rows, chunk_tokens)
        self._parts = [
            [_parts([part.numpy() for part in parts], self._shard.blocks(group)) for parts in layers]
            for group, layers in enumerate(rows)
        ]

    @property
    def shard(self) -> ShardLayout:
        """As `Transfer.shard`."""
        return self._shard

    def check(self, blocks: Sequence[Blocks], unique: bool) -> None:
        """As `Transfer.check`."""
        check_blocks(self._shard, self._num_blocks, blocks, unique)

    def gather(self, blocks: Sequence[Blocks], lease: Lease, seal: bool, layers: range | None = None) -> bytes:
        """As `Transfer.gather`; each range is summed right after its copy, while it is in the CPU's cache."""
        by_group = _indexes(blocks)
        sums: list[bytes] = []
        for range_, view in zip(self._shard.chosen(layers), lease.views(layers), strict=True):
            for pages, start, end, dense in self._parts[range_.group][range_.layer]:
                slots = view[start:end].reshape(-1, pages.shape[1])
                for first, ids in by_group.get(range_.group, ()):
                    out = slots[first : first + len(ids)]
                    if dense:
                        # the ids were checked with the plan; 'clip' is the mode that needs no buffer
                        pages.take(ids, 0, out, "clip")
                    else:
                        out[:] = pages[ids]  # take would first copy the whole cache to close its gaps
            if seal:
                sums.append(seal_range(range_, view))
        return b"".join(sums)

    def scatter(self, lease: Lease, blocks: Sequence[Blocks], sums: bytes, layers: range | None = None) -> bool:
        """As `Transfer.scatter`."""
        views = lease.views(layers)
        if sums and not ranges_hold(views, sums):
            return False
        by_group = _indexes(blocks)
        for range_, view in zip(self._shard.chosen(layers), views, strict=True):
            for pages, start, end, _ in self._parts[range_.group][range_.layer]:
                slots = view[start:end].reshape(-1, pages.shape[1])
                for first, ids in by_group.get(range_.group, ()):
                    pages[ids] = slots[first : first + len(ids)]
        return True


def _parts(pages: Sequence[Bytes], count: int) -> list[_Part]:
    """The parts of a layer whose range holds `count` blocks."""
    ends = list(accumulate(count * part.shape[1] for part in pages))
    return [
        _Part(part, end - count * part.shape[1], end, part.flags.c_contiguous)
        for part, end in zip(pages, ends, strict=True)
    ]


def _indexes(blocks: Sequence[Blocks]) -> dict[int, list[tuple[int, npt.NDArray[np.intp]]]]:
    by_group: dict[int, list[tuple[int, npt.NDArray[np.intp]]]] = {}
    for group, first, block_ids in blocks:
        by_group.setdefault(group, []).append((first, np.asarray(block_ids, dtype=np.intp)))
    return by_group
