"""The planner, the workers and a real store under an engine that checks every byte after every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.core.layout import padded_nbytes
from kvkeep.engine.copies.cpu import CpuCopies
from kvkeep.engine.copies.device import DeviceCopies, Settlers
from kvkeep.engine.copies.mode import CopyMode, SizeMode
from kvkeep.engine.copies.thread import Copier, InlineCopier, ThreadCopier
from kvkeep.engine.pool import MappedPool
from kvkeep.engine.rank.worker import Worker
from kvkeep.engine.scheduler.planner import PlannerOptions
from kvkeep.errors import StoreGone
from kvkeep.testing.doubles.device import LOCKS, HeldDevice
from kvkeep.testing.doubles.store_thread import ThreadSource
from kvkeep.testing.doubles.transfers import FaultyTransfer, HeldCopier
from kvkeep.testing.fake_engine.engine import FakeEngine
from kvkeep.testing.fake_engine.model import GroupShape
from kvkeep.testing.fake_engine.request import EngineShape, Phase
from kvkeep.transfer.cpu import ReferenceTransfer
from kvkeep.transfer.device.device import DeviceTransfer
from kvkeep.transfer.pages import GroupCaches
from kvkeep.transfer.transfer import Transfer
from kvkeep.wire.messages import Stats
from kvkeep.wire.pool_socket import PoolDoor

CHUNK = 8
FULL = (GroupShape(4),)
WINDOWED = (GroupShape(4), GroupShape(4, window=6))
TWO_SIZES = (GroupShape(8), GroupShape(2, window=6, layers=2))
GROUPS = {"full": FULL, "windowed": WINDOWED, "two sizes": TWO_SIZES}


@dataclass
class Bench:
    """One engine over one store; `faults` has the double round each rank's transfer."""

    shape: EngineShape
    chunks: int = 64
    options: PlannerOptions | None = None
    failing: dict[int, set[int]] = field(default_factory=dict)
    faults: list[FaultyTransfer] = field(default_factory=list)
    copier: type[Copier] = InlineCopier
    copiers: list[Copier] = field(default_factory=list)
    on_device: bool = False
    devices: list[HeldDevice] = field(default_factory=list)

    def __post_init__(self) -> None:
        layers = sum(group.layers for group in self.shape.groups)
        self.source = ThreadSource(self.chunks * layers * self.shape.ranks * padded_nbytes(1))
        # an answer is always waited for: what a test does decides what happens, not the machine's speed
        options = self.options or PlannerOptions(beside_steps=self.shape.fails_whole, patience_s=10.0)
        make = self.make_on_device if self.on_device else ReferenceTransfer
        self.engine = FakeEngine(self.shape, self.source, options, self.wrap, self.make_rank, make)

    def make_on_device(self, groups: Sequence[GroupCaches], chunk_tokens: int) -> Transfer:
        self.devices.append(HeldDevice())
        return self.devices[-1].transfer(groups, chunk_tokens)

    def lock_pools(self) -> None:
        """Lets every rank map its pool and lock all of it: what is not locked yet is staged, and never late."""
        self.engine.add("maps", list(range(900, 910)))
        self.run()
        for worker in self.engine.workers:
            assert isinstance(worker, Worker)
            pool = worker.pool._pool
            assert pool is not None
            pool.populated.wait(10.0)

    def wrap(self, rank: int, inner: Transfer) -> Transfer:
        if self.on_device:
            return inner
        self.faults.append(FaultyTransfer(inner, self.failing.get(rank, set())))
        return self.faults[-1]

    def make_copier(self) -> Copier:
        self.copiers.append(self.copier())
        return self.copiers[-1]

    def make_rank(self, rank: int, transfer: Transfer, door: PoolDoor, choice: CopyMode) -> Worker:
        if isinstance(transfer, DeviceTransfer):
            mode = "layerwise" if self.shape.layerwise else "bulk"
            settlers = Settlers(self.make_copier(), self.make_copier())
            return Worker(rank, DeviceCopies(transfer, SizeMode(mode), settlers), MappedPool(door, LOCKS))
        return Worker(rank, CpuCopies(transfer, self.make_copier(), choice), MappedPool(door))

    def copy(self, rank: int, count: int = 100) -> None:
        """Runs copies of a rank that were held back."""
        copier = self.copiers[rank]
        assert isinstance(copier, HeldCopier)
        copier.run(count)

    def figure(self, name: str) -> int:
        return self.engine.planner.figures.count(name)

    def run(self) -> None:
        """Steps until every request is done, with copies between the steps."""
        for _ in range(1000):
            told = not self.on_device or not self.engine.planner.awaits_report()
            if not self.engine.waiting and not self.engine.running and told:
                return
            self.engine.step()
            for copier in self.copiers:
                if isinstance(copier, HeldCopier):
                    copier.run(100)
        raise AssertionError("not done after 1000 steps")

    def stored(self) -> int:
        """How many chunks the store can give out now."""
        return self.stats()["chunks"]

    @property
    def events(self) -> dict[str, Callable[[], None]]:
        """What may happen at any time and needs nothing to be chosen."""
        lost = {"lose": self.lose, "forget": self.forget_locally, "reset": self.reset}
        return {"step": self.engine.step, "preempt": self.engine.preempt, **lost}

    def reset(self) -> None:
        """A new epoch begins."""
        self.engine.planner.reset(bytes(15) + bytes([len(self.engine.requests)]), "")

    def lose(self) -> None:
        """The connection to the store breaks; there is another one at once, to a new boot of it."""
        link = self.engine.link
        assert link.client is not None
        link.client.lose("a test")
        link.live(idle=False)
        end = time.monotonic() + 10.0
        while True:
            try:
                link.start(10.0)
                break
            except StoreGone:  # a worker's thread has not taken the last pool yet
                assert time.monotonic() < end
        self.engine.planner._live()  # in an engine nobody else looks at the link, and so nothing happens between the two

    def forget_locally(self) -> None:
        """The engine's own prefix cache is empty: only the store can help."""
        self.engine.blocks.forget(list(self.engine.blocks.cached.values()))

    def end(self) -> int:
        """Everything is over: nothing is held, the index adds up, the pool holds no wrong byte; chunks checked."""
        assert self.engine.blocks.idle()
        for worker in self.engine.workers:
            assert isinstance(worker, Worker)
            pool = worker.pool._pool
            assert pool is None or pool._leases == 0, "a lease is left"
        checked = self.engine.check_pool(self.source.running.region.array)
        now = self.stats()
        assert now["pinned_nbytes"] == now["writing_nbytes"] == now["dead_nbytes"] == 0
        return checked

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()
        self.source.end(wait=True)

    def stats(self) -> dict[str, int]:
        """The store's own figures, after it has proved that its index adds up."""
        client = self.engine.link.client
        assert client is not None
        answer = client.wait(client.stats(check=True), 10.0)
        assert isinstance(answer, Stats)
        assert answer.problem == ""
        return answer.figures


