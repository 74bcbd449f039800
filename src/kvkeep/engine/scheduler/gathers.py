"""Which chunks of which request are being filled, from the reservation to the commit.

Knows nothing about lookups or loads. A chunk is reserved when its request is admitted, gathered by the steps that fill
it, and committed when the step that sealed it is done; whatever is not committed is given up with its request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kvkeep.core.layout import ShardLayout
from kvkeep.engine.link import Link
from kvkeep.engine.plan import Scheduled, StoreOp
from kvkeep.engine.scheduler.ops import Tables, advance, rewind, store_op
from kvkeep.engine.scheduler.request import OpenChunk, Record
from kvkeep.engine.scheduler.steps import Sealed, Step
from kvkeep.telemetry import Figures
from kvkeep.wire.client import Call, Client
from kvkeep.wire.messages import BUSY, NO_ROOM, PRESENT, Committed, Granted

_SKIPPED = {PRESENT: "skipped_present_chunks", BUSY: "skipped_present_chunks", NO_ROOM: "skipped_full_chunks"}


class Gathers:
    """The chunks in the making of one engine.

    A step waits at most `patience_s` for reservations that it could use. A store that has not answered one within
    `deadline_s` is left alone until it has caught up.
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

    def wish(self, record: Record, client: Client, tokens: Sequence[int], present: range) -> None:
        """Asks for room for the whole chunks of `tokens` that are not `present` and were not asked for before."""
        if not record.stores or record.reservation is not None:
            return
        upto = len(tokens) // self._shard.chunk_tokens
        if len(record.chain.digests) < upto:
            record.chain.extend(tokens)
            upto = min(upto, len(record.chain.digests))
        numbers = [number for number in range(record.reserved_to, upto) if number not in present]
        record.reserved_to = max(record.reserved_to, upto)
        if numbers:
            record.wanted = numbers
            record.reserved_at_s = self._link.clock()
            record.reservation = client.reserve([record.chain.digests[number] for number in numbers])

    def resumed(self, record: Record) -> None:
        """The request has new blocks: its open chunks are filled from their start again."""
        for chunk in record.open.values():
            rewind(chunk)

    def ops(
        self,
        step: Step,
        scheduled: Sequence[Scheduled],
        records: Mapping[str, Record],
        tables: Callable[[str], Tables],
        client: Client | None,
    ) -> list[StoreOp]:
        """The step's gathers; a chunk whose blocks are gone is given up."""
        ops: list[StoreOp] = []
        if client is None:
            return ops
        self._harvest(client)
        patience_s = self._patience_s
        for one in scheduled:
            record = records.get(one.request)
            if record is None or not record.stores:
                continue
            if record.reservation is not None and not self._granted(record, client, patience_s):
                patience_s = 0.0  # one wait a step
            if record.open:
                ops += self._request_ops(step, record, one.final, tables(one.request))
        return ops

    def commit(self, sealed: Sequence[Sealed], client: Client) -> None:
        """Makes sealed chunks readable: one message a write lease."""
        by_lease: dict[int, list[Sealed]] = {}
        for one in sealed:
            making = one.record.states if one.chunk.state else one.record.open
            if making.pop(one.chunk.number, None) is one.chunk and one.record.boot == client.welcome.boot:
                by_lease.setdefault(one.chunk.lease, []).append(one)
        for lease, ones in by_lease.items():
            call = client.commit(lease, [one.chunk.place for one in ones], [one.sums for one in ones])
            self._commits.append((call, ones[0].chunk.state))
        self._harvest(client)

    def stop(self, record: Record) -> None:
        """The request may compute on wrong blocks from here on: nothing more of it is stored.

        What it reserved comes back at its end, since a step under way may still be gathering into it.
        """
        record.stores = False
        record.open.clear()
        record.states.clear()

    def forget(self, record: Record) -> None:
        """Drops what a store that is gone had reserved; its lease numbers mean nothing to another one."""
        record.reservation = None
        record.reserved_to = 0
        record.write_leases.clear()
        record.open.clear()
        record.states.clear()

    def give_up(self, record: Record, client: Client) -> None:
        """Releases what the request reserved; what it did not commit is lost."""
        if record.reservation is not None:
            client.abandon(record.reservation)
            record.reservation = None
        if record.boot == client.welcome.boot:
            for lease in record.write_leases:
                client.release(lease)
        record.write_leases.clear()
        record.open.clear()
        record.states.clear()

    def _granted(self, record: Record, client: Client, patience_s: float) -> bool:
        """Opens the chunks that were reserved; False if the answer has not come (the next step can still gather)."""
        call = record.reservation
        assert call is not None
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
            record.boot = client.welcome.boot
        groups = len(self._shard.groups)
        for place, (number, offset) in enumerate(zip(record.wanted, answer.offsets, strict=False)):
            if offset >= 0:
                record.open[number] = OpenChunk(number, answer.lease, place, offset, [0] * groups)
            elif offset in _SKIPPED:
                self._figures.add(_SKIPPED[offset])
        return True

    def _request_ops(self, step: Step, record: Record, final: int, tables: Tables) -> list[StoreOp]:
        ops = []
        for chunk in list(record.open.values()):
            if chunk.sealed_in or final <= chunk.number * self._shard.chunk_tokens:
                continue
            try:
                op = store_op(self._shard, chunk, final, tables)
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
        """Counts the commits whose answer has come."""
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
