"""The scheduler's half of an engine: decides what to scatter and gather, and alone talks to the store.

Every call returns at once: a slow store means "ask again", one that is gone means a miss. The chunks that a step
gathered become readable only when every rank has reported the step and no load in it failed. Knows nothing about any
engine's classes (`doors/vllm/connector.py` translates) and touches no tensor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvkeep.core.key import BlockChain, Chain, Digests
from kvkeep.core.layout import ChunkLayout
from kvkeep.engine.link import Link
from kvkeep.engine.plan import LoadOp, Report, Scheduled, StepPlan, Trip
from kvkeep.engine.scheduler.claims import claim_of, pays_beside
from kvkeep.engine.scheduler.due import DueLoads
from kvkeep.engine.scheduler.estimate import Estimate, Paces
from kvkeep.engine.scheduler.gathers import Gathers
from kvkeep.engine.scheduler.lookups import LookupLimits, Lookups, Request
from kvkeep.engine.scheduler.ops import Tables, built_on
from kvkeep.engine.scheduler.request import Match, RequestRecord
from kvkeep.engine.scheduler.states import States
from kvkeep.engine.scheduler.stems import Stems
from kvkeep.engine.scheduler.steps import Load, Steps
from kvkeep.telemetry import Figures, Miss, Source
from kvkeep.wire.client import Client
from kvkeep.wire.messages import StoreLease

MAX_EMPTY_STEPS = 1000


@dataclass(frozen=True)
class PlannerOptions:
    """How the planner decides.

    A request waits at most `deadline_s` for its lookup, tiers included; between two steps all lookups together hold the
    engine up for at most `patience_s`. A load is made beside the steps, which go on meanwhile, always (`beside_steps`)
    or where all requests together wait less (`beside_busy`); else its step waits for it. `early`: a step may wait for
    chunks that a tier still reads, at most `deadline_s`, if no other request runs.
    """

    deadline_s: float = 0.5
    patience_s: float = 0.005
    store_generated: bool = False
    min_hit_tokens: int = 0
    beside_steps: bool = False
    beside_busy: bool = False
    bypass: bool = False
    early: bool = False


class Planner:
    """One engine's planner over `link`; `layout` is that of whole chunks, `states` that of a state, all ranks.

    Block tables have the groups of chunks first, then those of states.
    """

    def __init__(
        self,
        link: Link,
        layout: ChunkLayout,
        options: PlannerOptions,
        figures: Figures,
        clock: Callable[[], float] = time.monotonic,
        states: ChunkLayout | None = None,
    ) -> None:
        self._link = link
        self._layout = layout
        self._shard = layout.shards[0]  # all ranks have the same groups and block tables
        self._options = options
        self._clock = clock
        self._records: dict[str, RequestRecord] = {}
        self._stems = Stems(min(group.block_tokens for group in self._shard.groups))
        self._ended: set[RequestRecord] = set()  # steps still name them; their names may be in use again
        self._asked_idle = 0
        self._client: Client | None = None  # as of the last call
        self.figures = figures
        self._steps = Steps(len(layout.shards), figures)
        self._estimate = Estimate()
        self._paces = Paces(self._estimate, clock)
        self._ran: list[str] = []
        self._states: States | None = None
        if states is not None:
            self._states = States(states, figures, link, options.patience_s, deadline_s=options.deadline_s)
        self._due = DueLoads(layout, self._states)
        limits = LookupLimits(options.deadline_s, options.patience_s, states is not None, options.early)
        self._size_up()
        self._lookups = Lookups(link, layout, limits, self._estimate, figures=figures, clock=clock)
        self._gathers = Gathers(self._shard, figures, link, options.patience_s, deadline_s=options.deadline_s)

    def awaits_report(self) -> bool:
        """Whether the report of a step is still to come, so that the engine must go on stepping.

        A report that has not come after many empty steps never will.
        """
        self._asked_idle += 1
        return self._steps.busy and self._asked_idle < MAX_EMPTY_STEPS

    def announce(self, name: str, tokens: Sequence[int]) -> None:
        """Takes in a new request, which may read the blocks of others that begin with the same tokens."""
        self._stems.add(name, tokens)

    def expect(self, request: Request) -> None:
        """Hashes a new request's tokens, so that its lookup later is only a message."""
        record = self._record(request)
        if record.keeps:
            record.chain.extend(request.tokens)

    def match(self, request: Request, computed: int) -> int | None:
        """How many tokens beyond `computed` the engine can get; None: ask again.

        Any number of calls get the same answer until `admit` or `end`. A positive answer covers only chunks that
        are in the pool, or `early` on their way to it, under a lease.
        """
        record = self._record(request)
        client = self._live()
        record.computed = computed
        if not request.reads:
            record.why = record.why or Miss.UNREAD
            return 0
        if not record.keeps or client is None:
            record.why = record.why if not record.keeps else Miss.DEADLINE if self._link.slow else Miss.STORE_GONE
            return 0
        first = computed // self._layout.chunk_tokens
        shared = self._stems.shared(request.name)
        match = record.match
        if match is None or not client.lent(match.lease) or match.first > first or (match.progress and shared):
            self._drop_match(record)
            alone = not self._running(record) and not shared
            match = self._lookups.answer(record, request, client, first, alone=alone)
            if match is None:
                return None
            record.match = match
        claim = claim_of(
            self._layout,
            match,
            computed,
            len(request.tokens),
            reach=self._lookups.reach(request),
            least=self._options.min_hit_tokens,
        )
        record.why = claim.why
        # a step's own load fills blocks that another request of the step may already read
        record.beside = self._options.beside_steps or shared or (claim.tokens > 0 and self._pays_beside(record, match))
        if not claim.tokens and match.lease:
            # remember that there is nothing to give, and hold nothing for it
            for lease in match.leases:
                client.release(lease)
            record.match = Match(match.first, StoreLease(match.lease.boot, 0), hits=match.hits, why=record.why)
        return claim.tokens

    def loads_beside(self, name: str) -> bool:
        """Whether a request's claim is loaded beside the steps, as of its last `match`."""
        return self._records[name].beside

    def admit(self, request: Request, external: int, tables: Callable[[], Tables]) -> None:
        """Takes in that the engine has allocated a request's blocks, for `external` tokens to be loaded (0: none).

        ValueError for tokens that `match` did not promise.
        """
        record = self._record(request)
        client = self._link.client
        match = record.match
        if external > 0:
            if match is None:
                raise ValueError(f"request {request.name}: {external} tokens were never offered")
            record.match = None
            self._due.add(record, match, external, tables())
            counter = "claimed_after_preemption_tokens" if request.preempted else "claimed_first_tokens"
            self.figures.add(counter, external)
        else:
            self._drop_match(record)
        self._lookups.drop(record, client)
        if record.why is not None:
            self.figures.miss(record.why)
            record.why = None
        self._gathers.refill(record)
        if client is not None and record.keeps:
            present = range(0) if match is None else range(match.first, match.first + match.hits)
            tokens = request.tokens if self._options.store_generated else request.tokens[: record.prompt_tokens]
            self._gathers.wish(record, client, tokens, present)

    def claimed_from(self, name: str) -> Mapping[Source, int]:
        """The tokens last claimed for a request, by where they were."""
        record = self._records.get(name)
        return record.claimed_from if record is not None else {}

    def plan_step(self, scheduled: Sequence[Scheduled], tables: Callable[[str], Tables]) -> StepPlan:
        """The copies of the step that the engine is about to run. `tables` gives a request's block ids by group."""
        client = self._live()
        self._lookups.next_step()
        loads = self._due.take()
        step = self._steps.begin()
        ops: list[LoadOp] = []
        trips: list[Trip] = []
        for record, load in loads:
            if load.beside:
                trips.append(self._trip(record, load))
            else:
                step.add_load(record, load, len(ops))
                ops += load.ops
        self._ran = [request.request for request in scheduled]
        if scheduled:  # without a forward there may be no output to end it
            self._paces.begin([] if ops else [(request.start, request.final) for request in scheduled])
        if self._options.store_generated and client is not None:
            self._wish_generated(scheduled, client)
        stores = self._gathers.ops(step, scheduled, self._records, tables, client=client)
        if self._states is not None and client is not None:
            stores += self._states.gather_ops(
                step, scheduled, self._records, client, chunk_tokens=self._layout.chunk_tokens
            )
        self._steps.launch(step)
        return StepPlan(
            step.number,
            client.welcome.boot if client is not None else b"",
            tuple(self._layout.shard_offset(rank) for rank in range(len(self._layout.shards))),
            loads=tuple(ops),
            stores=tuple(stores),
            trips=tuple(trips),
            idle=not scheduled,
            state_offsets=self._states.offsets if self._states is not None else (),
            wait_s=self._options.deadline_s,
        )

    def step_over(self) -> None:
        """Ends the time of a step, whose output is in, whether or not a report came with it."""
        self._paces.end()

    def step_done(self, report: Report, tables: Callable[[str], Tables] = lambda _: ()) -> set[int]:
        """Takes in what ranks have finished; returns the blocks that the engine must forget.

        These are the blocks whose load failed, and those computed from them (`tables` has each request's block ids).
        """
        self._asked_idle = 0
        done = self._steps.take(report)
        client = self._link.client  # also a slow store must learn what has ended, or its leases never come back
        if done.failed_early:
            self._lookups.add_early_failures(done.failed_early)
        if client is not None:
            # a load from another start of the store fails for want of its pool, which says nothing about the chunk
            failed = [digest for lease, digest in done.failed_chunks if client.lent(lease)]
            self._lookups.add_failures(failed)
            client.discard(failed)
            for lease in done.leases:
                client.release(lease)
            self._gathers.commit(done.sealed, client)
        for record in done.records:
            self._settle(record)
        return set().union(*(self._lost(owner, blocks, tables) for owner, blocks in done.failed_loads))

    def _lost(self, owner: RequestRecord, blocks: frozenset[int], tables: Callable[[str], Tables]) -> set[int]:
        """The blocks of a failed load and all blocks computed from them.

        The engine sends `owner` back to before its load, and may leave another reader where it is, which therefore
        stores nothing more.
        """
        lost = set(blocks)
        for record in self._records.values():
            depending = [block for table in tables(record.request) for block in built_on(table, blocks)]
            lost.update(depending)
            if depending and record is not owner:
                self._gathers.stop(record)
        return lost

    def end(self, name: str) -> None:
        """Ends a request, whatever became of it; what it held comes back once no step uses it."""
        self._stems.drop(name)
        record = self._records.pop(name, None)
        if record is None:
            return
        self._ended.add(record)
        self._drop_match(record)
        self._lookups.drop(record, self._link.client)
        self._due.drop(record, self._link.client)
        record.ended = True
        self._settle(record)

    def reset(self, namespace: bytes, identity: str) -> None:
        """Gives nothing stored so far to this engine again, and keeps nothing under way: its weights or cache are new.

        `namespace` is one that nobody else has, or will have.
        """
        self.figures.add("resets")
        client = self._link.client
        for record in self._records.values():
            self._drop_match(record)
            self._lookups.drop(record, client)
            record.stores = False
        self._steps.taint()
        self._lookups.forget_failures()
        self._link.begin_anew(namespace, identity)

    def doubt(self, names: Iterable[str]) -> None:
        """Gives nothing to these requests and keeps nothing of them: another adapter computes them than they name."""
        for record in [self._records[name] for name in names if name in self._records]:
            self._drop_match(record)
            self._lookups.drop(record, self._link.client)
            self._gathers.stop(record)
            record.keeps, record.why = False, Miss.ADAPTER

    def close(self) -> None:
        """Ends the session; the engine's workers have stopped."""
        self._link.close()

    def _live(self) -> Client | None:
        """The client if the store may be asked. Forgets all that another session held before."""
        client = self._link.live(idle=not (self._steps.busy or self._due))  # due loads are planned next
        if self._link.client is not self._client:
            if self._client is not None:
                self.figures.add("store_losses")
            self._size_up()
            for record in (*self._records.values(), *self._ended):
                record.match = record.question = None
                self._gathers.forget(record)
        return client

    def _size_up(self) -> None:
        """Sets the gauges to the pool of another session, or to none."""
        client = self._client = self._link.client
        self.figures.gauge("pool_nbytes", client.welcome.pool_nbytes if client is not None else 0)
        self.figures.gauge("pool_used_nbytes", 0)
        self.figures.gauge("pool_pinned_nbytes", 0)

    def _record(self, request: Request) -> RequestRecord:
        record = self._records.get(request.name)
        if record is None:
            tokens, hashes = self._layout.chunk_tokens, request.block_hashes
            doubt = Miss.BYPASS if self._options.bypass else request.root if isinstance(request.root, Miss) else None
            root = request.root if isinstance(request.root, bytes) else b""
            chain: Digests = Chain(tokens, root, request.extra_keys)
            if hashes is not None:
                chain = BlockChain(tokens, hashes)
            record = RequestRecord(request.name, chain, request.prompt_tokens)
            self.announce(request.name, request.tokens)
            if doubt is not None:
                record.keeps, record.stores, record.why = False, False, doubt
            self._records[request.name] = record
        return record

    def _pays_beside(self, record: RequestRecord, match: Match) -> bool:
        """Whether a load beside the steps costs all requests together less than one within the next step."""
        step_s = self._paces.step_s
        if not self._options.beside_busy or match.progress or step_s is None:
            return False
        return pays_beside(self._layout, match.offsets, self._running(record), step_s)

    def _running(self, record: RequestRecord) -> int:
        """How many other requests ran in the last step and go on."""
        return sum(name in self._records for name in self._ran if name != record.request)

    def _trip(self, record: RequestRecord, load: Load) -> Trip:
        step = self._steps.begin(beside=True)
        step.add_load(record, load, 0)
        self._steps.launch(step)
        return Trip(step.number, load.ops)

    def _wish_generated(self, scheduled: Sequence[Scheduled], client: Client) -> None:
        for request in scheduled:
            record = self._records.get(request.request)
            if record is not None and request.final // self._layout.chunk_tokens > record.reserved_to:
                self._gathers.wish(record, client, request.tokens[: request.final], range(0))

    def _drop_match(self, record: RequestRecord) -> None:
        """Releases the leases of a request's match."""
        client = self._link.client
        match, record.match = record.match, None
        if client is not None and match is not None:
            for lease in match.leases:
                client.release(lease)

    def _settle(self, record: RequestRecord) -> None:
        """Releases the reservations of an ended request, once no step under way names it."""
        if not record.ended or record.steps:
            return
        client = self._link.client
        if client is not None:
            self._gathers.give_up(record, client)
        self._ended.discard(record)
