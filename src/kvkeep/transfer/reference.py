"""Gather and scatter of whole blocks with NumPy: the path on CPUs, and the oracle for every other transfer.

Any cache whose pages are dense pieces of memory works: blocks first (vLLM's CPU backend, MLA), K and V apart
(flash-attention), any order of the inner dimensions. What a page means is nobody's business here: its bytes are kept.
Knows nothing about keys, the store or requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from kvkeep.core.layout import GroupLayout, LayerLayout, ShardLayout
from kvkeep.errors import LayoutMismatch
from kvkeep.memory.pool import Bytes, Lease
from kvkeep.transfer.transfer import Blocks, check_blocks

SUM_NBYTES = 16


class GroupCaches(NamedTuple):
    """What an engine registers of one group: its layers' tensors by name, sizes in blocks and tokens (0: no window)."""

    caches: Mapping[str, torch.Tensor]
    num_blocks: int
    block_tokens: int
    window: int


class ReferenceTransfer:
    """Copies for one rank over registered caches.

    Raises LayoutMismatch, naming the layer, for a cache that is not on the CPU or has no dense pages.
    """

    def __init__(self, groups: Sequence[GroupCaches], chunk_tokens: int) -> None:
        self._num_blocks = [group.num_blocks for group in groups]
        self._pages = [
            [page_rows(name, one, group.num_blocks) for name, one in group.caches.items()] for group in groups
        ]
        layouts = []
        for group, pages in zip(groups, self._pages, strict=True):
            layers = [
                LayerLayout(name, tuple(part.shape[1] for part in parts))
                for name, parts in zip(group.caches, pages, strict=True)
            ]
            layouts.append(GroupLayout(group.block_tokens, group.window, tuple(layers)))
        self._shard = ShardLayout(chunk_tokens, tuple(layouts))

    @property
    def shard(self) -> ShardLayout:
        """As `Transfer.shard`."""
        return self._shard

    def check(self, blocks: Sequence[Blocks], unique: bool) -> None:
        """As `Transfer.check`."""
        check_blocks(self._shard, self._num_blocks, blocks, unique)

    def gather(self, blocks: Sequence[Blocks], lease: Lease, seal: bool) -> bytes:
        """As `Transfer.gather`; a range is summed right after its copy, while it is in the CPU's cache."""
        by_group = _indexes(blocks)
        sums: list[bytes] = []
        for one, view in zip(self._shard.ranges, lease.views(), strict=True):
            for first, ids in by_group.get(one.group, ()):
                for source, target in self._parts(one.group, one.layer, view):
                    # the ids were checked with the plan; 'clip' is the mode that needs no buffer
                    np.take(source, ids, axis=0, out=target[first : first + len(ids)], mode="clip")
            if seal:
                view[one.nbytes :] = 0
                sums.append(xxhash.xxh3_128_digest(view.data))
        return b"".join(sums)

    def scatter(self, lease: Lease, blocks: Sequence[Blocks], sums: bytes) -> bool:
        """As `Transfer.scatter`."""
        views = lease.views()
        if sums and not _hold(views, sums):
            return False
        by_group = _indexes(blocks)
        for one, view in zip(self._shard.ranges, views, strict=True):
            for first, ids in by_group.get(one.group, ()):
                for target, source in self._parts(one.group, one.layer, view):
                    target[ids] = source[first : first + len(ids)]
        return True

    def _parts(self, group: int, layer: int, view: Bytes) -> list[tuple[Bytes, Bytes]]:
        """The layer's pages in the engine and in the range, part by part: arrays of (blocks, bytes)."""
        count = self._shard.blocks(group)
        parts, start = [], 0
        for pages in self._pages[group][layer]:
            nbytes = pages.shape[1]
            parts.append((pages, view[start : start + count * nbytes].reshape(count, nbytes)))
            start += count * nbytes
        return parts


def page_rows(name: str, cache: torch.Tensor, num_blocks: int) -> list[Bytes]:
    """A layer's pages as uint8 arrays (num_blocks, bytes of a part), one a part, sharing the cache's memory.

    The blocks are the first dimension, or the second behind one of size 2 (K and V). An engine may keep a block as
    several kernel blocks; then its page is that many neighbouring ones.
    """
    if cache.device.type != "cpu":
        raise LayoutMismatch(f"{name}: a cache on {cache.device} needs a device transfer, this one copies on the CPU")
    if cache.shape[0] >= num_blocks and cache.shape[0] % num_blocks == 0:
        parts = [cache]
    elif cache.dim() > 2 and cache.shape[0] == 2 and cache.shape[1] % num_blocks == 0:
        parts = [cache[0], cache[1]]
    else:
        raise LayoutMismatch(f"{name}: shape {tuple(cache.shape)} has no dimension of {num_blocks} blocks")
    return [_rows(name, part, num_blocks) for part in parts]


def _rows(name: str, part: torch.Tensor, num_blocks: int) -> Bytes:
    """`part`, whose first dimension is blocks, as (num_blocks, bytes); LayoutMismatch if its pages have gaps."""
    kernel_blocks = part.shape[0] // num_blocks
    page = part[0]
    nbytes = page.numel() * part.element_size()
    if not _dense(page):
        raise LayoutMismatch(
            f"{name}: a block of shape {tuple(page.shape)}, strides {page.stride()} is not one piece of memory"
        )
    stride = part.stride(0) * part.element_size()
    if kernel_blocks > 1 and stride != nbytes:
        raise LayoutMismatch(f"{name}: {kernel_blocks} kernel blocks of a block are not neighbours")
    storage = torch.empty(0, dtype=torch.uint8).set_(part.untyped_storage()).numpy()
    start = part.storage_offset() * part.element_size()
    rows: npt.NDArray[np.uint8] = np.lib.stride_tricks.as_strided(
        storage[start:], shape=(num_blocks, nbytes * kernel_blocks), strides=(stride * kernel_blocks, 1)
    )
    return rows


def _dense(page: torch.Tensor) -> bool:
    """Whether the elements fill one piece of memory, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(page.stride(), page.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _indexes(blocks: Sequence[Blocks]) -> dict[int, list[tuple[int, npt.NDArray[np.intp]]]]:
    by_group: dict[int, list[tuple[int, npt.NDArray[np.intp]]]] = {}
    for group, first, block_ids in blocks:
        by_group.setdefault(group, []).append((first, np.array(block_ids, dtype=np.intp)))
    return by_group


def _hold(views: Sequence[Bytes], sums: bytes) -> bool:
    """Whether every range has the sum that was taken when it was written."""
    wanted = [sums[i : i + SUM_NBYTES] for i in range(0, len(sums), SUM_NBYTES)]
    return len(wanted) == len(views) and all(
        xxhash.xxh3_128_digest(view.data) == one for view, one in zip(views, wanted, strict=True)
    )
