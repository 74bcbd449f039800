"""The planner against a real store in a thread, driven by hand as an engine would drive it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from kvkeep.core.key import BlockHashes, Chain, none_hash
from kvkeep.core.layout import ChunkLayout, GroupLayout, LayerLayout, ShardLayout
from kvkeep.engine.link import FIRST_PAUSE_S, Link
from kvkeep.engine.plan import LoadsDone, Report, Scheduled, StepPlan, StoresDone
from kvkeep.engine.scheduler.lookups import Request
from kvkeep.engine.scheduler.planner import Planner, PlannerOptions
from kvkeep.engine.scheduler.request import Match
from kvkeep.telemetry import Figures, Miss, by_flat_name
from kvkeep.testing.doubles.store_thread import ThreadSource
from kvkeep.testing.doubles.transfers import ManualClock
from kvkeep.wire.messages import Hello, Matched, Stats, StoreLease

CHUNK, BLOCK, ROOM = 256, 16, 32
LIMIT_S = 20.0
OLD, NEW = b"o" * 16, b"n" * 16


def shard(*groups: tuple[int, int]) -> ShardLayout:
    layers = (LayerLayout("a", (64,)), LayerLayout("b", (64,)))
    return ShardLayout(CHUNK, tuple(GroupLayout(tokens, window, layers) for tokens, window in groups))


def table(tokens: int, base: int = 1) -> list[list[int]]:
    return [list(range(base, base + -(-tokens // BLOCK)))]


@dataclass
class Bench:
    """A planner with `ranks` ranks over a store of `room` chunks, time that stands still, and what it waited for."""

    ranks: int = 1
    room: int = ROOM
    groups: tuple[tuple[int, int], ...] = ((BLOCK, 0),)
    options: PlannerOptions = field(default_factory=lambda: PlannerOptions(patience_s=LIMIT_S))
    verify_every: int = 0
    clock: ManualClock = field(default_factory=ManualClock)
    asked: list[int] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layout = ChunkLayout((shard(*self.groups),) * self.ranks)
        self.source = ThreadSource(self.room * self.layout.nbytes, max_pinned_share=1.0)
        self.link = Link(self.source, self.hello, [], self.clock)
        self.link.start(LIMIT_S)
        self.watch()
        self.planner = Planner(self.link, self.layout, self.options, Figures(), self.clock)

    def hello(self, resumes: int) -> Hello:
        holders = [os.getpid()]
        return Hello(
            name="planner",
            namespace=OLD,
            identity="",
            chunk_nbytes=self.layout.nbytes,
            holders=holders,
            verify_every=self.verify_every,
            resumes=resumes,
        )

    def watch(self) -> None:
        """Notes how many digests each fetch asks for, and how long each call may wait."""
        client = self.link.client
        assert client is not None
        fetch, wait = client.fetch, client.wait

        def fetching(digests: Sequence[bytes], deadline_s: float, limit_s: float, early: bool) -> Any:
            self.asked.append(len(digests))
            return fetch(digests, deadline_s, limit_s, early)

        def waiting(call: Any, limit_s: float) -> Any:
            self.waits.append(limit_s)
            return wait(call, limit_s)

        client.fetch, client.wait = fetching, waiting  # type: ignore[method-assign]

    def figures(self) -> dict[str, int]:
        """The store's own, after it has proved that its index adds up."""
        client = self.link.client
        assert client is not None
        answer = type(client).wait(client, client.stats(check=True), LIMIT_S)
        assert isinstance(answer, Stats)
        assert answer.problem == ""
        return answer.figures

    def at_rest(self) -> bool:
        now = self.figures()
        return now["pinned_nbytes"] == now["writing_nbytes"] == now["dead_nbytes"] == 0

    def count(self, name: str) -> int:
        return self.planner.figures.count(name)

    def misses(self) -> dict[str, int]:
        return self.planner.figures.misses()

    # -- what an engine does

    def match(self, request: Request, computed: int = 0) -> int:
        """Asks until there is an answer."""
        while (given := self.planner.match(request, computed)) is None:
            pass
        return given

    def admit(self, request: Request, external: int = 0, tables: list[list[int]] | None = None) -> None:
        self.planner.admit(request, external, lambda: tables or table(len(request.tokens)))

    def plan(self, request: Request, final: int, tables: list[list[int]] | None = None) -> StepPlan:
        scheduled = [Scheduled(request.name, final, request.tokens)]
        return self.planner.plan_step(scheduled, lambda _: tables or table(len(request.tokens)))

    def report(self, plan: StepPlan, failed: Sequence[int] = (), ranks: Sequence[int] | None = None) -> Report:
        """What these ranks say of a plan: all sums, and these places of its loads as failed."""
        report = Report()
        for rank in range(self.ranks) if ranks is None else ranks:
            if plan.loads:
                report.loads.append(LoadsDone(plan.step, rank, tuple(failed)))
            if plan.stores:
                sums = {place: sums_of(rank, op.offset) if op.seal else b"" for place, op in enumerate(plan.stores)}
                report.stores.append(StoresDone(plan.step, rank, sums))
        return report

    def done(self, plan: StepPlan, failed: Sequence[int] = (), ranks: Sequence[int] | None = None) -> set[int]:
        return self.planner.step_done(self.report(plan, failed, ranks))

    def keep(self, tokens: Sequence[int], name: str = "writer") -> None:
        """One request that stores all whole chunks of these tokens in one step, and ends."""
        request = asking(name, tokens)
        self.match(request)
        self.admit(request)
        self.figures()  # the answer to its reservation is here
        self.done(self.plan(request, len(tokens)))
        self.planner.end(name)
        assert self.at_rest()

    def lose_store(self) -> None:
        """The store's end of the socket closes, as when its process is killed."""
        assert self.link.client is not None
        self.link.client.sock.shutdown(2)
        self.link.client.pump()
        assert not self.link.client.alive

    def find_store(self) -> None:
        """Another store is there; a new boot."""
        self.clock.advance(FIRST_PAUSE_S + 0.1)
        for _ in range(1_000_000):
            if self.link.live(idle=True) is not None:
                self.watch()
                return
        raise AssertionError("no new store")


