"""A recurrent model's planner and worker over a real store: what is stored of its states, what a claim loads.

The engine is played by hand: one attention group, two groups of states whose blocks are its last ones' numbers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from kvkeep.core.key import none_hash
from kvkeep.core.layout import ChunkLayout
from kvkeep.engine.copies.cpu import CpuCopies
from kvkeep.engine.link import Link
from kvkeep.engine.plan import Scheduled, StepPlan
from kvkeep.engine.pool import MappedPool
from kvkeep.engine.rank.worker import Worker
from kvkeep.engine.scheduler.lookups import Request
from kvkeep.engine.scheduler.planner import Planner, PlannerOptions
from kvkeep.telemetry import Figures, Miss
from kvkeep.testing.doubles.store_thread import ThreadSource
from kvkeep.testing.doubles.transfers import ManualClock
from kvkeep.transfer.cpu import ReferenceTransfer
from kvkeep.transfer.pages import GroupCaches
from kvkeep.wire.messages import Hello, Stats
from kvkeep.wire.pool_socket import PoolDoor

CHUNK, BLOCK, NUM_BLOCKS = 32, 16, 64
LIMIT_S = 20.0
Left = Sequence[tuple[int, tuple[int, ...]]]


@dataclass
class Bench:
    """A planner and the one worker of an engine; `kv` has a number a token, `state` one a block, by group."""

    verify_every: int = 1
    pool_nbytes: int = 1 << 20
    options: PlannerOptions = field(default_factory=lambda: PlannerOptions(patience_s=LIMIT_S, beside_steps=True))

    def __post_init__(self) -> None:
        self.kv = torch.zeros((NUM_BLOCKS, BLOCK), dtype=torch.int64)
        self.state = [torch.zeros((NUM_BLOCKS, 1), dtype=torch.int64) for _ in range(2)]
        transfer = ReferenceTransfer([GroupCaches({"a": self.kv}, NUM_BLOCKS, BLOCK, 0)], CHUNK)
        groups = [GroupCaches({f"s{n}": one}, NUM_BLOCKS, CHUNK, 0) for n, one in enumerate(self.state)]
        states = ReferenceTransfer(groups, CHUNK)
        self.door = PoolDoor()
        self.worker = Worker(0, CpuCopies(transfer, states=states), MappedPool(self.door))
        self.layouts = ChunkLayout((transfer.shard,)), ChunkLayout((states.shard,))
        self.link = Link(ThreadSource(self.pool_nbytes, max_pinned_share=1.0), self.hello, [self.door.path])
        self.link.start(LIMIT_S)
        self.figures = Figures()
        self.planner = Planner(self.link, self.layouts[0], self.options, self.figures, states=self.layouts[1])

    def hello(self, resumes: int) -> Hello:
        chunks, states = self.layouts
        holders = [os.getpid()]
        return Hello(
            name="t",
            namespace=b"n" * 16,
            identity="",
            chunk_nbytes=chunks.nbytes,
            holders=holders,
            verify_every=self.verify_every,
            resumes=resumes,
            sizes=chunks.sizes,
            state_sizes=states.sizes,
        )

    def match(self, request: Request, computed: int = 0) -> int:
        while (given := self.planner.match(request, computed)) is None:
            pass
        return given

    def run(self, plan: StepPlan) -> None:
        """What a rank does in a step, and its report."""
        self.worker.start_loads(plan)
        self.worker.start_stores(plan)
        self.worker.poll(plan)
        self.planner.step_done(self.worker.results.take_report())

    def compute(self, name: str, tokens: list[int], left: Left) -> None:
        """One step computes a whole prompt; its states at `left` (tokens, blocks) are the sums of what is before."""
        request = asking(name, tokens)
        assert self.match(request) == 0
        table = list(range(1, 1 + -(-len(tokens) // BLOCK)))
        self.planner.admit(request, 0, lambda: [table, [], []])
        for place, block in enumerate(table):
            part = tokens[place * BLOCK : (place + 1) * BLOCK]
            self.kv[block, : len(part)] = torch.tensor(part)
        for upto, blocks in left:
            for group, block in enumerate(blocks):
                self.state[group][block] = sum(tokens[:upto]) + group if block else -1
        scheduled = [Scheduled(name, len(tokens), tokens, 0, states=left)]
        self.run(self.planner.plan_step(scheduled, lambda _: [table, [], []]))
        self.planner.end(name)

    def load(self, request: Request, claim: int) -> dict[str, bool]:
        """The request is loaded beside the steps: attention's blocks from 40 on, the state's to 50 and 51."""
        count = -(-claim // BLOCK)
        nulls = [0] * (claim // CHUNK - 1)
        tables = [list(range(40, 40 + count)), [*nulls, 50], [*nulls, 51]]
        self.planner.admit(request, claim, lambda: tables)
        self.run(self.planner.plan_step([], lambda _: tables))
        return self.worker.results.take_loaded()

    def stored(self) -> int:
        """How many states became readable, by the answers to all commits."""
        assert self.at_rest()
        self.planner.plan_step([], lambda _: [[], [], []])
        return self.figures.count("stored_states")

    def at_rest(self) -> bool:
        client = self.link.client
        assert client is not None
        answer = client.wait(client.stats(check=True), LIMIT_S)
        assert isinstance(answer, Stats)
        assert answer.problem == ""
        return answer.figures["pinned_nbytes"] == answer.figures["writing_nbytes"] == 0


def asking(name: str, tokens: Sequence[int]) -> Request:
    return Request(name, tokens, len(tokens), none_hash())


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.worker.close()
    made.planner.close()


PROMPT = list(range(1000, 1150))  # four chunks and a bit


def test_a_claim_ends_where_a_state_was_left_and_brings_it(bench: Bench) -> None:
    bench.compute("writer", PROMPT, [(64, (10, 11)), (96, (12, 13))])
    assert bench.stored() == 2
    request = asking("reader", PROMPT)
    assert bench.match(request) == 96
    assert bench.load(request, 96) == {"reader": True}
    assert bench.kv[40:46].flatten().tolist() == PROMPT[:96]
    assert [int(bench.state[group][50 + group]) for group in range(2)] == [sum(PROMPT[:96]), sum(PROMPT[:96]) + 1]
    bench.planner.end("reader")
    assert bench.at_rest()
    assert bench.figures.misses() == {"not_stored": 1, "no_state": 1}  # the cold one, and the other's fourth chunk


def test_a_prompt_as_long_as_a_stored_one_never_gets_its_last_state(bench: Bench) -> None:
    tokens = PROMPT[:96]
    bench.compute("writer", tokens, [(64, (10, 11)), (96, (12, 13))])
    assert bench.match(asking("same", tokens)) == 64  # a state cannot be cut, and one token has to be computed
    assert bench.match(asking("longer", [*tokens, 7])) == 96


def test_what_the_engine_has_itself_is_left_out_of_the_claim(bench: Bench) -> None:
    bench.compute("writer", PROMPT, [(32, (10, 11)), (96, (12, 13))])
    assert bench.match(asking("half", PROMPT), 32) == 64
    assert bench.match(asking("all", PROMPT), 96) == 0


def test_without_a_state_there_is_no_hit_and_the_reason_says_so(bench: Bench) -> None:
    bench.compute("writer", PROMPT, [])
    request = asking("reader", PROMPT)
    assert bench.match(request) == 0
    bench.planner.admit(request, 0, lambda: [[], [], []])
    assert bench.figures.misses()["no_state"] >= 1
    bench.planner.end("reader")
    assert bench.at_rest()


@pytest.mark.parametrize(
    "left",
    [
        [(48, (10, 11))],  # inside a chunk
        [(192, (10, 11))],  # beyond what the step computes
        [(64, (10, 0))],  # one group has none
        [(0, (10, 11))],
    ],
)
def test_what_is_no_state_at_the_end_of_a_chunk_is_not_stored(bench: Bench, left: Left) -> None:
    bench.compute("writer", PROMPT, left)
    assert bench.stored() == 0


def test_a_state_that_is_there_is_not_stored_again(bench: Bench) -> None:
    bench.compute("one", PROMPT, [(64, (10, 11))])
    assert bench.match(asking("two", PROMPT[:70])) == 64
    bench.planner.end("two")
    request = asking("three", PROMPT)
    bench.match(request, 0)
    table = list(range(1, 11))
    bench.planner.admit(request, 0, lambda: [table, [], []])
    scheduled = [Scheduled("three", 150, PROMPT, 0, states=[(64, (10, 11))])]
    bench.run(bench.planner.plan_step(scheduled, lambda _: [table, [], []]))
    bench.planner.end("three")
    assert (bench.stored(), bench.figures.count("skipped_states")) == (1, 0)


def test_a_state_that_is_bad_fails_the_request_and_is_not_given_again(bench: Bench) -> None:
    bench.compute("writer", PROMPT, [(64, (10, 11)), (96, (12, 13))])
    request = asking("reader", PROMPT)
    assert bench.match(request) == 96
    record = bench.planner._records["reader"]
    assert record.match is not None
    assert record.match.state is not None
    bad = record.match.state._replace(sums=bytes(32))
    record.match = replace(record.match, state=bad)
    assert bench.load(request, 96) == {"reader": False}
    bench.planner.end("reader")
    assert bench.match(asking("next", PROMPT)) == 64
    assert bench.figures.count("failed_tokens") == 96


def test_where_the_state_is_behind_a_chunk_whose_load_failed_that_is_the_reason(bench: Bench) -> None:
    bench.compute("writer", PROMPT, [(96, (12, 13))])
    request = asking("reader", PROMPT)
    assert bench.match(request) == 96
    record = bench.planner._records["reader"]
    assert record.match is not None
    assert record.match.state is not None
    record.match = replace(record.match, state=record.match.state._replace(sums=bytes(32)))
    assert bench.load(request, 96) == {"reader": False}
    bench.planner.end("reader")
    assert bench.match(asking("next", PROMPT)) == 0
    assert bench.planner._records["next"].why is Miss.FAILED_BEFORE


def test_a_pool_without_room_for_a_state_skips_it() -> None:
    bench = Bench(pool_nbytes=4 * 4096)  # four chunks, and nothing else
    bench.compute("writer", PROMPT, [(64, (10, 11))])
    assert (bench.stored(), bench.figures.count("skipped_states")) == (0, 1)
    bench.worker.close()
    bench.planner.close()


def test_a_store_that_answers_no_reservation_of_a_state_costs_one_deadline() -> None:
    bench = Bench(options=PlannerOptions(patience_s=0.001, deadline_s=0.5, beside_steps=True))
    clock, gate, waits = ManualClock(), threading.Event(), []
    bench.link.clock = clock
    request = asking("writer", PROMPT)
    assert bench.match(request) == 0
    bench.planner.admit(request, 0, lambda: [[], [], []])
    assert not bench.at_rest(), "the chunks have their room"
    source, client = bench.link.source, bench.link.client
    assert isinstance(source, ThreadSource)
    assert client is not None
    reserve, wait = source.running.store.reserve, client.wait
    source.running.store.reserve = lambda *asked: (gate.wait(LIMIT_S), reserve(*asked))[1]  # type: ignore[method-assign]
    client.wait = lambda call, limit_s: (waits.append(limit_s), wait(call, limit_s))[1]  # type: ignore[method-assign]
    for _ in range(8):
        clock.advance(0.2)
        scheduled = [Scheduled("writer", len(PROMPT), PROMPT, 0, states=[(64, (10, 11))])]
        assert bench.planner.plan_step(scheduled, lambda _: [list(range(1, 20)), [], []]).state_offsets
    assert len(waits) == 4 + 1, "the chunks' answer, then four states until the deadline was over"
    gate.set()
    bench.worker.close()
    bench.planner.close()


def test_a_reset_forgets_states_too(bench: Bench) -> None:
    bench.compute("writer", PROMPT, [(64, (10, 11))])
    bench.planner.reset(b"m" * 16, "")
    assert bench.match(asking("reader", PROMPT)) == 0
