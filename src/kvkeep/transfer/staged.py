"""Gathers and scatters whole blocks on any device that torch knows, through a staging copy on the current stream.

Simple and right rather than fast: an indexed copy and a transfer for each layer. For devices that are not CUDA's, and
for memory that is not page-locked. Knows nothing about keys, the store or requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kvkeep.core.layout import Range, ShardLayout
from kvkeep.memory.pool import Bytes, Lease
from kvkeep.transfer.pages import GroupCaches, group_rows, shard_of
from kvkeep.transfer.transfer import Blocks, check_blocks, ranges_hold, seal_ranges


class StagedTransfer:
    """Copies for one rank over caches on one device.

    Both verbs return when the device has finished with the pool's memory. A scatter writes in the order of the current
    stream, so what is launched after it sees its blocks. Raises LayoutMismatch, naming the layer, for a cache that has
    no dense pages.
    """

    def __init__(self, groups: Sequence[GroupCaches], chunk_tokens: int) -> None:
        self._num_blocks = [group.num_blocks for group in groups]
        self._pages = [group_rows(group) for group in groups]
        self._shard = shard_of(groups, self._pages, chunk_tokens)
        self._device = next(iter(groups[0].caches.values())).device

    @property
    def shard(self) -> ShardLayout:
        """As `Transfer.shard`."""
        return self._shard

    def check(self, blocks: Sequence[Blocks], unique: bool) -> None:
        """As `Transfer.check`."""
        check_blocks(self._shard, self._num_blocks, blocks, unique)

    def gather(self, blocks: Sequence[Blocks], lease: Lease, seal: bool, layers: range | None = None) -> bytes:
        """As `Transfer.gather`."""
        indexes = [(run.group, run.first, self._ids(run)) for run in blocks]
        ranges, views = self._shard.chosen(layers), lease.views(layers)
        for range_, view in zip(ranges, views, strict=True):
            for group, first, ids in indexes:
                for pages, slots in self._parts(range_, view) if group == range_.group else ():
                    slots[first : first + len(ids)].copy_(pages.index_select(0, ids))
        return seal_ranges(ranges, views) if seal else b""

    def scatter(self, lease: Lease, blocks: Sequence[Blocks], sums: bytes, layers: range | None = None) -> bool:
        """As `Transfer.scatter`."""
        views = lease.views(layers)
        if sums and not ranges_hold(views, sums):
            return False
        indexes = [(run.group, run.first, self._ids(run)) for run in blocks]
        for range_, view in zip(self._shard.chosen(layers), views, strict=True):
            for group, first, ids in indexes:
                for pages, slots in self._parts(range_, view) if group == range_.group else ():
                    # not asynchronous: the pool's memory may be lent to another as soon as this returns
                    pages[ids] = slots[first : first + len(ids)].to(self._device)
        return True

    def _ids(self, blocks: Blocks) -> torch.Tensor:
        return torch.as_tensor(blocks.block_ids, dtype=torch.int64, device=self._device)

    def _parts(self, range_: Range, view: Bytes) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        count, start = self._shard.blocks(range_.group), 0
        memory = torch.from_numpy(view)
        for pages in self._pages[range_.group][range_.layer]:
            end = start + count * pages.shape[1]
            yield pages, memory[start:end].view(count, pages.shape[1])
            start = end