def shape(groups: str, **sizes: int) -> EngineShape:
    return EngineShape(groups=GROUPS[groups], chunk_tokens=CHUNK, **sizes)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("groups", list(GROUPS))
def test_a_prompt_comes_back(groups: str, ranks: int) -> None:
    with Bench(shape(groups, ranks=ranks, budget_tokens=12)) as bench:
        prompt = list(range(29))
        bench.engine.add("first", prompt, 4)
        bench.engine.run()
        assert bench.stored() == 3
        bench.forget_locally()
        again = bench.engine.add("again", prompt, 4)
        bench.engine.run()
        assert again.tokens == bench.engine.requests["first"].tokens
        assert bench.engine.external_tokens == 24 == bench.figure("delivered_tokens")
        assert bench.end() == 3 + 3


@pytest.mark.parametrize("groups", list(GROUPS))
def test_a_whole_prompt_is_loaded_beside_the_steps_and_all_but_one_within_them(groups: str) -> None:
    with Bench(shape(groups)) as bench:
        for name in ("first", "again"):
            bench.engine.add(name, list(range(32)), 2)
            bench.engine.run()
            bench.forget_locally()
        assert bench.engine.external_tokens == 31
        bench.end()


def test_a_whole_claim_leaves_the_window_of_the_last_token_whole() -> None:
    with Bench(EngineShape(groups=(GroupShape(4), GroupShape(4, window=5)), chunk_tokens=CHUNK)) as bench:
        for name in ("first", "again"):
            bench.engine.add(name, list(range(32)), 2)
            bench.engine.run()
            bench.forget_locally()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("groups", list(GROUPS))
