"""Cuts a request's tokens, its mask and its block tables into whole chunks.

Pure. Knows nothing about digests, memory or the store. A mask is false for the tokens that the engine has already, then
true up to the end: the verbs work on the true part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvkeep.core.layout import ShardLayout
from kvkeep.transfer.transfer import Blocks

Mask = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.intp]
Tables = Sequence[Sequence[int] | Ids]
"""One block table a group: the engine's blocks in the order of the request's tokens, from the first token on."""


class Cut(NamedTuple):
    """Tokens [start, end) of a request of `length` tokens, in whole chunks up to `chunks`; its tables as arrays."""

    shard: ShardLayout
    length: int
    start: int
    tables: Sequence[Ids]

    @property
    def chunks(self) -> int:
        """How many whole chunks the request has."""
        return self.length // self.shard.chunk_tokens

    @property
    def aligned(self) -> bool:
        """Whether the tokens start with a block of every group: a block with the engine's own tokens is not written."""
        return all(self.start % group.block_tokens == 0 for group in self.shard.groups)

    def blocks(self, chunks: Iterable[int]) -> list[list[Blocks]]:
        """The blocks of each of these chunks that hold tokens from `start` on, group by group."""
        wanted, runs = list(chunks), []
        for index, (group, table) in enumerate(zip(self.shard.groups, self.tables, strict=True)):
            count, first = self.shard.blocks(index), self.start // group.block_tokens
            starts = [(chunk * count, max(first, chunk * count)) for chunk in wanted]
            runs.append([Blocks(index, start - base, table[start : base + count]) for base, start in starts])
        return [list(blocks) for blocks in zip(*runs, strict=True)]

    def mask(self, end: int) -> Mask:
        """True for the tokens from `start` up to `end`."""
        mask = np.zeros(self.length, np.bool_)
        mask[self.start : end] = True
        return mask


def cut(shard: ShardLayout, length: int, tables: Tables, mask: Mask | Sequence[bool] | None) -> Cut:
    """The cut of a request of `length` tokens; no mask means all of them.

    Raises ValueError, saying what would be right, for a mask of another length or with a hole (a false after a true),
    unless there is one table a group, and for a table that is too short for all whole chunks or not of whole numbers.
    """
    start = 0
    if mask is not None:
        flags = np.asarray(mask, np.bool_)
        if flags.shape != (length,):
            raise ValueError(f"a mask of shape {flags.shape} for {length} tokens")
        start = length - int(np.count_nonzero(flags))
        if not flags[start:].all():
            hole = int(flags.argmax() + (~flags[flags.argmax() :]).argmax())
            raise ValueError(f"the mask has a hole at token {hole}: it must be false, then true up to the end")
    if len(tables) != len(shard.groups):
        raise ValueError(f"{len(tables)} block tables for {len(shard.groups)} groups")
    arrays = []
    for group, block_ids in enumerate(tables):
        table = np.asarray(block_ids)
        if table.size and table.dtype.kind not in "iu":  # NumPy would cut block 1.5 down to block 1
            raise ValueError(f"group {group}: a table of {table.dtype}, not of whole numbers")
        need = length // shard.chunk_tokens * shard.blocks(group)
        if table.ndim != 1 or len(table) < need:
            raise ValueError(f"group {group}: a table of shape {table.shape}, its whole chunks have {need} blocks")
        arrays.append(table.astype(np.intp))  # a copy of ours: a caller may use its own again
    return Cut(shard, length, start, arrays)
