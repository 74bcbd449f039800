"""The states of recurrent layers: gathers those that a step leaves at chunks' ends, scatters that at a claim's end.

A state stands for all tokens before it and cannot be cut, so a claim ends exactly where a state was stored. The store
keeps it apart from its chunk, under the same digest, since an engine leaves few states behind. Knows nothing about
lookups, or about how the engine keeps its states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvkeep.core.layout import ChunkLayout
from kvkeep.engine.link import Link
from kvkeep.engine.plan import LoadOp, Scheduled, StoreOp
from kvkeep.engine.scheduler.ops import Tables, sums_by_rank
from kvkeep.engine.scheduler.request import Match, OpenChunk, RequestRecord
from kvkeep.engine.scheduler.steps import Step
from kvkeep.errors import BlockError
from kvkeep.telemetry import Figures
from kvkeep.transfer.transfer import NULL_BLOCK, Blocks
from kvkeep.wire.client import Call, Client
from kvkeep.wire.messages import BUSY, PRESENT, Granted


class States:
    """The states of one engine; `layout` is that of one of them, all ranks, with one block a group.

    Its blocks hold as many tokens as a state's block does in the engine; their tables come after the chunks' groups'.
    """

    def __init__(
        self, layout: ChunkLayout, figures: Figures, link: Link, patience_s: float, *, deadline_s: float
    ) -> None:
        self._layout = layout
        self._figures = figures
        self._link = link
        self._patience_s = patience_s
        self._deadline_s = deadline_s
        self._unanswered_since_s: float | None = None

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each rank's part of a state starts in it (bytes)."""
        return tuple(self._layout.shard_offset(rank) for rank in range(len(self._layout.shards)))

    def scatter_op(self, request: str, match: Match, span: tuple[int, int], tables: Tables) -> LoadOp:
        """The scatter of the state at the end of tokens [start, end), into the block that ends there."""
        state, (start, end) = match.state, span
        shard = self._layout.shards[0]
        if state is None or end % shard.chunk_tokens:
            raise BlockError(f"request {request}: no state was matched that ends with {end} tokens")
        slot = end // shard.chunk_tokens - 1
        own = tables[len(tables) - len(shard.groups) :]
        blocks = tuple(Blocks(group, 0, (table[slot],)) for group, table in enumerate(own))
        sums = sums_by_rank(self._layout, state.sums) if state.sums else ()
        return LoadOp(match.lease.boot, request, start, state.offset, blocks=blocks, sums=sums, state=True)

    def gather_ops(
        self,
        step: Step,
        scheduled: Sequence[Scheduled],
        records: Mapping[str, RequestRecord],
        client: Client,
        *,
        chunk_tokens: int,
    ) -> list[StoreOp]:
        """The step's gathers of states at chunks' ends; skips those without room, since the engine drops them."""
        asked = []
        for request in scheduled:
            record = records.get(request.request)
            if record is not None and record.stores:
                left = _left_behind(record, request, chunk_tokens)
                if left:
                    digests = [record.chain.digests[chunk] for chunk in left]
                    asked.append((record, left, client.reserve(digests, states=True)))
        ops: list[StoreOp] = []
        patience_s = self._patience_s
        for record, left, call in asked:
            answer = client.wait(call, patience_s)
            patience_s = patience_s if call.done else 0.0  # one wait a step
            self._heed(call)
            if isinstance(answer, Granted):
                ops += self._open(step, record, left, answer)
            else:
                client.abandon(call)
                self._figures.add("skipped_states", len(left))
        return ops

    def _heed(self, call: Call) -> None:
        """Suspends a store that has answered no reservation of a state for `deadline_s`."""
        if call.done:
            self._unanswered_since_s = None
        elif self._unanswered_since_s is None:
            self._unanswered_since_s = self._link.clock()
        elif self._link.clock() - self._unanswered_since_s > self._deadline_s:
            self._unanswered_since_s = None
            self._link.suspend()

    def _open(
        self, step: Step, record: RequestRecord, left: Mapping[int, tuple[int, ...]], answer: Granted
    ) -> list[StoreOp]:
        """Opens the states for which there is room, and gathers them at once."""
        if answer.lease:
            record.write_leases.append(answer.lease)
        ops = []
        for index, (number, offset) in enumerate(zip(left, answer.offsets, strict=False)):
            if offset >= 0:
                chunk = OpenChunk(number, answer.lease, index, offset, sealed_in=step.number, state=True)
                record.states[number] = chunk
                step.add_gather(record, chunk, seal=True)
                blocks = tuple(Blocks(group, 0, (block,)) for group, block in enumerate(left[number]))
                ops.append(StoreOp(offset, blocks, seal=True, state=True))
            elif offset not in (PRESENT, BUSY):
                self._figures.add("skipped_states")
        return ops


def _left_behind(record: RequestRecord, scheduled: Scheduled, chunk_tokens: int) -> dict[int, tuple[int, ...]]:
    """The blocks of the states that a step leaves at the ends of chunks, by chunk."""
    kept = min(record.reserved_to, len(record.chain.digests))
    return {
        tokens // chunk_tokens - 1: block_ids
        for tokens, block_ids in scheduled.states
        if 0 < tokens <= min(scheduled.final, kept * chunk_tokens)
        and not tokens % chunk_tokens
        and NULL_BLOCK not in block_ids
    }