def test_a_load_that_fails_on_one_rank_is_computed_again_and_never_asked_again(groups: str, rank: int) -> None:
    with Bench(shape(groups, ranks=2), failing={rank: {1}}) as bench:
        prompt = list(range(29))
        for name in ("first", "fails", "again"):
            bench.engine.add(name, prompt, 4)
            bench.engine.run()
            bench.forget_locally()
        assert [fault.failures for fault in bench.faults] == [int(n == rank) for n in range(2)]
        assert bench.engine.failed_loads == 1
        assert bench.figure("failed_tokens") == 16
        assert len({tuple(one.tokens) for one in bench.engine.requests.values()}) == 1
        retried = 8 if groups != "full" else 0  # vLLM starts such a request over
        assert bench.engine.external_tokens == 24 + retried + 8, "the chunk that failed was offered again"
        bench.end()


@pytest.mark.parametrize("failing", range(4))
def test_with_a_window_a_request_whose_load_failed_in_part_starts_over(failing: int) -> None:
    """Of what came before the part that failed, only what the last token sees was ever loaded."""
    with Bench(EngineShape(groups=(GroupShape(4, window=13),), chunk_tokens=CHUNK), failing={0: {failing}}) as bench:
        for name in ("first", "fails", "again"):
            bench.engine.add(name, list(range(29)), 4)
            bench.engine.run()
            bench.forget_locally()
        assert bench.faults[0].failures == 1
        assert len({tuple(one.tokens) for one in bench.engine.requests.values()}) == 1
        bench.end()


BESIDE = PlannerOptions(beside_steps=True, patience_s=10.0)


def kept(bench: Bench, prompt: Sequence[int]) -> None:
    """The prompt is in the store and nowhere else."""
    bench.engine.add("first", prompt, 1)
    bench.run()
    bench.forget_locally()


@pytest.mark.parametrize("groups", list(GROUPS))
def test_others_go_on_while_a_request_is_loaded_beside_the_steps(groups: str) -> None:
    with Bench(shape(groups), options=BESIDE, copier=HeldCopier) as bench:
        kept(bench, range(29))
        runs = bench.engine.add("runs", range(100, 110), 30)
        bench.engine.step()
        waits = bench.engine.add("waits", range(29), 2)
        before = runs.computed
        for _ in range(3):
            bench.engine.step()
        assert (waits.phase, runs.computed) == (Phase.LOADING, before + 3)
        bench.copy(0)
        bench.engine.step()
        bench.engine.step()
        assert waits.phase is Phase.RUNNING
        bench.run()
        bench.end()


def test_a_step_waits_for_its_own_copies_and_not_for_a_load_beside_it() -> None:
    layerwise = EngineShape(groups=(GroupShape(4, layers=2),), chunk_tokens=CHUNK, layerwise=True, budget_tokens=64)
    with Bench(layerwise, options=BESIDE, copier=HeldCopier) as bench:
        kept(bench, range(29))
        bench.engine.add("waits", range(29), 2)
        bench.engine.step()
        bench.engine.add("stores", range(100, 117), 2)
        before = bench.stored()
        bench.engine.step()
        assert bench.stored() == before + 2
        assert bench.engine.requests["waits"].phase is Phase.LOADING
        bench.run()
        bench.end()


