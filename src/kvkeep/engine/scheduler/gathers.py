"""The chunks that requests fill, from the reservation to the commit.

A chunk is reserved when its request is admitted, gathered by the steps that fill it, and committed when the step that
sealed it is done. The rest is given up with its request. Knows nothing about lookups or loads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kvkeep.core.layout import ShardLayout
from kvkeep.engine.link import Link
from kvkeep.engine.plan import Scheduled, StoreOp
from kvkeep.engine.scheduler.ops import Tables, advance, gather_op, rewind
from kvkeep.engine.scheduler.request import OpenChunk, RequestRecord
from kvkeep.engine.scheduler.steps import Sealed, Step
from kvkeep.telemetry import Figures
from kvkeep.wire.client import Call, Client
from kvkeep.wire.messages import BUSY, NO_ROOM, PRESENT, Committed, Granted, StoreLease, commit_parts

_SKIPPED = {PRESENT: "skipped_present_chunks", BUSY: "skipped_present_chunks", NO_ROOM: "skipped_full_chunks"}


class Gathers:
    """The chunks that one engine fills.

    A step waits at most `patience_s` for reservations that it could use. A store that does not answer a reservation
    within `deadline_s` is suspended until it has caught up.
    """

    def __init__(
        self, shard: ShardLayout, figures: Figures, link: Link, patience_s: float, *, deadline_s: float
    ) -> None:
        self._shard = shard
        self._figures = figures
        self._link = link
        self._patience_s = patience_s
        self._deadline_s = deadline_s
        self._commits: list[tuple[Call, bool]] = []

    def wish(self, record: RequestRecord, client: Client, tokens: Sequence[int], present: range) -> None:
        """Asks for room for the whole chunks of `tokens` that are not `present` and were not asked for before."""
        if not record.stores or record.reservation is not None:
            return
        upto = len(tokens) // self._shard.chunk_tokens
        if len(record.chain.digests) < upto:
            record.chain.extend(tokens)
            upto = min(upto, len(record.chain.digests))
        chunks = [chunk for chunk in range(record.reserved_to, upto) if chunk not in present]
        record.reserved_to = max(record.reserved_to, upto)
        if chunks:
            record.wanted = chunks
            record.reserved_at_s = self._link.clock()
            record.reservation = client.reserve([record.chain.digests[chunk] for chunk in chunks])

    def refill(self, record: RequestRecord) -> None:
        """Starts a request's open chunks again: it has new blocks."""
        for chunk in record.open.values():
            rewind(chunk)

    def ops(
        self,
        step: Step,
        scheduled: Sequence[Scheduled],
        records: Mapping[str, RequestRecord],
        tables: Callable[[str], Tables],
        *,
        client: Client | None,
    ) -> list[StoreOp]:
        """The step's gathers. Gives up a chunk whose blocks are gone."""
        ops: list[StoreOp] = []
        if client is None:
            return ops
        self._harvest(client)
        patience_s = self._patience_s
        for request in scheduled:
            record = records.get(request.request)
            if record is None or not record.stores:
                continue
            if record.reservation is not None and not self._opened(record, client, patience_s):
                patience_s = 0.0  # one wait a step
            if record.open:
                ops += self._ops_of_request(step, record, request.final, tables(request.request))
        return ops

    def commit(self, sealed: Sequence[Sealed], client: Client) -> None:
        """Makes sealed chunks readable: a message a write lease, or several where their sums are long."""
        by_lease: dict[StoreLease, list[Sealed]] = {}
        for record, chunk, sums in sealed:
            making = record.states if chunk.state else record.open
            if making.pop(chunk.number, None) is chunk:
                by_lease.setdefault(chunk.lease, []).append(Sealed(record, chunk, sums))
        for lease, chunks in by_lease.items():
            indexes, sums_of = [done.chunk.index for done in chunks], [done.sums for done in chunks]
            for part in commit_parts(sums_of):
                call = client.commit(lease, indexes[part], sums_of[part])
                self._commits.append((call, chunks[0].chunk.state))
        self._harvest(client)

    def stop(self, record: RequestRecord) -> None:
        """Stores nothing more of a request, which may compute on wrong blocks from here on.

        Its reservations end with it, since a step under way may still gather into them.
        """
        record.stores = False
        record.open.clear()
        record.states.clear()

    def forget(self, record: RequestRecord) -> None:
        """Drops what a store that is gone had reserved; its lease numbers mean nothing to another one."""
        record.reservation = None
        record.reserved_to = 0
        record.write_leases.clear()
        record.open.clear()
        record.states.clear()

    def give_up(self, record: RequestRecord, client: Client) -> None:
        """Releases a request's reservations; chunks that it did not commit are lost."""
        if record.reservation is not None:
            client.abandon(record.reservation)
            record.reservation = None
        for lease in record.write_leases:
            client.release(lease)
        record.write_leases.clear()
        record.open.clear()
        record.states.clear()

    def _opened(self, record: RequestRecord, client: Client, patience_s: float) -> bool:
        """Opens the chunks of a request's reservation; False: no answer yet, and the next step can still gather."""
        call = record.reservation
        if call is None:
            return True
        answer = client.wait(call, patience_s)
        if not call.done:
            if self._link.clock() - record.reserved_at_s > self._deadline_s:
                record.reservation = None
                client.abandon(call)
                self._figures.add("skipped_late_chunks", len(record.wanted))
                self._link.suspend()
            return False
        record.reservation = None
        if not isinstance(answer, Granted):
            return True
        if answer.lease:
            record.write_leases.append(answer.lease)
        groups = len(self._shard.groups)
        for index, (number, offset) in enumerate(zip(record.wanted, answer.offsets, strict=False)):
            if offset >= 0:
                record.open[number] = OpenChunk(number, answer.lease, index, offset, next_slots=[0] * groups)
            elif offset in _SKIPPED:
                self._figures.add(_SKIPPED[offset])
        return True

    def _ops_of_request(self, step: Step, record: RequestRecord, final: int, tables: Tables) -> list[StoreOp]:
        ops = []
        for chunk in list(record.open.values()):
            if chunk.sealed_in or final <= chunk.number * self._shard.chunk_tokens:
                continue
            try:
                op = gather_op(self._shard, chunk, final, tables)
            except LookupError:
                self._figures.add("skipped_gone_chunks")
                del record.open[chunk.number]
                continue
            if op is not None:
                advance(chunk, op, step.number)
                step.add_gather(record, chunk, op.seal)
                ops.append(op)
        return ops

    def _harvest(self, client: Client) -> None:
        """Counts the commits whose answers have come."""
        client.pump()
        waiting = []
        for call, states in self._commits:
            if isinstance(call.answer, Committed):
                stored = sum(call.answer.done)
                self._figures.add("stored_states" if states else "stored_chunks", stored)
                self._figures.add("stored_tokens", 0 if states else stored * self._shard.chunk_tokens)
                self._figures.gauge("pool_used_nbytes", call.answer.used_nbytes)
                self._figures.gauge("pool_pinned_nbytes", call.answer.pinned_nbytes)
            elif not call.failed:
                waiting.append((call, states))
        self._commits = waiting
