"""Reads the pages of an engine's cache as plain bytes, whatever tensors hold them.

Any cache whose pages are dense pieces of memory works: blocks first (vLLM's CPU backend, MLA), K and V apart
(flash-attention), any order of the inner dimensions. Bytes are kept as they
are, whatever they mean. Knows nothing about chunks' memory or who copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from kvkeep.core.layout import GroupLayout, LayerLayout, ShardLayout
from kvkeep.errors import LayoutMismatch


class GroupCaches(NamedTuple):
    """What an engine registers of one group: its layers' tensors by name, sizes in blocks and tokens (0: no window)."""

    caches: Mapping[str, torch.Tensor]
    num_blocks: int
    block_tokens: int
    window: int


def page_rows(name: str, cache: torch.Tensor, num_blocks: int) -> list[torch.Tensor]:
    """A layer's pages as uint8 tensors (num_blocks, bytes of a part), one a part, sharing the cache's memory.

    The blocks are the first dimension, or the second behind one of size 2 (K and V). An engine may keep a block as
    several kernel blocks; then its page is that many neighbouring ones.
    """
    whole = cache.shape[0] >= num_blocks and cache.shape[0] % num_blocks == 0
    second = cache.shape[1] if cache.dim() > 2 and cache.shape[0] == 2 else 0
    halves = second >= num_blocks and second % num_blocks == 0
    if whole and halves:
        raise LayoutMismatch(f"{name}: shape {tuple(cache.shape)} can be read in two ways with {num_blocks} blocks")
    if whole:
        parts = [cache]
    elif halves:
        parts = [cache[0], cache[1]]
    else:
        raise LayoutMismatch(f"{name}: shape {tuple(cache.shape)} has no dimension of {num_blocks} blocks")
    return [_rows(name, part, num_blocks) for part in parts]


def _rows(name: str, part: torch.Tensor, num_blocks: int) -> torch.Tensor:
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
    storage = storage_of(part, torch.uint8)
    start = part.storage_offset() * part.element_size()
    shape, strides = (num_blocks, nbytes * kernel_blocks), (stride * kernel_blocks, 1)
    rows: torch.Tensor = storage.as_strided(shape, strides, start)
    return rows


def storage_of(cache: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A cache's whole storage, which may be written to in place, in inference mode or not, wherever it was made."""
    with torch.inference_mode(False):
        return torch.empty(0, dtype=dtype, device=cache.device).set_(cache.untyped_storage())


def _dense(page: torch.Tensor) -> bool:
    """Whether the elements fill one piece of memory, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(page.stride(), page.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def across_layers(group: GroupCaches) -> GroupCaches:
    """The group with one page a block where a block has the pages of all its layers side by side; else as it is.

    So do vLLM's block-outermost layouts (BLHNC and its like). It is one piece to copy, but layers are no longer apart.
    """
    caches = list(group.caches.values())
    first, nbytes = caches[0], sum(cache[0].numel() * cache.element_size() for cache in caches)
    start = min(cache.storage_offset() * cache.element_size() for cache in caches)
    stride = first.stride(0) * first.element_size()
    alike = all(
        cache.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and (cache.shape[0], cache.stride(0) * cache.element_size()) == (group.num_blocks, stride)
        for cache in caches
    )
    if len(caches) < 2 or not alike or nbytes > stride or not _fill(caches, start, nbytes):
        return group
    blocks = storage_of(first, torch.uint8).as_strided((group.num_blocks, nbytes), (stride, 1), start)
    names = list(group.caches)
    return group._replace(caches={f"{names[0]} to {names[-1]}": blocks})


def _fill(caches: Sequence[torch.Tensor], start: int, nbytes: int) -> bool:
    """Whether the pages of one block hold each of these bytes of their storage once, and no other."""
    used = np.zeros(nbytes, np.uint8)
    for cache in caches:
        size, page = cache.element_size(), cache[0]
        at = cache.storage_offset() * size - start
        if at + size * (1 + sum((n - 1) * step for n, step in zip(page.shape, page.stride(), strict=True))) > nbytes:
            return False
        shape, steps = (*page.shape, size), (*(step * size for step in page.stride()), 1)
        np.lib.stride_tricks.as_strided(used[at:], shape, steps)[...] += 1
    return bool((used == 1).all())


def group_rows(group: GroupCaches) -> list[list[torch.Tensor]]:
    """The pages of every layer of a group, part by part."""
    return [page_rows(name, cache, group.num_blocks) for name, cache in group.caches.items()]


def shard_of(
    groups: Sequence[GroupCaches], rows: Sequence[Sequence[Sequence[torch.Tensor]]], chunk_tokens: int
) -> ShardLayout:
    """The layout of a chunk's shard that holds these pages."""
    layouts = []
    for group, layers in zip(groups, rows, strict=True):
        sizes = [
            LayerLayout(name, tuple(part.shape[1] for part in parts))
            for name, parts in zip(group.caches, layers, strict=True)
        ]
        layouts.append(GroupLayout(group.block_tokens, group.window, tuple(sizes)))
    return ShardLayout(chunk_tokens, tuple(layouts))