@pytest.mark.parametrize("groups", list(GROUPS))
def test_a_request_given_up_in_mid_load_leaves_nothing(groups: str) -> None:
    with Bench(shape(groups, ranks=2), options=BESIDE, copier=HeldCopier) as bench:
        kept(bench, range(29))
        waits = bench.engine.add("waits", range(29), 2)
        bench.engine.step()
        bench.copy(0)
        bench.engine.step()
        bench.engine.abort("waits")
        bench.engine.step()
        assert (waits.phase, bench.stats()["pinned_nbytes"] > 0) == (Phase.GIVEN_UP, True), "rank 1 still copies"
        bench.copy(1)
        bench.engine.step()
        assert waits.phase is Phase.DONE
        bench.end()


def test_with_one_group_a_load_beside_the_steps_keeps_what_came_before_the_failure() -> None:
    with Bench(shape("full", ranks=2), options=BESIDE, failing={1: {1}}, copier=HeldCopier) as bench:
        kept(bench, range(29))
        fails = bench.engine.add("fails", range(29), 2)
        bench.run()
        assert (fails.phase, bench.engine.failed_loads, bench.figure("failed_tokens")) == (Phase.DONE, 1, 16)
        assert bench.engine.external_tokens == 24, "what arrived was asked for again"
        assert bench.figure("dropped_chunks") == 0, "no step has run on it"
        bench.end()


def test_a_failed_load_whose_request_goes_away_leaves_another_reader_of_its_blocks_right() -> None:
    with Bench(shape("full", budget_tokens=64), failing={0: {0}}) as bench:
        kept(bench, range(17))
        bench.engine.add("goes", [*range(16), *range(50, 53)], 2)
        bench.engine.add("stays", [*range(16), *range(70, 90)], 2)
        bench.engine.step()
        bench.engine.abort("goes")
        bench.run()
        assert bench.engine.failed_loads == 1
        bench.end()


def test_a_store_that_is_lost_again_before_a_loaded_request_runs_keeps_nothing_reserved_for_it() -> None:
    with Bench(shape("full"), options=BESIDE, copier=HeldCopier) as bench:
        kept(bench, range(29))
        waits = bench.engine.add("waits", range(29), 2)
        bench.engine.step()
        bench.copy(0)
        bench.lose()
        bench.engine.step()
        assert waits.phase is Phase.LOADED
        bench.lose()
        bench.run()
        bench.end()


def test_a_failure_beside_the_steps_drops_nothing_of_the_steps() -> None:
    with Bench(shape("full"), options=BESIDE, failing={0: {0}}, copier=HeldCopier) as bench:
        kept(bench, range(29))
        bench.engine.add("fails", range(29), 2)
        bench.engine.step()
        bench.engine.add("stores", range(100, 117), 2)
        bench.copy(0)
        bench.engine.step()
        assert bench.figure("dropped_chunks") == 0
        bench.run()
        assert bench.end() > 0


@pytest.mark.parametrize("groups", list(GROUPS))
@pytest.mark.parametrize("copier", [InlineCopier, ThreadCopier])
@pytest.mark.parametrize("layerwise", [False, True])
def test_a_prompt_comes_back_in_every_mode(groups: str, copier: type[Copier], layerwise: bool) -> None:
    with Bench(shape(groups, ranks=2, budget_tokens=12, layerwise=layerwise), copier=copier) as bench:
        for name in ("first", "again"):
            bench.engine.add(name, range(29), 4)
            bench.engine.run()
            bench.forget_locally()
        first, again = bench.engine.requests.values()
        assert first.tokens == again.tokens
        assert bench.engine.external_tokens == 24 == bench.figure("delivered_tokens")
        assert bench.end() == 3 + 3


