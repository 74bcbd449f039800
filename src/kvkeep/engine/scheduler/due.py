"""Loads that the engine has admitted and that no plan carries yet.

A load leaves with the next plan; if its request ends first, it is dropped. Knows nothing about steps under way.
"""

from __future__ import annotations

from dataclasses import replace

from kvkeep.core.layout import ChunkLayout
from kvkeep.engine.plan import LoadOp
from kvkeep.engine.scheduler.ops import Tables, scatter_ops, sums_by_rank
from kvkeep.engine.scheduler.request import Match, RequestRecord
from kvkeep.engine.scheduler.states import States
from kvkeep.engine.scheduler.steps import Load
from kvkeep.wire.client import Client


class DueLoads:
    """The due loads of one engine; `layout` is that of whole chunks, `states` loads the state at a claim's end."""

    def __init__(self, layout: ChunkLayout, states: States | None) -> None:
        self._layout = layout
        self._shard = layout.shards[0]
        self._states = states
        self._loads: list[tuple[RequestRecord, Load]] = []

    def __bool__(self) -> bool:
        return bool(self._loads)

    def add(self, record: RequestRecord, match: Match, external: int, tables: Tables) -> None:
        """Adds the load of `external` tokens of a match into the request's blocks."""
        span = (record.computed, record.computed + external)
        ops = scatter_ops(self._shard, record.request, match, span, tables=tables)
        first = span[0] // self._layout.chunk_tokens
        digests = record.chain.digests[first : first + len(ops)]
        ops = [self._completed(op, match, chunk) for chunk, op in enumerate(ops, first)]
        if self._states is not None:
            ops.append(self._states.scatter_op(record.request, match, span, tables))
            digests.append(digests[-1])
        # a chunk outside every window needs no copy, so none of it can fail
        needed = [(op, digest) for op, digest in zip(ops, digests, strict=True) if op.blocks]
        # blocks that a step's own load fills may be in the engine's prefix cache already, and so may all that follow
        blocks = () if record.beside else tables[0][span[0] // self._shard.groups[0].block_tokens :]
        record.claimed_from = match.tokens_by_source(external)
        ops, digests = [op for op, _ in needed], [digest for _, digest in needed]
        load = Load(match.leases, span, tuple(ops), tuple(digests), blocks=tuple(blocks), beside=record.beside)
        self._loads.append((record, load))

    def take(self) -> list[tuple[RequestRecord, Load]]:
        """All due loads, for the plan that is being made: they are not due any more."""
        loads, self._loads = self._loads, []
        return loads

    def drop(self, record: RequestRecord, client: Client | None) -> None:
        """Drops a request's loads and releases their leases: its blocks are not its own any more."""
        for owner, load in self._loads:
            if owner is record and client is not None:
                for lease in load.leases:
                    client.release(lease)
        self._loads = [(owner, load) for owner, load in self._loads if owner is not record]

    def _completed(self, op: LoadOp, match: Match, chunk: int) -> LoadOp:
        """The op with each rank's part of the chunk's sums, if workers shall verify it; else with its progress word."""
        sums = match.sums.get(chunk - match.first)
        if not sums:
            return replace(op, progress_at=match.progress.get(chunk - match.first, 0))
        return replace(op, sums=sums_by_rank(self._layout, sums))
