"""Scatter that rotates K on its way: chunks to blocks at another position, K and V of one layer or of all in a launch.

K is read once from the page-locked pool and written once, with no second pass over the device's memory. It must know
where tokens, heads and dimensions lie in a page, which plain copies need not. Knows nothing about streams, leases'
owners or which chunks are moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from kvkeep.errors import LayoutMismatch
from kvkeep.transfer.device.kernels import PROGRAMS
from kvkeep.transfer.device.streams import upload
from kvkeep.transfer.device.tables import CopyJob, Part, block_rows
from kvkeep.transfer.rope.keys import Alike, Plane
from kvkeep.transfer.rope.rotate import Rotation, check_keys

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def scatter_rotated(planes, batch, rotations, HEADS: tl.constexpr, DIMS: tl.constexpr, DTYPE: tl.constexpr):  # noqa: N803
    """Copies token by token, all heads of one at once; HEADS and DIMS are powers of two, DIMS holds pairs and rest.

    `planes`: int64 [planes, 8] of whether it rotates, address, bytes to the next block, to the next token, elements to
    the next head, to the next dimension; in the pool, where slot 0 begins in a chunk, bytes to the next. `batch`:
    int64 [tokens of all planes, tokens of a plane, tokens of a block, heads, pairs, dimensions, first dimension that
    rotates, from a pair to the next, from its first to its second, (block id, chunk's address, slot)...]. `rotations`:
    float32 [2, tokens of a plane, pairs], cosines first.
    """
    total = tl.load(batch)
    moved = tl.load(batch + 1)
    block_tokens = tl.load(batch + 2)
    pairs = tl.load(batch + 4)
    start = tl.load(batch + 6)
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, DIMS)[None, :]
    rest = pair
    heads = head < tl.load(batch + 3)
    rotated = heads & (pair < pairs)
    staying = heads & (rest < tl.load(batch + 5) - 2 * pairs)
    first_dim = start + pair * tl.load(batch + 7)
    second_dim = first_dim + tl.load(batch + 8)
    rest_dim = tl.where(rest < start, rest, rest + 2 * pairs)
    for at in range(tl.program_id(0).to(tl.int64), total, tl.num_programs(0).to(tl.int64)):
        plane = planes + at // moved * 8
        token = at % moved
        row = batch + 9 + 3 * (token // block_tokens)
        within = token % block_tokens * tl.load(plane + 3)
        page = tl.load(plane + 1) + tl.load(row) * tl.load(plane + 2) + within
        there = tl.load(row + 1) + tl.load(plane + 6) + tl.load(row + 2) * tl.load(plane + 7) + within
        out = page.to(tl.pointer_type(DTYPE)) + head * tl.load(plane + 4)
        held = there.to(tl.pointer_type(DTYPE)) + head * tl.load(plane + 4)
        step = tl.load(plane + 5)
        first = tl.load(held + first_dim * step, mask=rotated)
        second = tl.load(held + second_dim * step, mask=rotated)
        other = tl.load(held + rest_dim * step, mask=staying)
        cos = tl.load(rotations + token * pairs + pair, mask=pair < pairs)
        sin = tl.load(rotations + (moved + token) * pairs + pair, mask=pair < pairs)
        x, y = first.to(tl.float32), second.to(tl.float32)
        rotates = tl.load(plane) != 0  # V is copied bit for bit: 0 * inf would be NaN
        tl.store(out + first_dim * step, tl.where(rotates, (x * cos - y * sin).to(DTYPE), first), mask=rotated)
        tl.store(out + second_dim * step, tl.where(rotates, (y * cos + x * sin).to(DTYPE), second), mask=rotated)
        tl.store(out + rest_dim * step, other, mask=staying)


class RotatingScatter:
    """A `PageCopier` from the pool for one batch; `rotation`, on the device, is that of the jobs' tokens in order.

    `parts` are those of the transfer. The planes of `alike` must cover every part that is to be copied; at most
    `programs` run at once; `kernel` is `scatter_rotated`, or its like in Triton's interpreter. LayoutMismatch for
    a dtype that cannot be rotated.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        alike: Alike,
        rotation: Rotation,
        programs: int = PROGRAMS,
        kernel: Any = scatter_rotated,
    ) -> None:
        pages, pairs, pairing = alike.planes[0].pages, rotation.cos.shape[1], alike.keys.pairing
        check_keys(pages)
        if any((plane.pages.shape, plane.pages.dtype) != (pages.shape, pages.dtype) for plane in alike.planes):
            raise LayoutMismatch("planes of several shapes or dtypes do not rotate in one launch")
        if pairing.start + 2 * pairs > pages.shape[3]:
            raise LayoutMismatch(f"{pairs} pairs do not fit a head of {pages.shape[3]}")
        self._parts = tuple(parts)
        self._alike = alike
        self._rotation = rotation
        self._programs = programs
        self._kernel = kernel

    def start(self, jobs: Sequence[CopyJob], to_pool: bool, only: int | None) -> None:
        """As `PageCopier.start`, from the pool only, and only for the rotation's tokens: else ValueError."""
        if to_pool:
            raise ValueError("chunks are stored as they were computed")
        planes = [plane for plane in self._alike.planes if only in (None, plane.range_)]
        pages, pairs, pairing = self._alike.planes[0].pages, self._rotation.cos.shape[1], self._alike.keys.pairing
        _, block_tokens, heads, head_size = pages.shape
        rows = block_rows(jobs, self._alike.group)
        moved = len(rows) * block_tokens
        if len(self._rotation.cos) != moved:
            raise ValueError("the rotation is not for these blocks' tokens")
        if not moved or not planes:
            return
        steps = (2, 1) if pairing.interleaved else (1, pairs)
        sizes = [len(planes) * moved, moved, block_tokens, heads, pairs, head_size, pairing.start, *steps]
        batch = upload(np.concatenate((np.array(sizes, np.int64), rows.ravel())), pages.device)
        table = upload(np.array([self._row(plane) for plane in planes], np.int64), pages.device)
        rotations = torch.stack(self._rotation)
        self._launch(min(self._programs, sizes[0]), table, batch, rotations)

    def prepare(self) -> None:
        """Compiles what `start` will launch: no request shall wait for it."""
        device = self._alike.planes[0].pages.device
        nothing = torch.zeros(16, dtype=torch.int64, device=device)
        self._launch(1, nothing, nothing, torch.zeros(1, dtype=torch.float32, device=device))

    def _launch(self, programs: int, table: torch.Tensor, batch: torch.Tensor, rotations: torch.Tensor) -> None:
        pages, pairs = self._alike.planes[0].pages, self._rotation.cos.shape[1]
        heads, head_size = pages.shape[2:]
        widths = (triton.next_power_of_2(n) for n in (heads, max(1, pairs, head_size - 2 * pairs)))
        self._kernel[(programs,)](table, batch, rotations, *widths, _DTYPES[pages.dtype])

    def _row(self, plane: Plane) -> tuple[int, ...]:
        pages, nbytes = plane.pages, plane.pages.element_size()
        block, token, head, dim = pages.stride()
        part, inside = next(
            (part, inside)
            for part in self._parts
            if part.range_ == plane.range_
            and 0 <= (inside := pages.data_ptr() - part.pages.address) < part.pages.nbytes
        )
        if block * nbytes != part.pages.stride:
            raise LayoutMismatch("a block is not a page")
        offset = part.offset + inside
        return (
            int(plane.rotates),
            pages.data_ptr(),
            block * nbytes,
            token * nbytes,
            head,
            dim,
            offset,
            part.pages.nbytes,
        )