def sums_of(rank: int, offset: int) -> bytes:
    return b"".join(bytes([rank * 16 + n]) * 15 + bytes([offset // 4096 % 256]) for n in range(2))


def asking(name: str, tokens: Sequence[int], preempted: bool = False, prompt: int | None = None) -> Request:
    return Request(name, tokens, len(tokens) if prompt is None else prompt, none_hash(), preempted=preempted)


@contextmanager
def bench_of(**parts: Any) -> Iterator[Bench]:
    bench = Bench(**parts)
    try:
        yield bench
    finally:
        bench.planner.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    with bench_of() as made:
        yield made


@pytest.fixture
def hasty() -> Iterator[Bench]:
    """A bench whose planner hardly waits, for stores that stand still."""
    with bench_of(options=PlannerOptions(patience_s=0.01, deadline_s=0.5)) as made:
        yield made


@contextmanager
def mute(bench: Bench, verb: str) -> Iterator[None]:
    """The store stands still at the next call of `verb` until the end of the context."""
    running, gate = bench.source.running, threading.Event()
    answer = getattr(running.store, verb)

    def stands_still(*arguments: Any) -> Any:
        assert gate.wait(LIMIT_S)
        return answer(*arguments)

    setattr(running.store, verb, stands_still)
    try:
        yield
    finally:
        setattr(running.store, verb, answer)
        gate.set()


# ---- what is promised ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own_hit", "stored", "prompt", "given", "miss"),
    [
        (0, 512, 700, 512, None),
        (272, 512, 700, 240, None),
        (512, 512, 700, 0, None),
        (600, 512, 700, 0, None),
        (0, 0, 700, 0, "not_stored"),
        (0, 256, 700, 256, "partly_stored"),
        (0, 512, 512, 511, None),
        (256, 512, 512, 255, None),
        (496, 512, 512, 15, None),
        (0, 512, 513, 512, None),
        (264, 512, 700, 0, "unaligned"),
        (0, 512, 255, 0, "short"),
    ],
)
def test_the_arithmetic_of_a_claim(
    bench: Bench, own_hit: int, stored: int, prompt: int, given: int, miss: str | None
) -> None:
    tokens = list(range(1000))
    if stored:
        bench.keep(tokens[:stored])
    before = bench.misses()
    request = asking("r", tokens[:prompt])
    assert bench.planner.match(request, own_hit) == given
    bench.admit(request, given)
    new = {why: count - before.get(why, 0) for why, count in bench.misses().items() if count != before.get(why, 0)}
    assert new == ({miss: 1} if miss else {})
    assert bench.count("claimed_first_tokens") == given
    assert bench.count("covered") == (own_hit >= 512 and prompt == 700), "vLLM itself had all: that is no miss"
    plan = bench.plan(request, prompt)
    assert sum(len(run.block_ids) for op in plan.loads for run in op.blocks) == -(-given // BLOCK)
    bench.done(plan)
    bench.planner.end("r")
    assert bench.at_rest()


def test_asked_sixty_times_it_looks_up_once(bench: Bench) -> None:
    bench.keep(range(512))
    bench.asked.clear()
    request = asking("r", range(700))
    assert [bench.planner.match(request, 0) for _ in range(60)] == [512] * 60
    assert [bench.planner.match(asking("miss", range(1, 700)), 0) for _ in range(60)] == [0] * 60
    assert bench.asked == [2, 2]
    assert bench.figures()["pinned_nbytes"] == 2 * bench.layout.nbytes
    bench.admit(asking("miss", range(1, 700)))
    assert bench.misses() == {"not_stored": 2}


def test_a_match_follows_the_engine_s_own_hit(bench: Bench) -> None:
    bench.keep(range(768))
    bench.asked.clear()
    request = asking("r", range(800))
    assert bench.planner.match(request, 0) == 768
    assert bench.planner.match(request, 272) == 496, "the engine has more by now"
    assert bench.planner.match(request, 16) == 752
    assert bench.asked == [3]
    later = asking("later", range(800))
    assert bench.planner.match(later, 512) == 256
    assert bench.planner.match(later, 0) == 768, "the engine has less by now: the head is looked up as well"
    assert bench.asked == [3, 1, 3]
    for name in ("r", "later"):
        bench.planner.end(name)
    assert bench.at_rest()


def test_a_hit_below_the_least_is_none_and_holds_nothing() -> None:
    with bench_of(options=PlannerOptions(patience_s=LIMIT_S, min_hit_tokens=300)) as bench:
        bench.keep(range(512))
        assert bench.planner.match(asking("r", range(600)), 256) == 0
        assert bench.at_rest()
        bench.admit(asking("r", range(600)))
        assert bench.misses()["small"] == 1
        assert bench.planner.match(asking("s", range(600)), 0) == 512


@pytest.mark.parametrize(
    ("options", "root", "why"),
    [(PlannerOptions(bypass=True), none_hash(), "bypass"), (PlannerOptions(), Miss.ADAPTER, "adapter")],
)
def test_what_must_not_be_kept_is_neither_looked_up_nor_stored(
    options: PlannerOptions, root: bytes | Miss, why: str
) -> None:
    with bench_of(options=options) as bench:
        request = Request("r", range(600), 600, root)
        bench.planner.expect(request)
        assert bench.planner.match(request, 0) == 0
        bench.admit(request)
        assert bench.plan(request, 600).stores == ()
        assert bench.asked == []
        assert bench.misses() == {why: 1}


def test_a_request_that_wants_every_token_computed_is_stored_and_not_looked_up(bench: Bench) -> None:
    request = replace(asking("r", range(600)), reads=False)
    bench.keep(range(256))
    bench.asked.clear()
    assert bench.match(request) == 0
    bench.admit(request)
    bench.figures()
    assert len(bench.plan(request, 600).stores) == 1
    assert bench.asked == []
    assert bench.misses() == {"not_stored": 1, "unread": 1}
    bench.planner.end("r")


def test_a_preempted_request_is_asked_for_again_with_what_it_has_generated(bench: Bench) -> None:
    first = asking("r", range(300))
    assert bench.planner.match(first, 0) == 0
    bench.admit(first)
    bench.done(bench.plan(first, 300))
    again = asking("r", range(330), preempted=True, prompt=300)
    assert bench.planner.match(again, 0) == 256
    bench.admit(again, 256)
    assert (bench.count("claimed_first_tokens"), bench.count("claimed_after_preemption_tokens")) == (0, 256)
    plan = bench.plan(again, 330)
    assert len(plan.loads) == 1
    assert plan.stores == ()
    bench.done(plan)
    bench.planner.end("r")
    assert bench.at_rest()


def test_a_preempted_request_fills_its_chunk_from_its_new_blocks() -> None:
    options = PlannerOptions(patience_s=LIMIT_S, beside_steps=True)
    with bench_of(groups=((BLOCK, 0), (BLOCK, 512)), options=options) as bench:
        request = asking("r", range(300))
        bench.planner.match(request, 0)
        bench.admit(request)
        first = bench.plan(request, 100, [*table(300), *table(300, base=50)])
        assert [(run.group, len(run.block_ids)) for run in first.stores[0].blocks] == [(1, 6)]
        bench.done(first)
        again = asking("r", range(300), preempted=True)
        assert bench.planner.match(again, 0) == 0
        bench.admit(again)
        (op,) = bench.plan(again, 300, [*table(300, base=100), *table(300, base=150)]).stores
        assert [tuple(run.block_ids) for run in op.blocks] == [tuple(range(100, 116)), tuple(range(150, 166))]


def test_a_request_that_is_loaded_beside_the_steps_is_admitted_twice() -> None:
    options = PlannerOptions(patience_s=LIMIT_S, beside_steps=True)
    with bench_of(groups=((BLOCK, 0), (BLOCK, 64)), options=options) as bench:
        both = [*table(512), *table(512, base=50)]
        request = asking("w", range(512))
        assert bench.planner.match(request, 0) == 0
        bench.admit(request, tables=both)
        bench.done(bench.plan(request, 512, both))
        again = asking("r", range(600))
        assert bench.planner.match(again, 0) == 512
        windowed = [table(600)[0], [0] * 28 + list(range(80, 90))]
        bench.admit(again, 512, windowed)
        plan = bench.planner.plan_step([], lambda _: windowed)
        (trip,) = plan.trips
        assert [[run.group for run in op.blocks] for op in trip.loads] == [[0], [0, 1]]
        assert bench.done(StepPlan(trip.number, loads=trip.loads), failed=[0]) == set(), (
            "loads beside the steps are in no prefix cache yet"
        )
        assert bench.planner.match(asking("s", range(600)), 0) == 0, "a chunk that failed is not offered again"
        bench.admit(again, 0, windowed)
        assert bench.count("failed_tokens") == 512
        for name in ("w", "r", "s"):
            bench.planner.end(name)
        assert bench.at_rest()


def test_of_a_chunk_outside_every_window_nothing_is_loaded_so_that_nothing_of_it_can_fail() -> None:
    options = PlannerOptions(patience_s=LIMIT_S, beside_steps=True)
    with bench_of(groups=((BLOCK, 64),), options=options) as bench:
        bench.keep(range(768))
        request = asking("r", range(800))
        assert bench.planner.match(request, 0) == 768
        windowed = [[0] * 44 + list(range(80, 86))]
        bench.admit(request, 768, windowed)
        (trip,) = bench.planner.plan_step([], lambda _: windowed).trips
        (op,) = trip.loads
        assert op.start == 512
        bench.done(StepPlan(trip.number, loads=trip.loads), failed=[0])
        assert (bench.count("failed_tokens"), bench.count("delivered_tokens")) == (256, 512)
        assert bench.match(asking("s", range(800))) == 512, "those before it did not fail"
        for name in ("r", "s"):
            bench.planner.end(name)
        assert bench.at_rest()


def test_sums_travel_to_the_rank_that_shall_verify() -> None:
    with bench_of(ranks=2, verify_every=1) as bench:
        bench.keep(range(512))
        request = asking("r", range(600))
        assert bench.planner.match(request, 0) == 512
        bench.admit(request, 512)
        plan = bench.plan(request, 600)
        assert [op.sums for op in plan.loads] == [
            tuple(sums_of(rank, op.offset) for rank in (0, 1)) for op in plan.loads
        ]
        assert plan.shard_offsets == (0, bench.layout.shards[0].nbytes)
        bench.done(plan)


# ---- what is stored --------------------------------------------------------------------------------------------


def test_a_chunk_is_readable_only_when_every_rank_has_stored_it() -> None:
    with bench_of(ranks=2) as bench:
        request = asking("w", range(600))
        assert bench.planner.match(request, 0) == 0
        bench.admit(request)
        assert bench.plan(request, 255).stores == ()
        plan = bench.plan(request, 600)
        assert [op.seal for op in plan.stores] == [True, True]
        assert bench.planner.awaits_report()
        bench.done(plan, ranks=[1])
        assert bench.figures()["chunks"] == 0
        bench.done(plan, ranks=[0])
        assert bench.figures()["chunks"] == 2
        assert not bench.planner.awaits_report()
        bench.planner.end("w")
        assert bench.at_rest()


def test_a_chunk_that_one_rank_skipped_is_gathered_again() -> None:
    with bench_of(ranks=2) as bench:
        request = asking("w", range(300))
        bench.planner.match(request, 0)
        bench.admit(request)
        plan = bench.plan(request, 300)
        report = bench.report(plan, ranks=[0])
        report.stores.append(StoresDone(plan.step, 1, {}))
        bench.planner.step_done(report)
        assert bench.count("dropped_chunks") == 1
        assert bench.figures()["chunks"] == 0
        again = bench.plan(request, 300)
        assert again.stores == plan.stores
        bench.done(again)
        assert bench.figures()["chunks"] == 1


@pytest.mark.parametrize(("generated", "chunks"), [(False, 1), (True, 2)])
def test_only_the_prompt_is_stored_unless_more_is_wished(generated: bool, chunks: int) -> None:
    with bench_of(options=PlannerOptions(patience_s=LIMIT_S, store_generated=generated)) as bench:
        bench.planner.match(asking("w", range(300)), 0)
        bench.admit(asking("w", range(300)))
        for final in range(300, 800, 50):
            bench.done(bench.plan(asking("w", range(final), prompt=300), final, table(800)))
        assert bench.figures()["chunks"] == chunks


def test_chunks_that_are_there_or_have_no_room_are_counted() -> None:
    with bench_of(room=3) as bench:
        bench.keep(range(256))
        held = asking("holds", range(300))
        assert bench.planner.match(held, 0) == 256
        first, second = asking("one", range(512)), asking("two", range(512))
        for request in (first, second):
            assert bench.planner.match(request, 256) == 0
            bench.admit(request)
        bench.plan(first, 0)
        bench.plan(second, 0)
        assert bench.count("skipped_present_chunks") == 3
        large = asking("large", range(1000, 2000))
        bench.planner.match(large, 0)
        bench.admit(large)
        assert len(bench.plan(large, 1000).stores) == 1
        assert bench.count("skipped_full_chunks") == 2


def test_a_reservation_that_comes_late_is_used_by_the_next_step(hasty: Bench) -> None:
    request = asking("w", range(600))
    hasty.match(request)
    with mute(hasty, "reserve"):
        hasty.admit(request)
        assert hasty.plan(request, 300).stores == ()
        assert hasty.plan(request, 310).stores == ()
    hasty.figures()
    plan = hasty.plan(request, 600)
    assert len(plan.stores) == 2
    hasty.done(plan)
    assert hasty.figures()["chunks"] == 2


def test_a_reservation_that_is_never_answered_costs_one_deadline(hasty: Bench) -> None:
    request = asking("w", range(600))
    hasty.match(request)
    with mute(hasty, "reserve"):
        hasty.admit(request)
        for _ in range(60):
            hasty.clock.advance(0.01)
            hasty.plan(request, 600)
        asked = len(hasty.waits)
        for _ in range(60):
            hasty.clock.advance(0.01)
            assert hasty.plan(request, 600).stores == ()
        assert len(hasty.waits) == asked, "a step waits for a store that overran the deadline"
        assert hasty.planner.match(asking("other", range(5000, 5600)), 0) == 0, "it is asked nothing more"
        assert len(hasty.waits) == asked
        assert hasty.count("skipped_late_chunks") == 2
    hasty.figures()
    assert hasty.link.live(idle=True) is hasty.link.client
    hasty.planner.end("w")
    assert hasty.at_rest(), "what it got too late was given back"


def test_a_reservation_that_is_answered_after_the_end_holds_nothing(hasty: Bench) -> None:
    request = asking("w", range(600))
    hasty.match(request)
    with mute(hasty, "reserve"):
        hasty.admit(request)
        hasty.planner.end("w")
    hasty.figures()
    assert hasty.at_rest()


# ---- what fails ------------------------------------------------------------------------------------------------


def test_a_failed_load_taints_its_step_and_every_step_that_was_planned_by_then(bench: Bench) -> None:
    bench.keep(range(512))
    request, other = asking("r", range(1100)), asking("other", range(5000, 5600))
    assert bench.planner.match(request, 0) == 512
    bench.admit(request, 512, table(1100))
    assert bench.planner.match(other, 0) == 0
    bench.admit(other)
    first = bench.plan(request, 800)
    second = bench.plan(other, 300)
    assert (len(first.loads), len(first.stores), len(second.stores)) == (2, 1, 1)
    forget = bench.done(first, failed=[1])
    assert forget == set(table(1100)[0]), "whatever the engine may have cached of this request since its load began"
    assert bench.done(second) == set()
    third = bench.plan(request, 800)
    assert third.stores == first.stores, "what was dropped is gathered again"
    bench.done(third)
    assert bench.count("dropped_chunks") == 2
    assert (bench.count("failed_tokens"), bench.count("delivered_tokens")) == (256, 256)
    found = asking("again", range(600))
    assert bench.planner.match(found, 0) == 256
    for name in ("r", "other", "again"):
        bench.planner.end(name)
    assert bench.at_rest()
    assert bench.figures()["chunks"] == 2  # the first of the two that were loaded, and the one that was gathered again


def test_what_another_request_has_built_on_a_failed_load_is_never_stored(bench: Bench) -> None:
    bench.keep(range(512))
    loads, other = asking("loads", range(1100)), asking("other", range(3000, 3300))
    reads = asking("reads", [*range(512), *range(7000, 7588)])
    assert bench.planner.match(loads, 0) == 512
    bench.admit(loads, 512, table(1100))
    for request, own in ((reads, 496), (other, 0)):  # by whatever way it has come to read the other one's blocks
        assert bench.planner.match(request, own) in (0, 16)
        bench.admit(request)
    first = bench.plan(loads, 600)
    tables = {"loads": table(1100), "reads": [[*table(512)[0], *range(200, 240)]], "other": table(300, 500)}
    forget = bench.planner.step_done(bench.report(first, failed=[0]), tables.__getitem__)
    assert forget == {*tables["loads"][0], *tables["reads"][0]}, "what the reader has computed is worth nothing"
    bench.planner.end("loads")
    assert bench.plan(reads, 1100, tables["reads"]).stores == ()
    assert len(bench.plan(other, 300, tables["other"]).stores) == 1


def test_a_chunk_whose_load_failed_is_never_offered_again(bench: Bench) -> None:
    bench.keep(range(512))
    request = asking("r", range(600))
    assert bench.planner.match(request, 0) == 512
    bench.admit(request, 512)
    bench.done(bench.plan(request, 600), failed=[0, 1])
    bench.planner.end("r")
    bench.asked.clear()
    again = asking("again", range(600))
    assert bench.planner.match(again, 0) == 0
    bench.admit(again)
    assert bench.asked == []
    assert bench.misses()["failed_before"] == 1


def test_the_reason_of_a_hit_that_ends_at_a_failed_chunk(bench: Bench) -> None:
    bench.keep(range(512))
    request = asking("r", range(600))
    assert bench.planner.match(request, 0) == 512
    bench.admit(request, 512)
    bench.done(bench.plan(request, 600), failed=[1])
    again = asking("again", range(600))
    assert bench.planner.match(again, 0) == 256
    bench.admit(again, 256)
    assert "failed_before" in bench.misses()


def test_ended_before_it_was_admitted(bench: Bench) -> None:
    bench.keep(range(512))
    assert bench.planner.match(asking("r", range(600)), 0) == 512
    bench.planner.end("r")
    bench.planner.end("r")
    bench.planner.end("never heard of")
    assert bench.at_rest()
    assert bench.planner.match(asking("r", range(600)), 0) == 512, "the name may be used again"
    bench.planner.end("r")


def test_ended_before_its_load_was_planned(bench: Bench) -> None:
    bench.keep(range(512))
    request = asking("r", range(600))
    assert bench.planner.match(request, 0) == 512
    bench.admit(request, 512)
    bench.planner.end("r")
    assert bench.planner.plan_step([], lambda _: table(600)).loads == ()
    assert bench.at_rest()


def test_ended_while_its_step_is_under_way(bench: Bench) -> None:
    bench.keep(range(512))
    request = asking("r", range(800))
    assert bench.planner.match(request, 0) == 512
    bench.admit(request, 512)
    plan = bench.plan(request, 800)
    bench.planner.end("r")
    now = bench.figures()
    assert (now["pinned_nbytes"], now["writing_nbytes"]) == (2 * bench.layout.nbytes, bench.layout.nbytes)
    bench.done(plan)
    assert bench.at_rest()
    assert bench.figures()["chunks"] == 3, "what the step stored is worth keeping"


def test_a_name_may_be_used_again_while_a_step_of_its_last_request_is_under_way(bench: Bench) -> None:
    bench.keep(range(512))
    old, new = asking("r", range(800)), asking("r", range(5000, 5600))
    assert bench.planner.match(old, 0) == 512
    bench.admit(old, 512)
    first = bench.plan(old, 800)
    bench.planner.end("r")
    bench.planner.expect(new)
    assert bench.match(new) == 0
    bench.admit(new)
    bench.figures()
    second = bench.plan(new, 600)
    bench.done(first)
    bench.done(second)
    assert bench.match(asking("again", range(5000, 5600))) == 512
    assert bench.match(asking("longer", range(800))) == 768
    for name in ("r", "again", "longer"):
        bench.planner.end(name)
    assert bench.at_rest()


def test_a_store_that_is_lost_takes_what_ended_requests_had_reserved_with_it(bench: Bench) -> None:
    """Its lease numbers may mean something to the next store."""
    request = asking("r", range(600))
    bench.match(request)
    bench.admit(request)
    bench.figures()
    plan = bench.plan(request, 600)
    bench.planner.end("r")
    bench.lose_store()
    bench.planner.plan_step([], lambda _: table(600))
    bench.find_store()
    bench.keep(range(512), "other")
    held = bench.match(asking("reader", range(600)))
    assert held == 512
    bench.done(plan)
    assert bench.figures()["pinned_nbytes"] == 2 * bench.layout.nbytes, "a lease of another's was released"
    bench.planner.end("reader")
    assert bench.at_rest()


def test_ended_while_its_question_is_open(hasty: Bench) -> None:
    hasty.keep(range(512))
    with mute(hasty, "fetch"):
        assert hasty.planner.match(asking("r", range(600)), 0) is None
        hasty.planner.end("r")
    hasty.figures()
    assert hasty.figures()["pinned_nbytes"] == 0


def test_after_a_reset_nothing_of_before_is_given_or_kept(bench: Bench) -> None:
    bench.keep(range(512))
    matched, stores = asking("matched", range(600)), asking("stores", range(2000, 2600))
    assert bench.planner.match(matched, 0) == 512
    assert bench.planner.match(stores, 0) == 0
    bench.admit(stores)
    plan = bench.plan(stores, 300)
    assert len(plan.stores) == 1
    bench.planner.reset(NEW, "new")
    bench.done(plan)
    assert bench.count("dropped_chunks") == 1
    assert bench.figures()["chunks"] == 0
    assert bench.plan(stores, 600).stores == (), "its tokens were computed by the old weights"
    assert bench.planner.match(matched, 0) == 0
    for name in ("matched", "stores"):
        bench.planner.end(name)
    assert bench.at_rest()
    bench.keep(range(512), name="new")
    assert bench.planner.match(asking("r", range(600)), 0) == 512
    assert bench.count("resets") == 1


def test_a_reset_leaves_others_what_it_had_stored_if_anybody_may_find_it(bench: Bench) -> None:
    bench.source.outlived = True
    bench.keep(range(512))
    bench.planner.reset(NEW, "new")
    assert bench.match(asking("r", range(600))) == 0
    assert bench.figures()["chunks"] == 2
    bench.keep(range(1000, 1512), name="new")
    (session,) = bench.source.running.store.sessions.values()
    assert (session.namespace, session.lasting) == (NEW, False)
    assert bench.figures()["chunks"] == 4
    assert bench.link.client is not None
    bench.link.client.rename(OLD, "", lasting=True)
    assert bench.figures()["chunks"] == 2, "nobody can find what it kept after the reset"
    assert bench.match(asking("again", range(600))) == 512


def test_nothing_is_given_to_or_kept_of_a_request_that_another_adapter_computes(bench: Bench) -> None:
    bench.keep(range(512))
    doubted, other = asking("doubted", range(2000, 2600)), asking("other", range(4000, 4600))
    matched = asking("matched", range(600))
    assert bench.planner.match(matched, 0) == 512
    for request in (doubted, other):
        assert bench.planner.match(request, 0) == 0
        bench.admit(request)
    plans = [bench.plan(request, 600) for request in (doubted, other)]
    assert [len(plan.stores) for plan in plans] == [2, 2]
    bench.planner.doubt(["doubted", "matched", "unknown"])
    for plan in plans:
        bench.done(plan)
    assert bench.figures()["chunks"] == 4, "the other's are kept"
    assert bench.plan(doubted, 600).stores == ()
    assert bench.planner.match(matched, 0) == 0
    bench.admit(matched)
    assert bench.misses()["adapter"] == 1
    assert bench.match(asking("again", range(2000, 2600))) == 0
    assert bench.match(asking("other again", range(4000, 4600))) == 512
    for name in ("doubted", "other", "matched", "again", "other again"):
        bench.planner.end(name)
    assert bench.at_rest()


def test_a_question_from_before_a_reset_is_not_answered_by_old_weights(hasty: Bench) -> None:
    hasty.keep(range(512))
    with mute(hasty, "fetch"):
        assert hasty.planner.match(asking("r", range(600)), 0) is None
        hasty.planner.reset(NEW, "new")
    hasty.figures()
    assert hasty.match(asking("r", range(600))) == 0
    assert hasty.at_rest()


@pytest.mark.parametrize(
    ("sources", "tokens", "split"),
    [
        ({"pool": 2}, 512, {"pool": 512}),
        ({"pool": 1, "disk": 1}, 511, {"pool": 256, "disk": 255}),
        ({"disk": 3, "pool": 1}, 1023, {"disk": 768, "pool": 255}),
        ({"disk": 2}, 1, {"disk": 1}),
        ({"any_tier": 1, "pool": 1}, 512, {"any_tier": 256, "pool": 256}),
    ],
)
def test_claimed_tokens_by_source_add_up(sources: dict[str, int], tokens: int, split: dict[str, int]) -> None:
    match = Match(0, StoreLease(b"", 1), hits=sum(sources.values()), sources=sources)
    assert match.tokens_by_source(tokens) == split


# ---- a store that is slow, or gone -----------------------------------------------------------------------------


def test_all_lookups_between_two_steps_hold_the_engine_up_for_one_patience(hasty: Bench) -> None:
    client, waits = hasty.link.client, []
    assert client is not None

    def waiting(call: Any, limit_s: float) -> None:
        waits.append(limit_s)
        hasty.clock.advance(limit_s)

    client.wait = waiting  # type: ignore[method-assign,assignment]
    for name in "abc":
        assert hasty.planner.match(asking(name, range(600)), 0) is None
    assert waits == [0.01, 0.0, 0.0]
    hasty.planner.plan_step([], lambda _: ())
    assert hasty.planner.match(asking("a", range(600)), 0) is None
    assert waits[3:] == [0.01]


def test_a_slow_store_costs_one_deadline_and_then_nothing(hasty: Bench) -> None:
    hasty.keep(range(512))
    request, other = asking("r", range(600)), asking("other", range(600))
    hasty.waits.clear()
    with mute(hasty, "fetch"):
        assert hasty.planner.match(request, 0) is None
        hasty.clock.advance(0.3)
        assert hasty.planner.match(request, 0) is None
        hasty.clock.advance(0.3)
        assert hasty.planner.match(request, 0) == 0
        asked = len(hasty.asked)
        assert hasty.planner.match(other, 0) == 0, "nobody else waits"
        assert len(hasty.asked) == asked
        hasty.admit(request)
        hasty.admit(other)
        assert hasty.plan(request, 600).stores == ()
        assert hasty.misses() == {"not_stored": 1, "deadline": 2}
    assert hasty.waits
    assert max(hasty.waits) <= 0.01, "a call of the engine waited longer than its patience"
    hasty.figures()
    assert hasty.link.live(idle=True) is hasty.link.client, "it has caught up and is asked again"
    for name in ("r", "other"):
        hasty.planner.end(name)
    assert hasty.figures()["pinned_nbytes"] == 0, "the answer that nobody waited for was given back"
    assert hasty.match(asking("s", range(600))) == 512
    assert hasty.count("store_losses") == 0


def test_without_a_store_everything_is_a_miss_and_a_new_one_starts_from_nothing(bench: Bench) -> None:
    bench.keep(range(512))
    matched = asking("matched", range(600))
    assert bench.planner.match(matched, 0) == 512
    bench.lose_store()
    assert bench.planner.match(matched, 0) == 0
    bench.admit(matched)
    assert bench.misses()["store_gone"] == 1
    plan = bench.plan(matched, 600)
    assert (plan.boot, plan.loads, plan.stores) == (b"", (), ())
    bench.planner.end("matched")
    bench.find_store()
    assert bench.planner.match(asking("r", range(600)), 0) == 0
    assert bench.count("store_losses") == 1
    bench.keep(range(512), name="new")
    assert bench.planner.match(asking("s", range(600)), 0) == 512


def test_a_chunk_in_the_making_is_not_gathered_into_another_store_s_pool(bench: Bench) -> None:
    long = asking("long", range(1000))
    bench.planner.match(long, 0)
    bench.admit(long)
    first = bench.plan(long, 300)
    assert len(first.stores) == 1
    bench.done(first)
    bench.lose_store()
    assert bench.plan(long, 500).stores == ()
    bench.find_store()
    assert bench.plan(long, 1000).stores == ()
    bench.planner.end("long")
    assert bench.at_rest()


def test_a_load_goes_out_for_the_store_that_promised_it(bench: Bench) -> None:
    bench.keep(range(512))
    request = asking("r", range(600))
    old = bench.link.client.welcome.boot if bench.link.client else b""
    assert bench.planner.match(request, 0) == 512
    bench.admit(request, 512)
    bench.lose_store()
    assert bench.planner.match(asking("other", range(600)), 0) == 0
    bench.find_store()
    plan = bench.plan(request, 600)
    assert {op.boot for op in plan.loads} == {old} != {plan.boot}
    bench.done(plan, failed=[0, 1])
    assert bench.at_rest()


def test_a_link_that_comes_back_between_a_promise_and_its_plan_gives_nothing_back(bench: Bench) -> None:
    bench.keep(range(512))
    request = asking("r", range(600))
    assert bench.planner.match(request, 0) == 512
    bench.admit(request, 512)
    bench.lose_store()
    bench.clock.advance(FIRST_PAUSE_S + 0.1)
    tries = len(bench.source.boots)
    for _ in range(3):  # other requests of the same scheduling pass
        bench.planner.match(asking("other", range(3000, 3600)), 0)
        bench.clock.advance(FIRST_PAUSE_S + 0.1)
    assert len(bench.source.boots) == tries, "a session that resumes gives back what a load that is due will read"
    assert len(bench.plan(request, 600).loads) == 2


def test_gauges_of_the_pool_follow_every_answer_and_every_store(bench: Bench) -> None:
    def gauges() -> list[int]:
        now = by_flat_name(bench.planner.figures.rows())
        return [now["pool_nbytes"], now["pool_used_nbytes"], now["pool_pinned_nbytes"]]

    pool = ROOM * bench.layout.nbytes
    assert gauges() == [pool, 0, 0]
    client = bench.link.client
    assert client is not None
    bench.keep(range(512))  # another engine's store would not tell this one of it
    bench.planner.figures.gauge("pool_used_nbytes", 0)
    assert bench.match(asking("r", range(600))) == 512
    assert gauges() == [pool, 2 * bench.layout.nbytes, 2 * bench.layout.nbytes]
    bench.lose_store()
    bench.planner.match(asking("s", range(600)), 0)
    assert gauges() == [0, 0, 0]
    bench.find_store()
    bench.planner.match(asking("t", range(600)), 0)
    assert gauges() == [pool, 0, 0]


def test_sums_that_fill_no_frame_together_are_committed_in_several_messages(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvkeep.wire.messages.COMMIT_NBYTES", 1)
    client, lengths = bench.link.client, []
    assert client is not None
    commit = client.commit

    def counted(lease: StoreLease, indexes: Any, sums: Any) -> Any:
        lengths.append(len(sums))
        return commit(lease, indexes, sums)

    client.commit = counted  # type: ignore[method-assign]
    bench.keep(range(512))
    assert lengths == [1, 1]
    assert bench.figures()["chunks"] == 2
    assert bench.match(asking("r", range(600))) == 512


def test_a_load_that_fails_for_want_of_a_dead_store_s_pool_drops_nothing_of_the_new_one(bench: Bench) -> None:
    bench.keep(range(512))
    request = asking("r", range(600))
    assert bench.planner.match(request, 0) == 512
    bench.admit(request, 512)
    plan = bench.plan(request, 600)
    bench.lose_store()
    assert bench.planner.match(asking("other", range(3000, 3600)), 0) == 0
    bench.find_store()
    bench.keep(range(512), name="w")
    bench.done(plan, failed=[0, 1])
    assert bench.figures()["chunks"] == 2, "they are right, and on a disk others would miss them as well"
    assert bench.match(asking("s", range(600))) == 512


def test_an_answer_of_a_store_that_is_gone_is_not_taken_for_the_new_one_s(hasty: Bench) -> None:
    hasty.keep(range(512))
    with mute(hasty, "fetch"):
        assert hasty.planner.match(asking("r", range(600)), 0) is None
    hasty.figures()  # takes the answer in, for a request that is not asked again before the loss
    hasty.lose_store()
    assert hasty.planner.match(asking("other", range(600)), 0) == 0
    hasty.find_store()
    assert hasty.match(asking("r", range(600))) == 0
    assert hasty.at_rest()


def test_a_request_that_was_admitted_without_a_store_may_come_back_longer(bench: Bench) -> None:
    bench.lose_store()
    first = asking("r", range(300))
    assert bench.planner.match(first, 0) == 0
    bench.admit(first)
    bench.find_store()
    again = asking("r", range(600), preempted=True, prompt=300)
    assert bench.planner.match(again, 0) == 0
    bench.admit(again)
    bench.done(bench.plan(again, 600))
    assert bench.figures()["chunks"] == 1


def test_an_engine_is_not_kept_awake_for_ever_by_a_report_that_never_comes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvkeep.engine.scheduler.planner.MAX_EMPTY_STEPS", 5)
    request = asking("w", range(300))
    bench.planner.match(request, 0)
    bench.admit(request)
    bench.plan(request, 300)
    assert [bench.planner.awaits_report() for _ in range(6)] == [True] * 4 + [False] * 2


def test_claims_that_were_never_offered_are_refused(bench: Bench) -> None:
    request = asking("r", range(600))
    assert bench.planner.match(request, 0) == 0
    bench.planner.end("r")
    with pytest.raises(ValueError, match="never offered"):
        bench.admit(asking("s", range(600)), 256)


def test_a_tier_that_is_slower_than_computing_is_not_waited_for_and_says_so() -> None:
    with bench_of() as bench:
        bench.keep(range(300))
        bench.planner._estimate.computed(0, 1000, 0.001)
        bench.planner._estimate.read(0, 1, 1.0)
        request = asking("r", range(600))
        assert bench.planner.match(request, 0) == 256, "what is in the pool costs no wait"
        bench.admit(request, 256)
        assert bench.planner.figures.misses()["slower"] == 1
        bench.done(bench.plan(request, 600))


def test_a_load_is_beside_the_steps_where_many_would_wait_for_it() -> None:
    options = PlannerOptions(patience_s=LIMIT_S, beside_busy=True)
    with bench_of(options=options) as bench:
        bench.keep(range(512))
        found = []
        for running, step_s in ((0, 1e-9), (1, 1e-9), (1, 1.0)):
            runs = [asking(f"runs {running} {step_s} {n}", range(n + 1, n + 21)) for n in range(running)]
            for one in runs:
                assert bench.planner.match(one, 0) == 0
                bench.admit(one)
            bench.planner.plan_step([Scheduled(one.name, 20, one.tokens, 19) for one in runs], lambda _: table(20))
            bench.planner._paces.step_s = step_s
            request = asking(f"loads {running} {step_s}", range(600))
            assert bench.planner.match(request, 0) == 512
            found.append(bench.planner.loads_beside(request.name))
            for one in (*runs, request):
                bench.planner.end(one.name)
        assert found == [False, True, False]


def test_a_load_is_beside_the_steps_where_another_request_begins_with_the_same_block(bench: Bench) -> None:
    bench.keep(range(512))
    alone = asking("alone", range(600))
    assert bench.planner.match(alone, 0) == 512
    assert not bench.planner.loads_beside("alone")
    bench.planner.expect(asking("other", range(1, 600)))
    assert bench.planner.match(alone, 0) == 512
    assert not bench.planner.loads_beside("alone"), "the other one can read none of its blocks"
    bench.planner.expect(asking("sharing", [*range(BLOCK), 7]))
    assert bench.planner.match(alone, 0) == 512
    assert bench.planner.loads_beside("alone"), "the other one could read a block before its load has failed"
    bench.planner.end("sharing")
    assert bench.planner.match(alone, 0) == 512
    assert not bench.planner.loads_beside("alone")
    bench.planner.announce("not looked up yet", range(BLOCK))
    assert bench.planner.match(alone, 0) == 512
    assert bench.planner.loads_beside("alone"), "nor may one whose digests are still to come"
    bench.planner.end("not looked up yet")
    assert bench.planner.match(alone, 0) == 512
    assert not bench.planner.loads_beside("alone")
    bench.planner.expect(asking("short", range(BLOCK - 1)))
    bench.planner.expect(asking("as short", range(1, BLOCK)))
    assert bench.planner.match(alone, 0) == 512
    assert bench.planner.loads_beside("alone"), "a short prompt may have been generated further, and be preempted"
    bench.planner.end("short")
    assert bench.planner.match(alone, 0) == 512
    assert not bench.planner.loads_beside("alone")


def test_a_load_that_another_adapter_made_fail_is_no_fault_of_the_chunks(bench: Bench) -> None:
    bench.keep(range(512))
    adapted = asking("adapted", range(600))
    assert bench.match(adapted) == 512
    bench.admit(adapted, 512, table(600))
    plan = bench.plan(adapted, 600, table(600))
    bench.planner.doubt(["adapted"])
    bench.done(plan, failed=range(len(plan.loads)))
    assert bench.match(asking("next", range(600))) == 512, "the chunks were dropped, for everybody"


def test_a_tier_is_as_slow_as_the_store_found_it_however_late_the_engine_looks() -> None:
    with bench_of() as bench:
        bench.planner._estimate.computed(0, 1000, 1.0)
        client = bench.link.client
        assert client is not None
        answers = iter([None, Matched(call=1, sources={"disk": 2}, took_s=0.01)])

        def late(call: Any, limit_s: float) -> Any:
            bench.clock.advance(30.0)  # a long step of other requests
            return next(answers)

        client.wait, wait = late, client.wait  # type: ignore[method-assign]
        request = asking("r", range(600))
        bench.planner._lookups._deadline_s = 100.0
        assert bench.planner.match(request, 0) is None
        bench.planner.match(request, 0)
        client.wait = wait  # type: ignore[method-assign]
        assert bench.planner._estimate.worth_s((0, 512), 2 * bench.layout.nbytes) == pytest.approx(0.512)


def test_chunks_of_a_tier_of_any_name_are_counted_under_it() -> None:
    with bench_of() as bench:
        client = bench.link.client
        assert client is not None
        found = Matched(call=1, sources={"valkey_east": 2, "pool": 1}, took_s=0.01)
        client.wait, wait = lambda call, limit_s: found, client.wait  # type: ignore[method-assign,assignment]
        assert bench.planner.match(asking("r", range(600)), 0) == 0
        client.wait = wait  # type: ignore[method-assign]
        counts = {row.tier: row.value for row in bench.planner.figures.rows() if row.name == "fetched_chunks"}
        assert counts == {"pool": 1, "valkey_east": 2}


def test_a_step_without_a_forward_is_no_pace() -> None:
    with bench_of() as bench:
        request = asking("r", range(600))
        bench.planner.plan_step([], lambda _: table(600))  # of which there may be no output
        bench.clock.advance(50.0)
        bench.planner.plan_step([Scheduled("r", 600, request.tokens)], lambda _: table(600))
        bench.clock.advance(0.6)
        bench.planner.step_over()
        assert bench.planner._estimate.compute_s(0, 600) == pytest.approx(0.6)


def hashed(name: str, tokens: Sequence[int], hashes: list[bytes], fingerprint: bytes = b"") -> Request:
    """A request of an engine that hashes its blocks; the hashes of all tokens are there."""
    hashes[:] = Chain(BLOCK, none_hash()).extend(tokens)
    return Request(
        name,
        tokens,
        len(tokens),
        none_hash(),
        extra_keys=None,
        preempted=False,
        block_hashes=BlockHashes(hashes, BLOCK, fingerprint),
    )


def test_with_the_engines_block_hashes_a_prompt_and_what_was_generated_are_found_again() -> None:
    with bench_of(options=PlannerOptions(patience_s=LIMIT_S, store_generated=True)) as bench:
        hashes: list[bytes] = []
        writer = hashed("writer", range(300), hashes)
        assert bench.match(writer) == 0
        bench.admit(writer)
        bench.figures()
        bench.done(bench.plan(writer, 300))
        for tokens in (range(500), range(520)):  # the hashes grow in place as tokens are generated
            grown = replace(hashed("writer", tokens, hashes), prompt_tokens=300)
            bench.done(bench.plan(grown, len(tokens)))
        bench.planner.end("writer")
        assert bench.match(hashed("reader", range(600), [])) == 512


def test_what_was_stored_under_block_hashes_is_no_other_adapters() -> None:
    with bench_of() as bench:
        writer = hashed("writer", range(512), [], b"content of an adapter")
        assert bench.match(writer) == 0
        bench.admit(writer)
        bench.figures()
        bench.done(bench.plan(writer, 512))
        bench.planner.end("writer")
        for name, fingerprint in (("replaced", b"content of another"), ("without", b"")):
            assert bench.match(hashed(name, range(600), [], fingerprint)) == 0
        assert bench.match(hashed("same", range(600), [], b"content of an adapter")) == 512
