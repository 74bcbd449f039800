"""Moves K to another position: R(q) R(p)^-1 K, pair by pair, so that a chunk can be used where it was not computed.

The torch path for any device; `rope/scatter` does the same in Triton, on the way into the blocks. Only K rotates: V
carries no position. The result is K as the model would compute it at q from the same hidden states; what a token saw
before it does not change. Knows nothing about chunks, leases or which chunks are moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from kvkeep.errors import LayoutMismatch
from kvkeep.transfer.device.streams import upload

_TOKENS = 4096  # whose angles are computed at once: in double precision they are large
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Pairing(NamedTuple):
    """Which dimensions of a head rotate together: the first at `start`, neighbours (GPT-J) or halves apart (NeoX)."""

    interleaved: bool = False
    start: int = 0


class Rotation(NamedTuple):
    """The rotation of each token and pair: cosine and sine, float32 [tokens, pairs]."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotation_between(old: tuple[torch.Tensor, torch.Tensor], new: tuple[torch.Tensor, torch.Tensor]) -> Rotation:
    """The rotation of tokens from old to new: (positions [tokens], frequencies [pairs]) each.

    The two frequencies differ only for a scaling that depends on the length. Angles are rounded to float32 one by one,
    as models round them, and subtracted without a further loss.
    """
    shape = (len(old[0]), len(old[1]))
    rotation = Rotation(*(torch.empty(shape, dtype=torch.float32, device=old[1].device) for _ in range(2)))
    for at in range(0, shape[0], _TOKENS):
        tokens = slice(at, at + _TOKENS)
        angles = [positions[tokens].to(torch.float32)[:, None] * pace[None, :] for positions, pace in (old, new)]
        by = angles[1].double() - angles[0].double()
        rotation.cos[tokens], rotation.sin[tokens] = by.cos(), by.sin()
    return rotation


def rotate(keys: torch.Tensor, rotation: Rotation, pairing: Pairing) -> torch.Tensor:
    """`keys` [tokens, heads, head_size], rotated; float32 inside, rounded once to the dtype of `keys`.

    What a partial rotary leaves alone is returned bit for bit. LayoutMismatch for more pairs than a head has.
    """
    check_keys(keys)
    pairs = rotation.cos.shape[1]
    end = pairing.start + 2 * pairs
    if end > keys.shape[-1]:
        raise LayoutMismatch(f"{pairs} pairs from {pairing.start} on do not fit a head of {keys.shape[-1]}")
    out = keys.clone()
    split, axis = ((pairs, 2), -1) if pairing.interleaved else ((2, pairs), -2)
    first, second = out[..., pairing.start : end].unflatten(-1, split).unbind(axis)
    cos, sin = rotation.cos[:, None, :], rotation.sin[:, None, :]
    x, y = first.float(), second.float()
    rotated = x * cos - y * sin, y * cos + x * sin  # x and y may be the memory that is written next
    first.copy_(rotated[0])
    second.copy_(rotated[1])
    return out


def rotate_blocks(pages: torch.Tensor, block_ids: Sequence[int], rotation: Rotation, pairing: Pairing) -> None:
    """Rotates K in place in these blocks of `pages` [blocks, tokens, heads, head_size] (see `key_pages`).

    The tokens of `rotation` are those of the blocks, in their order; a block must be named once.
    """
    ids = upload(np.array(block_ids, np.int64), pages.device)
    keys = pages.index_select(0, ids)
    pages[ids] = rotate(keys.flatten(0, 1), rotation, pairing).view_as(keys)


def key_pages(name: str, cache: torch.Tensor, axes: str, packed: str = "", half: int = 0) -> torch.Tensor:
    """K of a layer's cache as a view [blocks, tokens, heads, head_size]; with `half` 1 V, where `axes` have it.

    `axes` names the cache's dimensions: b(locks), t(okens), h(eads), d (of a head), 2 (K, then V), e.g. "2bthd" for
    flash-attention, "btd" for MLA (one head). `packed` says what packs an engine's K where something does (an
    instruction set, say): then its bytes are no numbers in a row, and LayoutMismatch says so.
    """
    if packed:
        raise LayoutMismatch(
            f"{name}: K cannot be moved: {packed} packs its bytes into tiles, so no head lies in a row"
        )
    check_keys(cache, name)
    if sorted(axes) not in (sorted("2bthd"), sorted("bthd"), sorted("btd")) or len(axes) != cache.dim():
        raise LayoutMismatch(f"{name}: K cannot be moved: axes {axes!r} do not describe shape {tuple(cache.shape)}")
    if "2" in axes and cache.shape[axes.index("2")] != 2:
        raise LayoutMismatch(f"{name}: K cannot be moved: axes {axes!r} do not describe shape {tuple(cache.shape)}")
    if "2" in axes:
        cache, axes = cache.select(axes.index("2"), half), axes.replace("2", "")
    if "h" not in axes:
        cache, axes = cache.unsqueeze(-1), axes + "h"
    return cache.permute([axes.index(letter) for letter in "bthd"])


def check_keys(keys: torch.Tensor, name: str = "K") -> None:
    """LayoutMismatch for a dtype that cannot be rotated: FP8 would be rounded a second time and could overflow."""
    if keys.dtype not in DTYPES:
        raise LayoutMismatch(f"{name}: K cannot be moved: {keys.dtype} is not one of {', '.join(map(str, DTYPES))}")
