"""The rank's half alone: pools come through its door, plans come from the test."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvkeep.engine.copies.cpu import CpuCopies, Timing
from kvkeep.engine.copies.mode import CopyMode
from kvkeep.engine.copies.thread import Copier, ThreadCopier
from kvkeep.engine.plan import LoadOp, LoadsDone, Report, StepPlan, StoreOp, StoresDone, Trip
from kvkeep.engine.pool import MappedPool
from kvkeep.engine.rank.worker import Worker
from kvkeep.errors import BlockError
from kvkeep.memory.pool import Lease
from kvkeep.memory.region import Region
from kvkeep.testing.doubles.transfers import FaultyTransfer
from kvkeep.trace import Trace
from kvkeep.transfer.cpu import ReferenceTransfer
from kvkeep.transfer.pages import GroupCaches
from kvkeep.transfer.transfer import Blocks
from kvkeep.wire.pool_socket import HandedPool, PoolDoor, send_pool

NUM_BLOCKS, BLOCK_TOKENS, CHUNK_TOKENS = 16, 4, 8
FIRST, SECOND = b"boot number one.", b"boot number two."
POOL_NBYTES = 16 * 4096
LIMIT_S = 10.0


class Rank:
    """One worker over a cache of int64, one a token, and what a planner would do to it."""

    def __init__(self, rank: int, layers: int = 1, copier: Copier | None = None, trace: Trace | None = None) -> None:
        self.rank = rank
        self.cache = torch.zeros((NUM_BLOCKS, BLOCK_TOKENS), dtype=torch.int64)
        caches = {f"layer{n}": self.cache if not n else torch.zeros_like(self.cache) for n in range(layers)}
        groups = [GroupCaches(caches, NUM_BLOCKS, BLOCK_TOKENS, 0)]
        self.faults = FaultyTransfer(ReferenceTransfer(groups, CHUNK_TOKENS))
        self.door = PoolDoor()
        mode = CopyMode("layerwise" if layers > 1 else "bulk", possible=True)
        trace = trace or Trace()
        self.copies = CpuCopies(self.faults, copier, mode, timing=Timing(trace=trace))
        self.worker = Worker(rank, self.copies, MappedPool(self.door), trace)
        self.pools: list[Region] = []

    def hand(self, boot: bytes) -> Region:
        """A new pool at the door."""
        self.pools.append(Region.create(POOL_NBYTES))
        send_pool(self.door.path, HandedPool(boot, self.pools[-1].fd, self.pools[-1].fd), 5.0)
        return self.pools[-1]

    def load(self, *ops: LoadOp, boot: bytes = FIRST, step: int = 1) -> Report:
        plan = StepPlan(step, boot, (0, 4096), loads=ops)
        self.worker.start_loads(plan)
        self.worker.start_stores(plan)
        return self.worker.results.take_report()

    def store(self, *ops: StoreOp, boot: bytes = FIRST, step: int = 1) -> Report:
        self.worker.start_stores(StepPlan(step, boot, (0, 4096), stores=ops))
        return self.worker.results.take_report()

    def close(self) -> None:
        self.worker.close()
        for pool in self.pools:
            pool.close()


@pytest.fixture(params=[0, 1])
def rank(request: pytest.FixtureRequest) -> Iterator[Rank]:
    made = Rank(request.param)
    yield made
    made.close()


def gather(offset: int, *block_ids: int, seal: bool = True) -> StoreOp:
    return StoreOp(offset, (Blocks(0, 0, block_ids),), seal)


def scatter(offset: int, *block_ids: int, request: str = "r", boot: bytes = FIRST, sums: bytes = b"") -> LoadOp:
    return LoadOp(boot, request, 0, offset, blocks=(Blocks(0, 0, block_ids),), sums=(sums, sums) if sums else ())


def test_what_is_stored_comes_back_from_this_rank_s_part_of_the_chunk(rank: Rank) -> None:
    pool = rank.hand(FIRST)
    rank.cache[3], rank.cache[5] = 33, 55
    [stored] = rank.store(gather(8192, 3, 5)).stores
    assert (stored.step, stored.rank) == (1, rank.rank)
    assert len(stored.sums[0]) == 16
    here = pool.array[8192 + 4096 * rank.rank :][:64].view(np.int64)
    assert here.tolist() == [33] * 4 + [55] * 4
    assert np.count_nonzero(pool.array) == 8, "it wrote elsewhere as well"
    report = rank.load(scatter(8192, 10, 11, sums=stored.sums[0]), step=2)
    assert report == Report([LoadsDone(2, rank.rank, ())], [])
    assert rank.cache[10:12].tolist() == [[33] * 4, [55] * 4]
    assert (rank.worker.results.take_failed_blocks(), rank.worker.results.take_loaded()) == (set(), {})


def test_everything_is_told_once(rank: Rank) -> None:
    rank.load(scatter(0, 1, 2))
    assert not rank.worker.results.take_report()
    assert (rank.worker.results.take_failed_blocks(), rank.worker.results.take_loaded()) == ({1, 2}, {})
    assert (rank.worker.results.take_failed_blocks(), rank.worker.results.take_loaded()) == (set(), {})


def test_a_plan_without_copies_needs_no_report(rank: Rank) -> None:
    assert not rank.load()
    assert not rank.store()


def test_only_a_seal_is_summed(rank: Rank) -> None:
    rank.hand(FIRST)
    report = rank.store(gather(0, 1, seal=False), gather(8192, 1, 2))
    assert [len(report.stores[0].sums[place]) for place in (0, 1)] == [0, 16]


@pytest.mark.parametrize("pools", [(), (SECOND,), (FIRST, SECOND)], ids=["no pool", "another", "a newer one"])
def test_without_the_plan_s_pool_loads_fail_and_stores_are_missing(rank: Rank, pools: tuple[bytes, ...]) -> None:
    regions = [rank.hand(boot) for boot in pools]
    if FIRST in pools:  # a plan has named the newer one
        rank.load(scatter(0, 6, boot=SECOND), boot=SECOND)
    rank.cache[:] = 7
    assert rank.load(scatter(0, 1, 2), scatter(8192, 3)) == Report([LoadsDone(1, rank.rank, (0, 1))], [])
    assert rank.store(gather(0, 4, 5)) == Report([], [StoresDone(1, rank.rank, {})])
    assert rank.worker.results.take_failed_blocks() == {1, 2, 3}
    assert (rank.cache == 7).all()
    assert not any(region.array.any() for region in regions)


def test_a_pool_that_comes_late_serves_the_next_plan(rank: Rank) -> None:
    assert rank.store(gather(0, 1, 2)).stores[0].sums == {}
    rank.hand(FIRST)
    assert set(rank.store(gather(0, 1, 2)).stores[0].sums) == {0}


def test_a_load_names_its_own_boot_whatever_the_plan_stores_in(rank: Rank) -> None:
    rank.hand(SECOND)
    plan = (scatter(0, 1, 2, request="old"), scatter(0, 3, 4, request="new", boot=SECOND))
    assert rank.load(*plan, boot=SECOND).loads == [LoadsDone(1, rank.rank, (0,))]
    assert rank.worker.results.take_failed_blocks() == {1, 2}


def test_the_pool_of_an_earlier_boot_is_not_touched_again(rank: Rank) -> None:
    old = rank.hand(FIRST)
    rank.cache[1] = 1
    rank.store(gather(0, 1, 2))
    before = bytes(old.array)
    new = rank.hand(SECOND)
    rank.cache[1] = 9
    assert set(rank.store(gather(0, 1, 2), boot=SECOND).stores[0].sums) == {0}
    assert rank.store(gather(0, 1, 2), boot=FIRST).stores[0].sums == {}
    assert bytes(old.array) == before
    assert new.array.any()


@pytest.mark.parametrize("layers", [1, 2])
def test_what_failed_is_known_before_the_end_of_a_step_with_a_drafter(layers: int) -> None:
    """vLLM asks for it when the model has run, and ends the step when the drafter has: the tokens are told in between."""
    rank = Rank(0, layers)
    rank.hand(FIRST)
    rank.faults.failing_blocks = {3}
    plan = StepPlan(1, FIRST, (0, 8192), loads=(scatter(0, 1, 2), scatter(16384, 3, 4)), stores=(gather(32768, 5, 6),))
    rank.worker.start_loads(plan)
    for number in range(layers):
        rank.worker.wait_layer(f"layer{number}")
        rank.worker.save_layer(plan, f"layer{number}")
    rank.worker.poll(plan)
    assert rank.worker.results.take_failed_blocks() == {3, 4}
    assert rank.worker.results.take_report() == Report([LoadsDone(1, 0, (1,))], [])
    rank.worker.start_stores(plan)
    assert rank.worker.results.take_failed_blocks() == set()
    report = rank.worker.results.take_report()
    assert (report.loads, len(report.stores)) == ([], 1)
    rank.close()


def test_a_request_is_loaded_beside_the_steps_only_if_every_chunk_was(rank: Rank) -> None:
    rank.hand(FIRST)
    rank.faults.failing_calls = {1}
    ops = (scatter(0, 1, 2), scatter(8192, 3, 4), scatter(0, 5, 6))
    plan = StepPlan(1, FIRST, (0, 4096), trips=(Trip(2, ops), Trip(3, (scatter(0, 7, request="other"),))))
    rank.worker.start_loads(plan)
    rank.worker.start_stores(plan)
    assert not rank.worker.results.take_report(), "nothing is said before it is asked for"
    rank.worker.poll(plan)
    assert rank.worker.results.take_report().loads == [LoadsDone(2, rank.rank, (1,)), LoadsDone(3, rank.rank, ())]
    assert rank.worker.results.take_loaded() == {"r": False, "other": True}
    assert rank.worker.results.take_failed_blocks() == {3, 4}


def test_a_chunk_that_changed_after_it_was_written_fails_and_is_not_copied(
    rank: Rank, caplog: pytest.LogCaptureFixture
) -> None:
    pool = rank.hand(FIRST)
    rank.cache[1] = 5
    sums = rank.store(gather(0, 1, 2)).stores[0].sums[0]
    pool.array[4096 * rank.rank] ^= 1
    assert rank.load(scatter(0, 3, 4, sums=sums)).loads == [LoadsDone(1, rank.rank, (0,))]
    assert not rank.cache[3:5].any()
    assert "please report this" in caplog.text


@pytest.mark.parametrize("block_id", [0, NUM_BLOCKS])
def test_a_plan_is_checked_before_anything_is_copied(rank: Rank, block_id: int) -> None:
    pool = rank.hand(FIRST)
    pool.array[:] = 1
    with pytest.raises(BlockError):
        rank.load(scatter(0, 1, 2), scatter(0, block_id))
    with pytest.raises(BlockError):
        rank.load(scatter(0, 1), scatter(0, 1))
    with pytest.raises(BlockError):
        rank.store(gather(0, 1), gather(8192, block_id))
    assert not rank.cache.any()
    assert (pool.array == 1).all()


def test_a_descriptor_that_is_no_pool_is_no_pool(rank: Rank, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(POOL_NBYTES))
    fd = os.open(tmp_path / "file", os.O_RDWR)
    send_pool(rank.door.path, HandedPool(FIRST, fd, fd), 5.0)
    os.close(fd)
    assert rank.load(scatter(0, 1)).loads == [LoadsDone(1, rank.rank, (0,))]
    rank.hand(FIRST)
    assert rank.load(scatter(0, 1)).loads == [LoadsDone(1, rank.rank, ())]


def test_a_closed_worker_has_no_door_and_may_be_closed_twice(rank: Rank) -> None:
    rank.hand(FIRST)
    rank.store(gather(0, 1, 2))
    for _ in range(2):
        rank.worker.close()
    assert not Path(rank.door.path).parent.exists()


# ---- layer by layer --------------------------------------------------------------------------------------------


def plan_of(*ops: LoadOp, step: int = 1) -> StepPlan:
    return StepPlan(step, FIRST, (0, 8192), loads=ops)


def test_what_is_verified_or_written_by_the_step_is_there_before_the_first_layer() -> None:
    rank = Rank(0, layers=2)
    pool = rank.hand(FIRST)
    rank.cache[1:3] = 5
    sums = rank.store(gather(0, 1, 2)).stores[0].sums[0]
    pool.array[16384:32768] = 1
    ops = scatter(0, 3, 4, sums=sums), replace(scatter(16384, 5, 6), written=True), scatter(16384, 7, 8)
    plan = plan_of(*ops, step=2)
    rank.worker.start_loads(plan)
    assert [bool(rank.cache[block].all()) for block in (3, 4, 5, 6, 7, 8)] == [True] * 4 + [False] * 2
    for name in ("layer0", "layer1"):
        rank.worker.wait_layer(name)
    rank.worker.start_stores(plan)
    assert rank.worker.results.take_report().loads == [LoadsDone(2, 0, ())]
    assert rank.cache[7:9].all()
    rank.close()


def test_a_chunk_that_failed_in_a_layer_is_left_alone_in_later_ones_and_the_others_are_not() -> None:
    rank = Rank(0, layers=3)
    pool = rank.hand(FIRST)
    pool.array[:] = 1
    rank.faults.failing_calls = {0}
    plan = plan_of(scatter(0, 1, 2), scatter(16384, 3, 4))
    rank.worker.start_loads(plan)
    for number in range(3):
        rank.worker.wait_layer(f"layer{number}")
    rank.worker.start_stores(plan)
    assert rank.worker.results.take_report().loads == [LoadsDone(1, 0, (0,))]
    assert rank.faults.calls == 1 + 3
    assert not rank.cache[1:3].any()
    assert rank.cache[3:5].all()
    rank.close()


@pytest.mark.parametrize("copier", [None, ThreadCopier])
@pytest.mark.parametrize("waited", [["layer0", "layer1"], ["layer0"], []])
def test_what_a_layer_that_did_not_wait_has_loaded_counts_as_failed(
    waited: list[str], copier: type[ThreadCopier] | None, caplog: pytest.LogCaptureFixture
) -> None:
    rank = Rank(0, layers=2, copier=copier() if copier is not None else None)
    pool = rank.hand(FIRST)
    pool.array[:] = 1
    plan = plan_of(scatter(0, 1, 2), scatter(16384, 3, 4))
    rank.worker.start_loads(plan)
    for name in waited:
        rank.worker.wait_layer(name)
    rank.worker.start_stores(plan)
    assert rank.worker.results.take_report().loads == [LoadsDone(1, 0, () if len(waited) == 2 else (0, 1))]
    assert ("this engine does not wait for layers" in caplog.text) == (len(waited) < 2)
    if len(waited) < 2:
        assert rank.load(scatter(0, 5, 6), step=2).loads == [LoadsDone(2, 0, ())], "in bulk from then on"
        assert rank.cache[5:7].all()
    rank.close()


def test_a_layer_is_computed_while_the_next_one_arrives(tmp_path: Path) -> None:
    rank = Rank(0, layers=3, copier=ThreadCopier(), trace=Trace(str(tmp_path / "trace.json")))
    rank.hand(FIRST)
    runs = {number: threading.Event() for number in range(3)}
    inner = rank.faults.inner.scatter

    def scattering(lease: Lease, blocks: Sequence[Blocks], sums: bytes, layers: range | None = None) -> bool:
        """A layer's copy ends only when the layer before it is being computed."""
        assert layers is not None
        assert layers.start == 0 or runs[layers.start - 1].wait(LIMIT_S)
        return inner(lease, blocks, sums, layers)

    rank.faults.inner.scatter = scattering  # type: ignore[method-assign]
    plan = plan_of(scatter(0, 1, 2))
    rank.worker.start_loads(plan)
    for number, run in runs.items():
        rank.worker.wait_layer(f"layer{number}")
        run.set()
    rank.worker.start_stores(plan)
    assert rank.worker.results.take_report().loads == [LoadsDone(1, 0, ())]
    rank.close()
    (file,) = tmp_path.iterdir()
    spans = {one["name"]: one for one in json.loads(file.read_text())["traceEvents"] if one["ph"] == "X"}
    for number in range(2):
        load, compute = spans[f"load layer {number + 1}"], spans[f"compute layer {number}"]
        assert load["ts"] < compute["ts"] + compute["dur"]
        assert compute["ts"] < load["ts"] + load["dur"]
