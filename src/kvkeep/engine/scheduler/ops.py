"""Which blocks of which chunk to scatter for a request, and which to gather: from tokens and block tables to copies.

Pure. Knows nothing about the store, leases or the engine's calls.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kvkeep.core.layout import ChunkLayout, ShardLayout
from kvkeep.core.units import SUM_NBYTES
from kvkeep.engine.plan import LoadOp, StoreOp
from kvkeep.engine.scheduler.request import Match, OpenChunk
from kvkeep.transfer.transfer import NULL_BLOCK, Blocks

Tables = Sequence[Sequence[int]]


def aligned(shard: ShardLayout, computed: int) -> bool:
    """Whether `computed` tokens end with a block of every group: no load writes a block that has computed tokens."""
    return all(computed % group.block_tokens == 0 for group in shard.groups)


def scatter_ops(
    shard: ShardLayout, request: str, match: Match, span: tuple[int, int], *, tables: Tables
) -> list[LoadOp]:
    """The scatters that fill tokens [start, end) of a request from matched chunks, first chunk first.

    They leave blocks below `start` alone, which hold what the engine computed. In a group with a sliding window they
    fill only blocks that a token at `end` or later can see, and skip those that the engine does not keep (null). They
    copy the last block whole even if `end` lies inside it.
    """
    start, end = span
    tokens = shard.chunk_tokens
    ops = []
    for chunk in range(start // tokens, -(-end // tokens)):
        runs = [_blocks_of_chunk(shard, group, chunk, span, table=tables[group]) for group in range(len(shard.groups))]
        index = chunk - match.first
        blocks = tuple(part for run in runs for part in run)
        # the last block has room for tokens that the step computes
        written = chunk == (end - 1) // tokens and not aligned(shard, end)
        offset = match.offsets[index]
        first = max(start, chunk * tokens)
        ops.append(LoadOp(match.lease.boot, request, first, offset, blocks=blocks, written=written))
    return ops


def _blocks_of_chunk(
    shard: ShardLayout, group: int, chunk: int, span: tuple[int, int], *, table: Sequence[int]
) -> list[Blocks]:
    start, end = span
    block_tokens, window = shard.groups[group].block_tokens, shard.groups[group].window
    per_chunk = shard.blocks(group)
    seen_from = max(start, end - window + 1) if window else start
    first = max(chunk * per_chunk, seen_from // block_tokens, start // block_tokens)
    last = min((chunk + 1) * per_chunk, -(-end // block_tokens))
    ids = list(table[first:last])
    while ids and ids[0] == NULL_BLOCK and window:
        ids.pop(0)
        first += 1
    return [Blocks(group, first - chunk * per_chunk, tuple(ids))] if ids else []


def gather_op(shard: ShardLayout, chunk: OpenChunk, final: int, tables: Tables) -> StoreOp | None:
    """What to gather into an open chunk in a step after which `final` tokens are final; None: nothing yet.

    A group without a window is gathered once all its blocks are full; one with a window as they fill, since the engine
    frees what leaves the window. LookupError if a block is gone before it was gathered.
    """
    tokens = shard.chunk_tokens
    complete = final >= (chunk.number + 1) * tokens
    blocks: list[Blocks] = []
    for index, group in enumerate(shard.groups):
        if not complete and not group.window:
            continue
        per_chunk = shard.blocks(index)
        base = chunk.number * per_chunk
        full = min(per_chunk, max(0, final // group.block_tokens - base))
        first = chunk.next_slots[index]
        if full <= first:
            continue
        ids = tuple(tables[index][base + first : base + full])
        if len(ids) != full - first or NULL_BLOCK in ids:
            raise LookupError(f"group {index} no longer has all blocks of chunk {chunk.number}")
        blocks.append(Blocks(index, first, ids))
    if not blocks:
        return None
    return StoreOp(chunk.offset, tuple(blocks), complete)


def built_on(table: Sequence[int], blocks: Collection[int]) -> Sequence[int]:
    """The part of a request's block ids that was computed from any of `blocks`, these included."""
    first = next((index for index, block in enumerate(table) if block in blocks), len(table))
    return table[first:]


def sums_by_rank(layout: ChunkLayout, sums: bytes) -> tuple[bytes, ...]:
    """The sums of a chunk, or of a state, divided into each rank's part."""
    parts, start = [], 0
    for shard in layout.shards:
        end = start + SUM_NBYTES * len(shard.ranges)
        parts.append(sums[start:end])
        start = end
    return tuple(parts)


def advance(chunk: OpenChunk, op: StoreOp, step: int) -> None:
    """Moves an open chunk past what `op` gathers in `step`."""
    for group, first, block_ids in op.blocks:
        chunk.next_slots[group] = first + len(block_ids)
    if op.seal:
        chunk.sealed_in = step


def rewind(chunk: OpenChunk) -> None:
    """Forgets what was gathered: steps fill the chunk from its start again."""
    chunk.next_slots = [0] * len(chunk.next_slots)
    chunk.sealed_in = 0
    chunk.rewinds += 1
