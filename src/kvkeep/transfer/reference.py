"""Gather and scatter of whole blocks with NumPy: the path on CPUs, and the oracle for every other transfer.

Knows nothing about keys, the store or requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from kvkeep.core.layout import Range, ShardLayout
from kvkeep.memory.pool import Bytes, Lease
from kvkeep.transfer.pages import GroupCaches, group_rows, shard_of
from kvkeep.transfer.transfer import Blocks, check_blocks, ranges_hold


class ReferenceTransfer:
    """Copies for one rank over registered caches.

    Raises LayoutMismatch, naming the layer, for a cache that has no dense pages; the caches must be on the CPU.
    """

    def __init__(self, groups: Sequence[GroupCaches], chunk_tokens: int) -> None:
        self._num_blocks = [group.num_blocks for group in groups]
        rows = [group_rows(group) for group in groups]
        self._shard = shard_of(groups, rows, chunk_tokens)
        self._pages = [[[part.numpy() for part in parts] for parts in layers] for layers in rows]

    @property
    def shard(self) -> ShardLayout:
        """As `Transfer.shard`."""
        return self._shard

    def check(self, blocks: Sequence[Blocks], unique: bool) -> None:
        """As `Transfer.check`."""
        check_blocks(self._shard, self._num_blocks, blocks, unique)

    def gather(self, blocks: Sequence[Blocks], lease: Lease, seal: bool, layers: range | None = None) -> bytes:
        """As `Transfer.gather`; each part of a range is summed right after its copy, while it is in the CPU's cache."""
        by_group = _indexes(blocks)
        sums: list[bytes] = []
        for one, view in zip(self._shard.chosen(layers), lease.views(layers), strict=True):
            summed = xxhash.xxh3_128()
            for pages, places in self._parts(one, view):
                for first, ids in by_group.get(one.group, ()):
                    out = places[first : first + len(ids)]
                    if pages.flags.c_contiguous:
                        # the ids were checked with the plan; 'clip' is the mode that needs no buffer
                        np.take(pages, ids, axis=0, out=out, mode="clip")
                    else:
                        out[:] = pages[ids]  # take would first copy the whole cache to close its gaps
                if seal:
                    summed.update(places.data)
            if seal:
                view[one.nbytes :] = 0
                summed.update(view[one.nbytes :].data)
                sums.append(summed.digest())
        return b"".join(sums)

    def scatter(self, lease: Lease, blocks: Sequence[Blocks], sums: bytes, layers: range | None = None) -> bool:
        """As `Transfer.scatter`."""
        views = lease.views(layers)
        if sums and not ranges_hold(views, sums):
            return False
        by_group = _indexes(blocks)
        for one, view in zip(self._shard.chosen(layers), views, strict=True):
            for first, ids in by_group.get(one.group, ()):
                for pages, places in self._parts(one, view):
                    pages[ids] = places[first : first + len(ids)]
        return True

    def _parts(self, one: Range, view: Bytes) -> Iterator[tuple[Bytes, Bytes]]:
        """The layer's pages in the engine and their places in the range, part by part: arrays of (blocks, bytes)."""
        count, start = self._shard.blocks(one.group), 0
        for pages in self._pages[one.group][one.layer]:
            end = start + count * pages.shape[1]
            yield pages, view[start:end].reshape(count, -1)
            start = end


def _indexes(blocks: Sequence[Blocks]) -> dict[int, list[tuple[int, npt.NDArray[np.intp]]]]:
    by_group: dict[int, list[tuple[int, npt.NDArray[np.intp]]]] = {}
    for group, first, block_ids in blocks:
        by_group.setdefault(group, []).append((first, np.asarray(block_ids, dtype=np.intp)))
    return by_group
