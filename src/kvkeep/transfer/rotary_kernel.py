"""Turns K in place in the engine's blocks, all layers in one launch: `rotary.rotate_blocks` as a Triton kernel.

It runs on the stream of the scatter, right behind it; `turned_scatter` turns K within the scatter. Knows nothing about
chunks, positions or which blocks are moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from kvkeep.transfer.kernels import upload
from kvkeep.transfer.rotary import Pairing, Turn, check_keys

PROGRAMS = 64
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def turn_pages(keys, batch, turns, HEADS: tl.constexpr, PAIRS: tl.constexpr, DTYPE: tl.constexpr):  # noqa: N803
    """Turns token by token, all heads of one at once; HEADS and PAIRS are powers of two that hold them.

    `keys`: int64 [layers, 4] of address of K, bytes to the next block and token, elements to the next head. `batch`:
    int64 [tokens of all layers, tokens of a layer, tokens of a block, heads, pairs, first dimension, from a pair to the
    next, from its first to its second, block ids...]. `turns`: float32 [2, tokens of a layer, pairs], cosines first.
    """
    total = tl.load(batch)
    moved = tl.load(batch + 1)
    block_tokens = tl.load(batch + 2)
    pairs = tl.load(batch + 4)
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    inside = (head < tl.load(batch + 3)) & (pair < pairs)
    dims = tl.load(batch + 5) + pair * tl.load(batch + 6)
    other = tl.load(batch + 7)
    for at in range(tl.program_id(0).to(tl.int64), total, tl.num_programs(0).to(tl.int64)):
        layer = keys + at // moved * 4
        number = at % moved
        block = tl.load(batch + 8 + number // block_tokens)
        address = tl.load(layer) + block * tl.load(layer + 1) + number % block_tokens * tl.load(layer + 2)
        first_at = address.to(tl.pointer_type(DTYPE)) + head * tl.load(layer + 3) + dims
        cos = tl.load(turns + number * pairs + pair, mask=pair < pairs)
        sin = tl.load(turns + (moved + number) * pairs + pair, mask=pair < pairs)
        first = tl.load(first_at, mask=inside).to(tl.float32)
        second = tl.load(first_at + other, mask=inside).to(tl.float32)
        tl.store(first_at, (first * cos - second * sin).to(DTYPE), mask=inside)
        tl.store(first_at + other, (second * cos + first * sin).to(DTYPE), mask=inside)


def turn_blocks(
    layers: Sequence[torch.Tensor],
    block_ids: Sequence[int],
    turn: Turn,
    pairing: Pairing,
    kernel: Any = turn_pages,
) -> None:
    """`rotary.rotate_blocks` for the same blocks of every layer, on the current stream.

    `layers` are views as `rotary.key_pages` gives them, of one shape and dtype; heads and pages may lie anyhow, the
    dimensions of a head side by side.
    """
    pages, pairs = layers[0], turn.cos.shape[1]
    _, block_tokens, heads, head_size = pages.shape
    check_keys(pages)
    assert all(one.shape == pages.shape and one.dtype == pages.dtype and one.stride(3) == 1 for one in layers)
    assert pairing.start + 2 * pairs <= head_size, f"{pairs} pairs do not fit a head of {head_size}"
    assert len(turn.cos) == len(block_ids) * block_tokens, "a turn is not for these blocks' tokens"
    if not block_ids:
        return
    keys = upload(np.array([_place(one) for one in layers], np.int64), pages.device)
    steps = (2, 1) if pairing.interleaved else (1, pairs)
    moved = len(turn.cos)
    sizes = [len(layers) * moved, moved, block_tokens, heads, pairs, pairing.start, *steps, *block_ids]
    batch = upload(np.array(sizes, np.int64), pages.device)
    turns = torch.stack(turn).to(device=pages.device, dtype=torch.float32)
    grid = (min(PROGRAMS, len(layers) * moved),)
    widths = (triton.next_power_of_2(heads), triton.next_power_of_2(pairs))
    kernel[grid](keys, batch, turns, *widths, _DTYPES[pages.dtype])


def _place(pages: torch.Tensor) -> tuple[int, int, int, int]:
    block, token, head, _ = pages.stride()
    nbytes = pages.element_size()
    return pages.data_ptr(), block * nbytes, token * nbytes, head
