"""Loads of what a tier still reads: a worker goes by their progress, and a whole engine over a disk gives right answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvkeep.config import Config, Disk
from kvkeep.core.key import Chain, none_hash
from kvkeep.engine.copies.copies import Copy, Fault
from kvkeep.engine.copies.cpu import LOOK_S, CpuCopies, Timing
from kvkeep.engine.copies.thread import COPY_LIMIT_S, ThreadCopier
from kvkeep.engine.link import PrivateSource
from kvkeep.engine.plan import LoadOp, LoadsDone, RankInfo, StepPlan
from kvkeep.engine.rank.open import early_loads
from kvkeep.engine.scheduler.estimate import TRY_EVERY, Estimate
from kvkeep.engine.scheduler.planner import PlannerOptions
from kvkeep.errors import WireError
from kvkeep.memory.pool import Lease
from kvkeep.memory.progress import FAILED, TABLE_NBYTES, progress_at
from kvkeep.memory.region import Region
from kvkeep.telemetry import by_flat_name
from kvkeep.testing.doubles.faulty_files import flip_bit, record_paths
from kvkeep.testing.doubles.transfers import ManualClock
from kvkeep.testing.fake_engine.engine import FakeEngine
from kvkeep.testing.fake_engine.model import GroupShape
from kvkeep.testing.fake_engine.request import EngineShape
from kvkeep.transfer.transfer import Blocks
from kvkeep.wire.messages import Stats

from .test_worker import FIRST, POOL_NBYTES, Rank, scatter

AT = POOL_NBYTES - TABLE_NBYTES
LONG_S = 20.0


@pytest.fixture
def rank() -> Iterator[Rank]:
    made = Rank(0, layers=2, copier=ThreadCopier())
    yield made
    made.close()


def early(offset: int, *block_ids: int, at: int = AT, written: bool = False) -> LoadOp:
    return replace(scatter(offset, *block_ids), progress_at=at, written=written)


def plan_of(*ops: LoadOp, wait_s: float = LONG_S) -> StepPlan:
    return StepPlan(1, FIRST, (0, 8192), loads=ops, wait_s=wait_s)


def progress_of(pool: Region, at: int = AT) -> np.ndarray:
    return pool.array[at : at + 4].view(np.uint32)


def ended(rank: Rank, plan: StepPlan) -> tuple[int, ...]:
    """The step is computed; the places of its loads that failed."""
    for number in range(2):
        rank.worker.wait_layer(f"layer{number}")
    rank.worker.start_stores(plan)
    [done] = rank.worker.results.take_report().loads
    return done.failed


# ---- a worker --------------------------------------------------------------------------------------------------


def test_a_layer_waits_for_its_own_range_only(rank: Rank) -> None:
    pool = rank.hand(FIRST)
    pool.array[:4096] = 1
    progress_of(pool)[0] = 1
    plan = plan_of(early(0, 3, 4))
    rank.worker.start_loads(plan)
    rank.worker.wait_layer("layer0")
    assert (rank.cache[3:5].numpy().view(np.uint8) == 1).all()
    pool.array[4096:8192] = 2
    progress_of(pool)[0] = 2
    assert ended(rank, plan) == ()


def test_what_has_not_come_is_never_copied(rank: Rank) -> None:
    pool = rank.hand(FIRST)
    pool.array[: 4 * 8192] = 9  # what was there before
    progress_of(pool, AT + 4)[0] = 2
    plan = plan_of(early(0, 3, 4), early(8192, 5, 6, at=AT + 4), scatter(16384, 7, 8), wait_s=0.0)
    rank.worker.start_loads(plan)
    assert ended(rank, plan) == (0,)
    assert not rank.cache[3:5].any()
    assert rank.cache[5:9].all()


@pytest.mark.parametrize("arrived", [0, 1])
def test_a_read_that_fails_ends_the_wait_at_once(rank: Rank, arrived: int) -> None:
    pool = rank.hand(FIRST)
    progress_of(pool)[0] = arrived
    plan = plan_of(early(0, 3, 4), scatter(8192, 5, 6))
    rank.worker.start_loads(plan)
    progress_of(pool)[0] = FAILED
    assert ended(rank, plan) == (0,)
    assert rank.worker.results.take_failed_blocks() == {3, 4}


def test_what_is_given_up_while_it_is_copied_counts_as_failed(rank: Rank) -> None:
    pool = rank.hand(FIRST)
    progress_of(pool)[0] = 2
    inner = rank.faults.inner.scatter

    def scattering(lease: Lease, blocks: Sequence[Blocks], sums: bytes, layers: range | None = None) -> bool:
        if layers is None or layers.stop == 2:  # nothing comes after it that would see it
            progress_of(pool)[0] = FAILED
        return inner(lease, blocks, sums, layers)

    rank.faults.inner.scatter = scattering  # type: ignore[method-assign]
    for op in (early(0, 3, 4), early(0, 3, 4, written=True)):
        progress_of(pool)[0] = 2
        plan = plan_of(op)
        rank.worker.start_loads(plan)
        assert ended(rank, plan) == (0,)


@pytest.mark.parametrize("ranges", [1, 2])
def test_what_the_step_writes_is_all_there_before_it_or_failed(rank: Rank, ranges: int) -> None:
    pool = rank.hand(FIRST)
    pool.array[:8192] = 1
    progress_of(pool)[0] = ranges
    plan = plan_of(early(0, 3, 4, written=True), wait_s=0.0)
    rank.worker.start_loads(plan)
    assert bool(rank.cache[3:5].all()) == (ranges == 2), "it is there when this returns"
    assert ended(rank, plan) == (() if ranges == 2 else (0,))


def test_in_bulk_all_of_it_is_waited_for() -> None:
    rank = Rank(0, copier=ThreadCopier())
    pool = rank.hand(FIRST)
    pool.array[:4096] = 1
    threading.Timer(0.01, lambda: progress_of(pool).fill(1)).start()
    plan = StepPlan(1, FIRST, (0, 4096), loads=(early(0, 3, 4),), wait_s=LONG_S)
    rank.worker.start_loads(plan)
    assert rank.cache[3:5].all()
    rank.worker.start_stores(plan)
    assert rank.worker.results.take_report().loads == [LoadsDone(1, 0, ())]
    rank.close()


def test_one_limit_for_all_that_a_step_waits_for(rank: Rank) -> None:
    pool = rank.hand(FIRST)
    clock = ManualClock()
    looks = 0

    def pause(seconds: float) -> None:
        nonlocal looks
        looks += 1
        clock.advance(seconds)

    copies = CpuCopies(rank.faults, timing=Timing(clock, pause))
    with Region.create(POOL_NBYTES) as region:
        lease = Lease(region.array, rank.faults.shard, progress=progress_at(region, AT))
        late = [Copy(lease, [Blocks(0, 0, [block])]) for block in (3, 4, 5)]
        there = Copy(Lease(pool.array, rank.faults.shard), [Blocks(0, 0, [6])])
        assert len(copies.scatter(late).end()) == 3
        assert looks == 0, "nothing is waited for unless it is said how long"
        assert copies.scatter([*late, there], wait_s=1.0).end() == dict.fromkeys(range(3), Fault.LOST)
        assert looks == pytest.approx(1.0 / LOOK_S, rel=0.01)
        progress_of(region)[0] = 2
        assert copies.scatter(late, wait_s=1.0).end() == {}
        lease.close()


def test_however_long_a_lookup_may_wait_a_step_s_copies_are_not_taken_for_dead(rank: Rank) -> None:
    clock = ManualClock()
    copies = CpuCopies(rank.faults, timing=Timing(clock, clock.advance))
    with Region.create(POOL_NBYTES) as region:
        lease = Lease(region.array, rank.faults.shard, progress=progress_at(region, AT))
        assert copies.scatter([Copy(lease, [Blocks(0, 0, [3])])], wait_s=3600.0).end() == {0: Fault.LOST}
        assert 0.0 < clock() < COPY_LIMIT_S
        lease.close()


@pytest.mark.parametrize("at", [AT - 4, AT + 2, POOL_NBYTES])
def test_what_is_outside_of_the_table_is_not_taken_for_progress(rank: Rank, at: int) -> None:
    rank.hand(FIRST)
    with pytest.raises(WireError, match="outside of the progress table"):
        rank.worker.start_loads(plan_of(early(0, 3, 4, at=at)))


# ---- when ------------------------------------------------------------------------------------------------------


def test_only_what_was_measured_is_sure_and_it_is_measured_again_and_again() -> None:
    estimate = Estimate()
    assert not estimate.reads_within(1.0, 1)
    estimate.read(100, 10, 1.0)
    assert not estimate.reads_within(1.0, 101)
    assert [estimate.reads_within(1.0, 100) for _ in range(TRY_EVERY)] == [True] * (TRY_EVERY - 1) + [False]
    estimate.read(100, 10, 1.0)
    assert estimate.reads_within(1.0, 100)
    estimate.doubt()
    assert not estimate.reads_within(1.0, 100)


SET = Config(early_loads=True, transfer_mode="layerwise")
INFO = RankInfo(0, 1, "", None, facts={}, early=True)


@pytest.mark.parametrize(
    ("config", "ranks", "beside", "said"),
    [
        (SET, [INFO], False, "yes"),
        (Config(early_loads=True), [INFO], False, "transfer_mode is not"),
        (Config(early_loads=True, transfer_mode="layerwise", load="async"), [INFO], False, 'load is "async"'),
        (
            Config(early_loads=True, transfer_mode="layerwise", load_failure_policy="keep"),
            [INFO],
            False,
            "load_failure_policy is not",
        ),
        (SET, [INFO], True, "beside its steps"),
        (SET, [INFO, INFO], False, "one rank"),
        (SET, [RankInfo(0, 1, "", None, facts={})], False, "a core that it leaves free"),
    ],
)
def test_where_it_cannot_be_the_log_says_why(
    config: Config, ranks: list[RankInfo], beside: bool, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kvkeep")
    assert early_loads(config, ranks, beside) == (said == "yes")
    assert said in caplog.text


def test_it_is_off_and_says_nothing_unless_it_is_set(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "kvkeep")
    assert not early_loads(Config(transfer_mode="layerwise"), [INFO], False)
    assert caplog.text == ""


# ---- an engine over a disk -------------------------------------------------------------------------------------

SHAPE = EngineShape(groups=(GroupShape(4, layers=3),), num_blocks=128, budget_tokens=32, layerwise=True)
PROMPTS = [tuple((7 * number + place * place) % 8 for place in range(81 + number)) for number in range(6)]


@contextmanager
def engine(folder: Path, wait_s: float = LONG_S) -> Iterator[FakeEngine]:
    disk = Disk(path=(str(folder),), size=16 << 20, min_free=0)
    options = PlannerOptions(deadline_s=wait_s, patience_s=wait_s, early=True)
    made = FakeEngine(SHAPE, PrivateSource(Config(pool_size=4 << 20, log_level="error", tiers=[disk])), options)
    # how fast this machine computes just now must not decide whether its disk is worth the wait
    made.planner._estimate.compute_s = lambda start, end: None  # type: ignore[method-assign]
    try:
        until(made, lambda figures: bool(figures.get("disk_scanned")))  # its disk may open a moment after the store
        yield made
        until(made, lambda figures: not figures.get("disk_flush_waiting"))
    finally:
        made.close()


def until(made: FakeEngine, true: Callable[[dict[str, int]], bool]) -> None:
    """Asks the store for its figures until they are so; a store that is gone is not asked."""
    for _ in range(10_000):
        client = made.link.client
        stats = client.wait(client.stats(), LONG_S) if client is not None and client.alive else None
        if not isinstance(stats, Stats) or true(stats.figures):
            return


def answers(made: FakeEngine, prompts: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """One after the other; every block is checked after every step."""
    told = []
    for prompt in prompts:
        request = made.add(f"r{len(made.requests)}", prompt, 3)
        made.run()
        told.append(request.tokens)
    return told


def path_of(folder: Path, prompt: tuple[int, ...], number: int) -> str:
    digest = Chain(SHAPE.chunk_tokens, none_hash()).extend(prompt)[number].hex()
    return next(path for path in record_paths(str(folder)) if path.endswith(digest))


@pytest.mark.process
def test_a_restarted_engine_is_promised_what_is_still_on_disk(tmp_path: Path) -> None:
    with engine(tmp_path / "disk") as first:
        right = answers(first, PROMPTS)
    with engine(tmp_path / "disk") as again:
        assert answers(again, PROMPTS) == right
        counts = by_flat_name(again.planner.figures.rows())
        assert counts["disk_fetched_chunks"] == 10 * len(PROMPTS)
        # a busy machine has read some of them before they are promised
        assert 0 < counts["early_chunks"] <= 10 * (len(PROMPTS) - 1), "the first one was measured"
        assert (counts["early_failed_chunks"], counts["failed_tokens"]) == (0, 0)


@pytest.mark.process
@pytest.mark.parametrize("place", [0, 9])
def test_bad_records_are_computed_again_and_the_next_lookup_waits(tmp_path: Path, place: int) -> None:
    with engine(tmp_path / "disk") as first:
        right = answers(first, PROMPTS)
    flip_bit(path_of(tmp_path / "disk", PROMPTS[2], place), 8 * (4096 + 4096 + 100))  # in its second layer
    with engine(tmp_path / "disk") as again:
        assert answers(again, PROMPTS) == right
        counts = by_flat_name(again.planner.figures.rows())
        assert counts["early_failed_chunks"] == 1
        assert 0 < counts["early_chunks"] <= 10 * 4, "the first and the one after the failure were waited for"
        assert answers(again, PROMPTS[2:3]) == right[2:3], "and what was bad is there again"
        assert again.planner.figures.count("failed_tokens") == counts["failed_tokens"] >= 8


@pytest.mark.process
def test_a_store_that_is_killed_while_it_reads_costs_one_limit(tmp_path: Path) -> None:
    with engine(tmp_path / "disk") as first:
        right = answers(first, PROMPTS)
    with engine(tmp_path / "disk", wait_s=1.0) as again:
        assert answers(again, PROMPTS[:1]) == right[:1]
        inner, killed = again.workers[0].start_loads, []

        def kill_first(plan: StepPlan) -> None:
            """Its progress stays as it is from here on, and nothing says that it is gone."""
            if any(op.progress_at for op in plan.loads) and not killed:
                killed.append(plan.step)
                source = again.link.source
                assert isinstance(source, PrivateSource)
                assert source._child is not None
                source._child.process.kill()
                source._child.process.wait()
            inner(plan)

        again.workers[0].start_loads = kill_first  # type: ignore[method-assign]
        assert answers(again, PROMPTS[1:]) == right[1:]
        assert killed
