"""The scheduler's half: decides what is loaded and stored, and is the only one that talks to the store.

Knows nothing about any engine's classes (`doors/vllm/connector.py` translates) and touches no tensor. Every call
returns at once: a store that is slow means "ask again", one that is gone means a miss. What a step stored becomes
readable only when every rank has reported the step and no load in it failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvkeep.core.key import BlockChain, Chain, Digests
from kvkeep.core.layout import ChunkLayout
from kvkeep.engine.link import Link
from kvkeep.engine.plan import LoadOp, Report, Scheduled, StepPlan, Trip
from kvkeep.engine.scheduler.due import DueLoads
from kvkeep.engine.scheduler.estimate import Estimate, Paces
from kvkeep.engine.scheduler.gathers import Gathers
from kvkeep.engine.scheduler.lookups import LookupLimits, Lookups, Request
from kvkeep.engine.scheduler.ops import aligned, built_on
from kvkeep.engine.scheduler.request import Record, State
from kvkeep.engine.scheduler.states import States
from kvkeep.engine.scheduler.stems import Stems
from kvkeep.engine.scheduler.steps import Load, Steps
from kvkeep.telemetry import Figures, Miss
from kvkeep.wire.client import Client

MAX_EMPTY_STEPS = 1000
COPIED_NBYTES_S = 5e9  # about what one core copies; only the order of magnitude matters
LATER_STEPS = 2  # that a request is loaded beside the steps costs it about as many of them

Tables = Sequence[Sequence[int]]


@dataclass(frozen=True)
class PlannerOptions:
    """How the planner decides.

    A request waits at most `deadline_s` for its lookup, tiers included; between two steps all lookups together hold the
    engine up for at most `patience_s`. A request's load is made beside the steps, which go on meanwhile, always
    (`beside_steps`) or when that holds up all requests together for less time (`beside_busy`); else its step waits.
    `early`: a step may wait for what a tier still reads, at most `deadline_s`, if no other request runs.
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
        self._records: dict[str, Record] = {}
        self._stems = Stems(min(group.block_tokens for group in self._shard.groups))
        self._ended: set[Record] = set()  # steps still name them; their names may be in use again
        self._asked_idle = 0
        self._boot = b""
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
        self._lookups = Lookups(link, layout, limits, self._estimate, figures, clock)
        self._stores = Gathers(self._shard, figures, link, options.patience_s, deadline_s=options.deadline_s)

    def awaits_report(self) -> bool:
        """Whether the report of a step is still to come, for an engine that would stop stepping without it.

        One that has not come after many empty steps never will.
        """
        self._asked_idle += 1
        return self._steps.busy and self._asked_idle < MAX_EMPTY_STEPS

    def arrived(self, name: str, tokens: Sequence[int]) -> None:
        """A request has arrived, and may read the blocks of others that begin as it does."""
        self._stems.add(name, tokens)

    def expect(self, request: Request) -> None:
        """A request has arrived: its tokens are hashed now, so that its lookup is one small message."""
        record = self._record(request)
        if record.keeps:
            record.chain.extend(request.tokens)

    def match(self, request: Request, computed: int) -> int | None:
        """How many tokens beyond `computed` can be given, None for "ask again".

        May be asked any number of times; the answer is remembered until `admitted` or `ended`. A positive answer
        covers only chunks that are in the pool, or `early` on their way to it, under a held lease.
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
        if match is None or match.boot != client.welcome.boot or match.first > first or (match.words and shared):
            self._drop_match(record)
            alone = not self._running(record) and not shared
            match = self._lookups.answer(record, request, client, first, alone)
            if match is None:
                return None
            record.match = match
            record.move(State.MATCHED)
        claim, record.why = self._claim(record, request)
        # a step's own load fills blocks that another request of the step may already read
        record.beside = self._options.beside_steps or shared or (claim > 0 and self._pays_beside(record))
        if not claim:
            self._empty_match(record, client)
        return claim

    def loads_beside(self, name: str) -> bool:
        """Whether what was last promised for a request is loaded beside the steps, as of the last `match`."""
        return self._records[name].beside

    def admitted(self, request: Request, external: int, tables: Callable[[], Tables]) -> None:
        """The engine has allocated the request's blocks, `external` tokens of them to be loaded (0: nothing).

        ValueError for tokens that were never promised.
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
        record.move(State.ADMITTED)
        self._stores.resumed(record)
        if client is not None and record.keeps:
            present = range(0) if match is None else range(match.first, match.first + match.hits)
            tokens = request.tokens if self._options.store_generated else request.tokens[: record.prompt_tokens]
            self._stores.wish(record, client, tokens, present)

    def claimed_from(self, name: str) -> dict[str, int]:
        """The tokens last claimed for a request by where they were: "pool", "disk", "remote"."""
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
        self._ran = [one.request for one in scheduled]
        if scheduled:  # without a forward there may be no output to end it
            self._paces.begun([] if ops else [(one.start, one.final) for one in scheduled])
        if self._options.store_generated and client is not None:
            self._wish_generated(scheduled, client)
        stores = self._stores.ops(step, scheduled, self._records, tables, client)
        if self._states is not None and client is not None:
            stores += self._states.store_ops(step, scheduled, self._records, client, self._layout.chunk_tokens)
        self._steps.launch(step)
        boot = client.welcome.boot if client is not None else b""
        offsets = tuple(self._layout.shard_offset(rank) for rank in range(len(self._layout.shards)))
        of_states = self._states.offsets if self._states is not None else ()
        return StepPlan(
            step.number,
            boot,
            offsets,
            loads=tuple(ops),
            stores=tuple(stores),
            trips=tuple(trips),
            idle=not scheduled,
            state_offsets=of_states,
            wait_s=self._options.deadline_s,
        )

    def step_over(self) -> None:
        """The output of a step is in, whether or not there is a report with it."""
        self._paces.over()

    def step_done(self, report: Report, tables: Callable[[str], Tables] = lambda _: ()) -> set[int]:
        """Takes in what ranks have finished; returns the blocks that the engine must forget.

        These are the blocks whose load failed, and those computed from them: `tables` gives a request's block ids.
        """
        self._asked_idle = 0
        done = self._steps.take(report)
        client = self._link.client  # what ends is told to a slow store too, or its leases would never come back
        boot = client.welcome.boot if client is not None else b""
        self._lookups.failed(done.failed_digests(boot))
        if done.failed_early:
            self._lookups.early_failed(done.failed_early)
        if client is not None:
            client.discard(done.failed_digests(boot))
            for lease in done.read_leases(boot):
                client.release(lease)
            self._stores.commit(done.sealed, client)
        for record in done.records:
            self._settle(record)
        return set().union(*(self._lost(owner, blocks, tables) for owner, blocks in done.failed_loads))

    def _lost(self, owner: Record, blocks: frozenset[int], tables: Callable[[str], Tables]) -> set[int]:
        """The blocks of a failed load and all that were computed from them; whoever else reads them stores no more.

        The engine sends `owner` back to before its load. Another reader it may leave where it is.
        """
        lost = set(blocks)
        for record in self._records.values():
            depending = [block for table in tables(record.request) for block in built_on(table, blocks)]
            lost.update(depending)
            if depending and record is not owner:
                self._stores.stop(record)
        return lost

    def ended(self, name: str) -> None:
        """The request is over, whatever became of it: what it held comes back once no step uses it."""
        self._stems.drop(name)
        record = self._records.pop(name, None)
        if record is None:
            return
        self._ended.add(record)
        self._drop_match(record)
        self._lookups.drop(record, self._link.client)
        self._due.drop(record, self._link.client)
        record.move(State.ENDED)
        self._settle(record)

    def reset(self, namespace: bytes, identity: str) -> None:
        """The engine's weights or cache are new: nothing stored so far is given again, nothing under way is kept.

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
        """Not the adapter that their digests name computes these requests: nothing is given to them or kept of them."""
        for record in [self._records[name] for name in names if name in self._records]:
            self._drop_match(record)
            self._lookups.drop(record, self._link.client)
            self._stores.stop(record)
            record.keeps, record.why = False, Miss.ADAPTER

    def close(self) -> None:
        """Ends the session; the engine's workers have stopped."""
        self._link.close()

    def _live(self) -> Client | None:
        """The client if the store may be asked; whatever another start of the store had lent is forgotten first."""
        client = self._link.live(idle=not (self._steps.busy or self._due))  # what is due is planned next
        boot = self._link.client.welcome.boot if self._link.client is not None else b""
        if boot != self._boot:
            if self._boot:
                self.figures.add("store_losses")
            self._boot = boot
            self._size_up()
            for record in (*self._records.values(), *self._ended):
                record.match = record.question = None
                self._stores.forget(record)
        return client

    def _size_up(self) -> None:
        """Sets the gauges to another start of the store, which is empty, or to none."""
        client = self._link.client
        self.figures.gauge("pool_nbytes", client.welcome.pool_nbytes if client is not None else 0)
        self.figures.gauge("pool_used_nbytes", 0)
        self.figures.gauge("pool_pinned_nbytes", 0)

    def _record(self, request: Request) -> Record:
        record = self._records.get(request.name)
        if record is None:
            tokens, hashes = self._layout.chunk_tokens, request.block_hashes
            doubt = Miss.BYPASS if self._options.bypass else request.root if isinstance(request.root, Miss) else None
            root = request.root if isinstance(request.root, bytes) else b""
            chain: Digests = Chain(tokens, root, request.extra_keys)
            if hashes is not None:
                chain = BlockChain(tokens, hashes)
            record = Record(request.name, chain, request.prompt_tokens)
            self.arrived(request.name, request.tokens)
            if doubt is not None:
                record.keeps, record.stores, record.why = False, False, doubt
            self._records[request.name] = record
        return record

    def _claim(self, record: Record, request: Request) -> tuple[int, Miss | None]:
        """What the engine may be promised of a match, and why it is not all of the prompt's whole chunks."""
        match, tokens = record.match, self._layout.chunk_tokens
        assert match is not None
        if not match.offsets:
            return 0, match.why
        if not aligned(self._shard, record.computed):
            return 0, Miss.UNALIGNED
        hit = (match.first + len(match.offsets)) * tokens
        # never all of them: the engine computes the last token, and its window reaches one token further back
        claim = min(hit, len(request.tokens) - 1) - record.computed
        if claim < max(1, self._options.min_hit_tokens):
            return 0, Miss.SMALL
        return claim, (match.why or Miss.PARTLY_STORED) if hit < self._lookups.reach(request) * tokens else None

    def _empty_match(self, record: Record, client: Client) -> None:
        """Remembers that there is nothing to give, without holding anything."""
        match = record.match
        assert match is not None
        if match.lease:
            for lease in match.leases:
                client.release(lease)
            record.match = match._replace(lease=0, offsets=(), sums={}, why=record.why, state=None, words={})

    def _pays_beside(self, record: Record) -> bool:
        """Whether those that run would wait longer for this load, all together, than it would for their steps."""
        match, step_s = record.match, self._paces.step_s
        if not self._options.beside_busy or match is None or match.words or step_s is None:
            return False
        load_s = len(match.offsets) * self._layout.nbytes / COPIED_NBYTES_S
        return self._running(record) * load_s > LATER_STEPS * step_s

    def _running(self, record: Record) -> int:
        """How many other requests were computed in the last step and go on."""
        return sum(name in self._records for name in self._ran if name != record.request)

    def _trip(self, record: Record, load: Load) -> Trip:
        step = self._steps.begin(beside=True)
        step.add_load(record, load, 0)
        self._steps.launch(step)
        return Trip(step.number, load.ops)

    def _wish_generated(self, scheduled: Sequence[Scheduled], client: Client) -> None:
        for one in scheduled:
            record = self._records.get(one.request)
            if record is not None and one.final // self._layout.chunk_tokens > record.reserved_to:
                self._stores.wish(record, client, one.tokens[: one.final], range(0))

    def _drop_match(self, record: Record) -> None:
        """Gives back what a lookup holds, if the store that lent it is still there."""
        client = self._link.client
        match, record.match = record.match, None
        if client is not None and match is not None and match.boot == client.welcome.boot:
            for lease in match.leases:
                client.release(lease)

    def _settle(self, record: Record) -> None:
        """Gives back what an ended request reserved, once no step that names it is under way."""
        if record.state is not State.ENDED or record.steps:
            return
        client = self._link.client
        if client is not None:
            self._stores.give_up(record, client)
        self._ended.discard(record)
