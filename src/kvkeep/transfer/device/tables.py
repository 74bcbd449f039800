"""A batch of copies as tables of int64: which bytes of an engine's pages belong where in chunks.

Pure. Addresses are integers; knows nothing about devices, tensors, streams or who copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvkeep.core.layout import ShardLayout
from kvkeep.memory.pool import Lease
from kvkeep.transfer.transfer import Blocks

Int64Array = npt.NDArray[np.int64]
WIDTHS = (16, 8, 4, 2, 1)
_FIRST = range(1)


class Pages(NamedTuple):
    """One part (K, V, or all) of a layer's pages in the engine: where block 0 is, bytes to the next, bytes of each."""

    address: int
    stride: int
    nbytes: int


class Part(NamedTuple):
    """`Pages` and where they lie in a shard: in the range with index `range_`, those of slot 0 at `offset`."""

    group: int
    range_: int
    pages: Pages
    offset: int


class CopyJob(NamedTuple):
    """Some blocks of one chunk and its memory; the lease must stay open until the copies are complete."""

    blocks: Sequence[Blocks]
    lease: Lease


class PageCopier(Protocol):
    """One way to copy."""

    def start(self, jobs: Sequence[CopyJob], to_pool: bool, only: int | None) -> None:
        """Starts the copies of all jobs on the current stream: of every layer, or of the range with index `only`."""


def parts_of(shard: ShardLayout, pages: Sequence[Sequence[Sequence[Pages]]]) -> tuple[Part, ...]:
    """The parts of a shard in the order of its ranges; `pages` are by group, layer and part."""
    parts = []
    for index, range_ in enumerate(shard.ranges):
        offset = range_.offset
        for part in pages[range_.group][range_.layer]:
            parts.append(Part(range_.group, index, part, offset))
            offset += part.nbytes * shard.blocks(range_.group)
    return tuple(parts)


def address_of(lease: Lease) -> int:
    """Where the lease's shard begins in this process."""
    return int(lease.views(_FIRST)[0].__array_interface__["data"][0])  # a layer's copies ask for every chunk's


def width_of(values: Iterable[int]) -> int:
    """The widest access (bytes) that divides all these addresses, strides and sizes."""
    bits = 0
    for value in values:
        bits |= value
    return next(width for width in WIDTHS if bits % width == 0)


def block_rows(jobs: Sequence[CopyJob], group: int) -> Int64Array:
    """The blocks that the jobs name in a group: [n, 3] of block id, address of the chunk's shard, slot in it."""
    runs = [(address_of(job.lease), blocks) for job in jobs for blocks in job.blocks if blocks.group == group]
    if not runs:
        return np.empty((0, 3), np.int64)
    ids = [np.asarray(blocks.block_ids, np.int64) for _, blocks in runs]
    counts = np.array([len(run) for run in ids])
    chunks = np.array([address for address, _ in runs]).repeat(counts)
    firsts = np.array([blocks.first for _, blocks in runs]) - (counts.cumsum() - counts)
    where = firsts.repeat(counts) + np.arange(len(chunks))
    return np.stack((np.concatenate(ids), chunks, where), axis=1)


def copies(parts: Sequence[Part], jobs: Sequence[CopyJob]) -> Int64Array:
    """Every page to copy: [n, 3] of address in the engine, address in the pool, bytes; in the pool's order."""
    found = [np.empty((0, 3), np.int64)]
    by_group = {group: block_rows(jobs, group) for group in {part.group for part in parts}}
    for group, _, pages, offset in parts:
        ids, chunks, where = by_group[group].T
        nbytes = np.full(len(ids), pages.nbytes)
        found.append(np.stack((pages.address + ids * pages.stride, chunks + offset + where * nbytes, nbytes), axis=1))
    return np.concatenate(found)


def merged(rows: Int64Array) -> Int64Array:
    """Merge each run of rows that continue the row before them, on both sides, into one row."""
    if len(rows) < 2:
        return rows
    ends = rows[:-1, :2] + rows[:-1, 2:]
    starts = np.flatnonzero(np.concatenate(([True], (rows[1:, :2] != ends).any(axis=1))))
    return np.column_stack((rows[starts, :2], np.add.reduceat(rows[:, 2], starts)))


def cut(rows: Int64Array, edges: Sequence[int]) -> Int64Array:
    """Split the copies that cross an address of `edges` (sorted) in the pool: each side is page-locked on its own."""
    inside = np.array(edges, np.int64)
    first = np.searchsorted(inside, rows[:, 1], "right")
    last = np.searchsorted(inside, rows[:, 1] + rows[:, 2], "left")
    if (first == last).all():
        return rows
    return np.array(list(_cut(rows, inside, np.stack((first, last), axis=1))), np.int64).reshape(-1, 3)


def _cut(rows: Int64Array, edges: Int64Array, crossed: Int64Array) -> Iterator[tuple[int, int, int]]:
    for (page, pool, nbytes), (first, last) in zip(rows.tolist(), crossed.tolist(), strict=True):
        stops = [pool, *edges[first:last].tolist(), pool + nbytes]
        for start, stop in pairwise(stops):
            yield page + start - pool, start, stop - start


def edges_of(jobs: Sequence[CopyJob]) -> list[int]:
    """The addresses inside the jobs' memory at which another page-locked piece begins."""
    return sorted({address_of(job.lease) + piece for job in jobs for piece in job.lease.pieces if piece})