def test_a_layer_that_fails_fails_its_chunk_and_taints_its_step() -> None:
    two_layers = EngineShape(groups=(GroupShape(4, layers=2),), chunk_tokens=CHUNK, layerwise=True, budget_tokens=64)
    with Bench(two_layers, failing={0: {3}}) as bench:  # chunks 0, 1 of layer 0, then 0, 1 of layer 1
        kept_before = bench.engine.add("first", range(16), 1)
        bench.engine.run()
        bench.forget_locally()
        bench.engine.add("fails", [*range(16), *range(50, 59)], 1)
        bench.engine.step()
        assert bench.figure("failed_tokens") == 8
        assert bench.stored() == 1, "the first chunk alone is left"
        bench.engine.run()
        assert kept_before.phase is Phase.DONE
        bench.end()


def test_nothing_of_a_tainted_step_becomes_readable() -> None:
    with Bench(shape("full", budget_tokens=64), failing={0: {0}}) as bench:
        bench.engine.add("first", list(range(8)), 1)
        bench.engine.run()
        bench.forget_locally()
        fails = bench.engine.add("fails", [*range(8), *range(50, 74)], 3)
        assert bench.stored() == 1
        bench.engine.step()  # loads chunk 0, which fails, and fills chunks 1..3 on top of it
        assert bench.stored() == 0, "the chunk that failed is not given out either"
        assert bench.figure("dropped_chunks") == 3
        bench.engine.run()
        assert bench.stored() == 3, "they are filled again by the step that computes them again"
        assert fails.phase is Phase.DONE
        bench.end()


def test_two_requests_of_one_step_with_one_prompt_store_it_once() -> None:
    with Bench(shape("full", budget_tokens=64)) as bench:
        for name in ("one", "two"):
            bench.engine.add(name, list(range(17)), 2)
        bench.engine.run()
        assert bench.stored() == 2
        bench.end()


def test_a_pool_that_is_full_of_pinned_chunks_stores_nothing_and_harms_nobody() -> None:
    with Bench(shape("full", budget_tokens=64), chunks=2) as bench:
        bench.engine.add("long", list(range(40)), 2)
        bench.engine.run()
        assert bench.stored() == 2
        assert bench.figure("skipped_full_chunks") == 3
        bench.end()


def test_generated_tokens_are_stored_when_it_is_wished() -> None:
    with Bench(shape("full"), options=PlannerOptions(store_generated=True, patience_s=10.0)) as bench:
        bench.engine.add("talks", list(range(5)), 20)
        bench.engine.run()
        assert bench.stored() == (5 + 20 - 1) // CHUNK
        bench.end()


def test_the_check_can_fail() -> None:
    with Bench(shape("full", budget_tokens=8)) as bench:
        request = bench.engine.add("first", list(range(24)), 2)
        bench.engine.step()
        bench.engine.model.caches[0][0, 0, 0, request.tables[0][0], 0] += 1
        with pytest.raises(AssertionError, match="is wrong"):
            bench.engine.step()


def on_device(groups: str, **sizes: object) -> Bench:
    """An engine whose ranks copy on devices that are as late as they may be."""
    return Bench(shape(groups, **sizes), copier=HeldCopier, on_device=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("groups", list(GROUPS))
def test_a_prompt_comes_back_on_a_device(groups: str, ranks: int, layerwise: bool) -> None:
    with on_device(groups, ranks=ranks, budget_tokens=12, layerwise=layerwise) as bench:
        prompt = list(range(29))
        bench.engine.add("first", prompt, 4)
        bench.run()
        assert bench.stored() == 3
        bench.forget_locally()
        again = bench.engine.add("again", prompt, 4)
        bench.run()
        assert again.tokens == bench.engine.requests["first"].tokens
        assert bench.engine.external_tokens == 24 == bench.figure("delivered_tokens")
        assert bench.end() == 3 + 3


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_device_that_is_late_stores_what_a_request_had_although_its_blocks_are_anothers(layerwise: bool) -> None:
    with on_device("full", num_blocks=7, layerwise=layerwise) as bench:
        bench.lock_pools()
        first = bench.engine.add("first", list(range(16)), 1)
        bench.engine.step()
        assert first.phase is Phase.DONE
        assert bench.stored() == 1, "told of before its copy was over"
        assert bench.stats()["writing_nbytes"] > 0, "the pool's memory was given back under a copy"
        bench.forget_locally()
        bench.engine.add("second", list(range(100, 124)), 1)
        bench.engine.step()
        bench.run()
        assert bench.stored() == 1 + 2 + 3
        assert bench.end() == 1 + 2 + 3


def test_a_preemption_before_a_late_store_is_over_costs_that_store_only() -> None:
    with on_device("full", num_blocks=20) as bench:
        bench.lock_pools()
        bench.engine.add("preempted", list(range(16)), 4)
        bench.engine.step()
        bench.engine.preempt()
        bench.forget_locally()
        bench.run()
        assert bench.stored() == 1 + 2
        assert bench.figure("dropped_chunks") == 2
        assert bench.end() == 1 + 2


# ---- anything, in any order ------------------------------------------------------------------------------------

PROMPTS = st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 30), st.integers(1, 6))
EVENTS = st.lists(
    st.sampled_from(["step"] * 6 + ["copy", "add"] * 3 + ["land", "preempt", "abort", "forget", "reset", "lose"]),
    max_size=40,
)


