"""Gathers and scatters with one Triton kernel over tables of int64: any layout, all layers, many chunks, one launch.

The device reads and writes the pool itself, so its memory must be page-locked. A bounded number of programs leaves the
other multiprocessors to the model. Knows nothing about streams, leases' owners or when a copy is complete.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from kvkeep.transfer.device.streams import upload
from kvkeep.transfer.device.tables import CopyJob, Int64Array, Part, address_of, block_rows, width_of

PROGRAMS = 16  # where nothing is set; of an H100's 132 multiprocessors
TILE_NBYTES = 8192  # what one program has under way: 16 of them cover a PCIe 5 round trip of 2 us
_HEAD = 4


@triton.jit
def copy_pages(parts, batch, TO_POOL: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):  # noqa: N803
    """Copies tile by tile; tiles are counted over (part, block, tile of a page) and past the ends of the smaller ones.

    `parts`: int64 [n, 5] of group, address, stride, bytes, offset. `batch`: int64 [total tiles, blocks, tiles of a
    page, where rows begin, (first row, rows) a group..., rows of (block id, chunk's address, slot)...].
    """
    word: tl.constexpr = tl.int32 if WIDTH >= 4 else (tl.int16 if WIDTH == 2 else tl.int8)
    size: tl.constexpr = 4 if WIDTH >= 4 else WIDTH
    total = tl.load(batch)
    blocks = tl.load(batch + 1)
    tiles = tl.load(batch + 2)
    rows = batch + tl.load(batch + 3)
    lanes = tl.arange(0, TILE // size)
    for at in range(tl.program_id(0).to(tl.int64), total, tl.num_programs(0).to(tl.int64)):
        part = parts + at // (tiles * blocks) * 5
        group = batch + 4 + 2 * tl.load(part)
        block = at // tiles % blocks
        start = at % tiles * TILE
        nbytes = tl.load(part + 3)
        if (block < tl.load(group + 1)) & (start < nbytes):
            row = rows + 3 * (tl.load(group) + block)
            page = tl.load(part + 1) + tl.load(row) * tl.load(part + 2) + start
            there = tl.load(row + 1) + tl.load(part + 4) + tl.load(row + 2) * nbytes + start
            inside = lanes < tl.multiple_of((nbytes - start) // size, WIDTH // size)
            pages = tl.multiple_of(page.to(tl.pointer_type(word)), WIDTH) + lanes
            pool = tl.multiple_of(there.to(tl.pointer_type(word)), WIDTH) + lanes
            if TO_POOL:
                tl.store(pool, tl.load(pages, mask=inside), mask=inside)
            else:
                tl.store(pages, tl.load(pool, mask=inside), mask=inside)


class _Table(NamedTuple):
    """Parts that are copied in words of one width."""

    width: int
    parts: tuple[Part, ...]
    table: torch.Tensor


class KernelCopier:
    """A `PageCopier` by kernel; `kernel` is `copy_pages`, or its like in Triton's interpreter."""

    def __init__(
        self, parts: Sequence[Part], device: torch.device, programs: int = PROGRAMS, kernel: Any = copy_pages
    ) -> None:
        if programs <= 0:
            raise ValueError(f"{programs} programs")
        self._parts = tuple(parts)
        self._device = device
        self._programs = programs
        self._kernel = kernel
        # made here, since a copy to the device's memory waits for the stream that it is made on
        self._tables: dict[int | None, list[_Table]] = {None: self._tabulate(self._parts)}
        for index in {part.range_ for part in self._parts}:
            self._tables[index] = self._tabulate([part for part in self._parts if part.range_ == index])

    def prepare(self) -> None:
        """Compiles what `start` will launch: the first step that copies shall not wait for it."""
        for width, parts, table in self._tables[None]:
            nothing = torch.zeros(_HEAD, dtype=torch.int64, device=self._device)
            for to_pool in (True, False):
                self._kernel[(1,)](table, nothing, to_pool, width, _tile(parts))

    def start(self, jobs: Sequence[CopyJob], to_pool: bool, only: int | None) -> None:
        """As `PageCopier.start`: one launch for each width of access that the layout has; most have one."""
        aligned = width_of(address_of(job.lease) for job in jobs)
        for width, parts, table in self._tables[only]:
            tile = _tile(parts)
            batch = batch_of(parts, jobs, tile)
            if batch[0]:
                grid = (min(self._programs, int(batch[0])),)
                self._kernel[grid](table, upload(batch, self._device), to_pool, min(width, aligned), tile)

    def _tabulate(self, parts: Sequence[Part]) -> list[_Table]:
        by_width: dict[int, list[Part]] = {}
        for part in parts:
            by_width.setdefault(width_of((*part.pages, part.offset)), []).append(part)
        return [
            _Table(width, tuple(same), torch.tensor([(p.group, *p.pages, p.offset) for p in same]).to(self._device))
            for width, same in by_width.items()
        ]


def refusal(device: torch.device, kernel: Any = copy_pages) -> str:
    """Why no kernel can be launched on this device, "" if one can: Triton needs a C compiler, among other things."""
    nothing = torch.zeros(_HEAD, dtype=torch.int64, device=device)
    try:
        kernel[(1,)](nothing, nothing, True, 16, TILE_NBYTES)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return f"Triton cannot launch a kernel here: {error}"
    return ""


def _tile(parts: Sequence[Part]) -> int:
    return int(min(TILE_NBYTES, max(16, triton.next_power_of_2(max(part.pages.nbytes for part in parts)))))


def batch_of(parts: Sequence[Part], jobs: Sequence[CopyJob], tile_nbytes: int) -> Int64Array:
    """The kernel's `batch` for these jobs: see `copy_pages`."""
    groups = max(part.group for part in parts) + 1
    used = {part.group for part in parts}
    rows = [block_rows(jobs, group) if group in used else np.empty((0, 3), np.int64) for group in range(groups)]
    counts = [len(group_rows) for group_rows in rows]
    firsts = np.concatenate(([0], np.cumsum(counts)[:-1]))
    tiles = max(-(-part.pages.nbytes // tile_nbytes) for part in parts)
    head = [len(parts) * max(counts) * tiles, max(counts), tiles, _HEAD + 2 * groups]
    return np.concatenate(
        (head, np.stack((firsts, counts), axis=1).ravel(), *(group_rows.ravel() for group_rows in rows))
    )