def prompt_of(stem: int, branch: int, length: int) -> Sequence[int]:
    """Prompts with one stem share their first 12 tokens; the branch says what follows."""
    return [*(stem * 100 + n for n in range(12)), *(branch * 1000 + n for n in range(length))][: 12 + length]


@settings(max_examples=60, deadline=None)
@given(
    on_device=st.booleans(),
    groups=st.sampled_from(list(GROUPS)),
    ranks=st.integers(1, 2),
    budget=st.integers(3, 40),
    chunks=st.integers(3, 30),
    verify_every=st.integers(0, 2),
    layerwise=st.booleans(),
    beside=st.booleans(),
    generated=st.booleans(),
    prompts=st.lists(PROMPTS, min_size=1, max_size=10),
    events=EVENTS,
    failing=st.dictionaries(st.integers(0, 1), st.sets(st.integers(0, 12), max_size=6), max_size=2),
    data=st.data(),
)
def test_whatever_happens_no_byte_is_wrong_and_everything_comes_back(
    on_device: bool,
    groups: str,
    ranks: int,
    budget: int,
    chunks: int,
    verify_every: int,
    layerwise: bool,
    beside: bool,
    generated: bool,
    prompts: list[tuple[int, int, int, int]],
    events: list[str],
    failing: dict[int, set[int]],
    data: st.DataObject,
) -> None:
    sizes = shape(
        groups, ranks=ranks, budget_tokens=budget, num_blocks=60, verify_every=verify_every, layerwise=layerwise
    )
    options = PlannerOptions(beside_steps=beside or groups != "full", store_generated=generated, patience_s=10.0)
    with Bench(sizes, chunks, options, failing, copier=HeldCopier, on_device=on_device) as bench:
        engine = bench.engine
        for event in events:
            if event == "add" and prompts:
                stem, branch, length, generate = prompts.pop()
                engine.add(f"{len(engine.requests)}", prompt_of(stem, branch, length), generate)
            elif event == "abort" and engine.requests:
                engine.abort(data.draw(st.sampled_from(sorted(engine.requests))))
            elif event == "copy":
                bench.copy(data.draw(st.integers(0, len(bench.copiers) - 1)), data.draw(st.integers(1, 4)))
            elif event == "land" and on_device:
                device = bench.devices[data.draw(st.integers(0, ranks - 1))]
                stream = device.stores if data.draw(st.booleans()) else device.loads
                stream.let_through(data.draw(st.integers(1, 4)))
            elif event in bench.events:
                bench.events[event]()
        for stem, branch, length, generate in prompts:
            engine.add(f"{len(engine.requests)}", prompt_of(stem, branch, length), generate)
        bench.run()
        # a device is late enough for a preemption to come before the end of a store
        late = on_device and "preempt" in events
        whole = not any(fault.failures for fault in bench.faults) and not {"reset", "lose"} & set(events)
        assert engine.planner.figures.count("dropped_chunks") == 0 or not whole or late
        bench.end()
