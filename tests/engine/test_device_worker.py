"""The rank's half on a device whose copies are made when the test says so, and never before their events allow."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from kvkeep.engine.copies.device import DeviceCopies, Settlers
from kvkeep.engine.copies.mode import Mode, SizeMode
from kvkeep.engine.copies.thread import Copier, ThreadCopier
from kvkeep.engine.plan import LoadOp, LoadsDone, Report, StepPlan, StoreOp, Trip
from kvkeep.engine.pool import MappedPool
from kvkeep.engine.rank.worker import Worker
from kvkeep.memory.page_lock import PinCalls
from kvkeep.memory.pool import Lease, Pool
from kvkeep.memory.region import Region
from kvkeep.testing.doubles.device import LOCKS, HeldDevice
from kvkeep.testing.doubles.transfers import HeldCopier
from kvkeep.transfer.cpu import ReferenceTransfer
from kvkeep.transfer.pages import GroupCaches
from kvkeep.transfer.transfer import Blocks, seal_ranges
from kvkeep.wire.pool_socket import HandedPool, PoolDoor, send_pool

NUM_BLOCKS, BLOCK_TOKENS, CHUNK_TOKENS, LAYERS = 16, 4, 8, 3
FIRST, SECOND = b"boot number one.", b"boot number two."
CHUNK_NBYTES = LAYERS * 4096
POOL_NBYTES = 16 * CHUNK_NBYTES
LIMIT_S = 10.0


class Locks:
    """Notes what is page-locked."""

    def __init__(self, refusal: str = "") -> None:
        self.refusal = refusal
        self.locked: set[int] = set()
        self.some = threading.Event()
        self.calls = PinCalls(self.lock, self.unlock)

    def lock(self, address: int, nbytes: int) -> str:
        if not self.refusal:
            self.locked.add(address)
            self.some.set()
        return self.refusal

    def unlock(self, address: int) -> str:
        self.locked.remove(address)
        return ""


class OneRank:
    """One worker over layers of int64, one a token; jobs that wait for copies are run by the test."""

    def __init__(self, mode: Mode = "auto", calls: PinCalls = LOCKS) -> None:
        self.caches = {f"l{n}": torch.zeros((NUM_BLOCKS, BLOCK_TOKENS), dtype=torch.int64) for n in range(LAYERS)}
        self.groups = [GroupCaches(self.caches, NUM_BLOCKS, BLOCK_TOKENS, 0)]
        self.device = HeldDevice()
        self.door = PoolDoor()
        self.settlers = HeldCopier(), HeldCopier()
        self.pool = MappedPool(self.door, calls)
        self.transfer = self.device.transfer(self.groups, CHUNK_TOKENS)
        self.worker = self.make(*self.settlers, mode=mode)
        self.regions: list[Region] = []
        self.pools: list[Pool] = []

    def make(self, scatters: Copier, gathers: Copier, mode: Mode = "auto") -> Worker:
        """A worker over the same cache and the same pool."""
        return Worker(0, DeviceCopies(self.transfer, SizeMode(mode), Settlers(scatters, gathers)), self.pool)

    def hand(self, boot: bytes = FIRST) -> Region:
        """A new pool, mapped and (if it can be) page-locked."""
        self.regions.append(Region.create(POOL_NBYTES))
        send_pool(self.door.path, HandedPool(boot, self.regions[-1].fd, self.regions[-1].fd), 5.0)
        lease = self.pool.lease(boot, 0, self.transfer.shard)
        assert lease is not None
        lease.close()
        assert self.pool._pool is not None
        self.pools.append(self.pool._pool)
        self.pools[-1].populated.wait(LIMIT_S)
        return self.regions[-1]

    def retired(self) -> None:
        """A pool that was replaced has ended, unless one of its leases has not."""
        self.pools[0].wait(LIMIT_S)

    def fill(self, block_id: int, value: int) -> None:
        for number, cache in enumerate(self.caches.values()):
            cache[block_id] = 10 * value + number

    def holds(self, block_id: int, value: int) -> bool:
        return all(bool((one[block_id] == 10 * value + n).all()) for n, one in enumerate(self.caches.values()))

    def settle(self) -> None:
        """All that waits for copies gets its turn."""
        for settler in self.settlers:
            settler.run(1 << 30)

    def told(self, plan: StepPlan | None = None) -> Report:
        self.worker.poll(plan or StepPlan())
        return self.worker.results.take_report()

    def close(self) -> None:
        self.worker.close()
        for region in self.regions:
            region.close()


@pytest.fixture
def one() -> Iterator[OneRank]:
    made = OneRank()
    yield made
    made.close()


def storing(*ops: StoreOp, step: int = 1, boot: bytes = FIRST) -> StepPlan:
    return StepPlan(step, boot, (0,), stores=ops)


def gather(chunk: int, *block_ids: int) -> StoreOp:
    return StoreOp(chunk * CHUNK_NBYTES, (Blocks(0, 0, block_ids),), True)


def loading(*ops: LoadOp, step: int = 1) -> StepPlan:
    return StepPlan(step, FIRST, (0,), loads=ops)


def scatter(chunk: int, *block_ids: int, boot: bytes = FIRST, **facts: object) -> LoadOp:
    return LoadOp(boot, "r", 0, chunk * CHUNK_NBYTES, blocks=(Blocks(0, 0, block_ids),), **facts)  # type: ignore[arg-type]


def chunk_of(pool: Region, chunk: int) -> np.ndarray:
    """The words of a chunk: a row a layer."""
    part = pool.array[chunk * CHUNK_NBYTES : (chunk + 1) * CHUNK_NBYTES].view(np.int64)
    return part.reshape(LAYERS, -1)[:, :CHUNK_TOKENS]


def sums_of(one: OneRank, pool: Region, chunk: int) -> bytes:
    """What the reference sums over the same blocks."""
    transfer = ReferenceTransfer(one.groups, CHUNK_TOKENS)
    memory = pool.array[chunk * CHUNK_NBYTES : (chunk + 1) * CHUNK_NBYTES].copy()
    return seal_ranges(transfer.shard.ranges, Lease(memory, transfer.shard).views())


def test_a_store_is_told_of_when_its_copy_is_over_and_not_before(one: OneRank) -> None:
    pool = one.hand()
    one.fill(3, 3)
    one.fill(5, 5)
    one.worker.start_stores(storing(gather(1, 3, 5)))
    assert not one.told()
    assert not one.told(StepPlan(idle=True)), "an idle step invents an end"
    assert not pool.array.any(), "the double copied too early to prove anything"
    one.device.stores.let_through()
    assert not one.told(), "its sums are not there"
    one.settle()
    (done,) = one.told().stores
    assert (done.step, done.rank) == (1, 0)
    assert chunk_of(pool, 1).tolist() == [[30 + n] * 4 + [50 + n] * 4 for n in range(LAYERS)]
    assert done.sums == {0: sums_of(one, pool, 1)}
    assert one.device.stores.waits == 0


def test_a_block_may_be_written_to_at_once_since_the_device_writes_after_it_has_read(one: OneRank) -> None:
    pool = one.hand()
    one.fill(3, 3)
    one.fill(5, 5)
    one.worker.start_stores(storing(gather(1, 3, 5)))
    one.worker.before_writes()  # another request was given the block
    one.fill(3, 9)
    one.settle()
    assert one.told().stores
    assert chunk_of(pool, 1)[0].tolist() == [30] * 4 + [50] * 4


@pytest.mark.parametrize("mode", ["bulk", "auto", "layerwise"])
def test_a_load_is_there_for_what_is_launched_after_it_and_told_of_when_it_is_over(mode: Mode) -> None:
    one = OneRank(mode)
    pool = one.hand()
    pool.array[:] = np.arange(POOL_NBYTES // 8, dtype=np.int64).view(np.uint8)
    plan = loading(scatter(1, 2, 4))
    one.worker.start_loads(plan)
    for number, (name, cache) in enumerate(one.caches.items()):
        one.worker.wait_layer(name)
        assert cache[[2, 4]].ravel().tolist() == chunk_of(pool, 1)[number].tolist(), name
    if mode == "layerwise":
        assert one.device.loads.waits == 0
    one.worker.start_stores(plan)
    assert not one.told(), "nobody saw the end of the copy"
    one.settle()
    assert one.told() == Report([LoadsDone(1, 0, ())])
    assert one.worker.results.take_failed_blocks() == set()
    assert one.device.loads.waits == 0
    one.close()


def test_by_layer_a_layer_waits_for_its_own_part_only() -> None:
    one = OneRank("layerwise")
    pool = one.hand()
    pool.array[:] = 1
    plan = loading(scatter(0, 2, 4), scatter(1, 6, written=True))
    one.worker.start_loads(plan)
    assert all(bool(cache[6].all()) for cache in one.caches.values()), "what the step writes to was not there first"
    for number, name in enumerate(one.caches):
        one.worker.wait_layer(name)
        one.worker.wait_layer(name)
        there = [bool(cache[2].all()) for cache in one.caches.values()]
        assert there == [n <= number for n in range(LAYERS)]
    one.worker.wait_layer("a layer without a cache")
    one.worker.start_stores(plan)
    one.settle()
    assert one.told() == Report([LoadsDone(1, 0, ())])
    one.close()


def test_an_engine_that_does_not_wait_for_layers_computes_again_and_gets_them_in_bulk_from_then_on() -> None:
    one = OneRank("layerwise")
    pool = one.hand()
    pool.array[:] = 1
    plan = loading(scatter(0, 2, 4), scatter(1, 6))
    one.worker.start_loads(plan)
    one.worker.wait_layer("l0")
    one.worker.start_stores(plan)
    assert one.told() == Report([LoadsDone(1, 0, (0, 1))])
    assert one.worker.results.take_failed_blocks() == {2, 4, 6}
    assert not one.device.loads.held, "a copy may still write to blocks that were reported"
    plan = loading(scatter(0, 2, 4), step=2)
    one.worker.start_loads(plan)
    assert not one.device.loads.held, "in bulk"
    one.worker.start_stores(plan)
    one.settle()
    assert one.told() == Report([LoadsDone(2, 0, ())])
    one.close()


@pytest.mark.parametrize("mode", ["layerwise", "auto"])
def test_by_layer_a_store_leaves_behind_its_layer(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvkeep.engine.copies.mode.BY_LAYER_NBYTES", 2 * CHUNK_NBYTES)
    one = OneRank(mode)
    pool = one.hand()
    plan = storing(gather(0, 1, 2), gather(1, 3))
    for number, (name, cache) in enumerate(one.caches.items()):
        cache[:] = number + 1
        one.worker.save_layer(plan, name)
        assert len(one.device.stores.held) == 1
        one.device.stores.let_through()
        assert [bool(row.all()) for row in chunk_of(pool, 0)] == [n <= number for n in range(LAYERS)]
    one.worker.save_layer(plan, "a layer without a cache")
    one.worker.start_stores(plan)
    assert not one.device.stores.held
    one.settle()
    (done,) = one.told().stores
    assert done.sums == {n: sums_of(one, pool, n) for n in (0, 1)}
    one.close()


def test_a_layer_that_came_in_parts_is_stored_as_it_was_at_last_and_one_that_never_came_too() -> None:
    one = OneRank("layerwise")
    pool = one.hand()
    plan = storing(gather(0, 1, 2))
    one.fill(1, 1)
    one.worker.save_layer(plan, "l1")
    one.device.stores.let_through()
    one.fill(2, 2)
    one.worker.save_layer(plan, "l1")
    one.worker.start_stores(plan)
    one.settle()
    (done,) = one.told().stores
    assert chunk_of(pool, 0).tolist() == [[10 + n] * 4 + [20 + n] * 4 for n in range(LAYERS)]
    assert done.sums == {0: sums_of(one, pool, 0)}
    one.close()


def test_small_stores_go_in_one_batch(one: OneRank) -> None:
    one.hand()
    plan = storing(gather(0, 1, 2))
    for name in one.caches:
        one.worker.save_layer(plan, name)
    assert not one.device.stores.held
    one.worker.start_stores(plan)
    assert len(one.device.stores.held) == 1


def test_a_load_beside_the_steps_is_over_when_its_copy_is(one: OneRank) -> None:
    pool = one.hand()
    pool.array[:] = 1
    one.worker.start_loads(StepPlan(4, FIRST, (0,), trips=(Trip(7, (scatter(0, 2, 4),)),)))
    one.worker.start_stores(StepPlan(4, FIRST, (0,)))
    assert not one.told()
    assert one.worker.results.take_loaded() == {}
    assert not one.caches["l0"].any()
    one.settle()
    assert one.told() == Report([LoadsDone(7, 0, ())])
    assert one.worker.results.take_loaded() == {"r": True}
    assert bool(one.caches["l0"][[2, 4]].all())


def test_a_step_s_stores_are_reported_after_its_loads(one: OneRank) -> None:
    """Else a chunk that was computed from a load that fails could be committed first."""
    pool = one.hand()
    pool.array[:] = 1
    plan = StepPlan(1, FIRST, (0,), loads=(scatter(0, 2, 4),), stores=(gather(1, 5, 6),))
    one.worker.start_loads(plan)
    one.worker.start_stores(plan)
    one.settlers[1].run(9)  # the stores are over
    assert not one.told()
    one.settle()
    report = one.told()
    assert (report.loads, [done.step for done in report.stores]) == ([LoadsDone(1, 0, ())], [1])


def test_without_the_plans_pool_loads_fail_at_once_and_stores_are_told_to_be_missing(one: OneRank) -> None:
    one.hand()
    plan = StepPlan(1, FIRST, (0,), loads=(scatter(0, 2), scatter(1, 3, 4, boot=SECOND)), stores=(gather(2, 5, 6),))
    one.worker.start_loads(plan)
    one.worker.start_stores(plan)
    assert one.told().loads == [LoadsDone(1, 0, (1,))]
    assert one.worker.results.take_failed_blocks() == {3, 4}
    one.worker.start_stores(storing(gather(0, 1, 2), step=2, boot=SECOND))
    one.settle()
    assert [(done.step, set(done.sums)) for done in one.told().stores] == [(1, {0}), (2, set())]
    one.worker.start_loads(StepPlan(3, FIRST, (0,), trips=(Trip(9, (scatter(0, 7, boot=SECOND),)),)))
    one.settle()
    assert one.told().loads == [LoadsDone(9, 0, (0,))]
    assert one.worker.results.take_loaded() == {"r": False}
    assert one.worker.results.take_failed_blocks() == {7}


def test_what_failed_is_known_before_the_end_of_a_step_with_a_drafter(one: OneRank) -> None:
    """vLLM asks for it when the model has been launched, and ends the step when the drafter has."""
    one.hand()
    plan = loading(scatter(0, 1, 2), scatter(1, 3, 4, boot=SECOND))
    one.worker.start_loads(plan)
    assert one.told(plan).loads == [LoadsDone(1, 0, (1,))]
    assert one.worker.results.take_failed_blocks() == {3, 4}
    one.worker.start_stores(plan)
    one.settle()
    assert not one.told(plan)


def test_a_chunk_that_changed_is_not_loaded(one: OneRank) -> None:
    pool = one.hand()
    one.fill(1, 1)
    one.worker.start_stores(storing(gather(0, 1, 2)))
    one.settle()
    (sums,) = one.told().stores[0].sums.values()
    for step, wrong in ((2, False), (3, True)):
        pool.array[CHUNK_NBYTES - 4096] ^= wrong
        plan = loading(scatter(0, 3, 4, sums=(sums,)), step=step)
        one.worker.start_loads(plan)
        one.worker.start_stores(plan)
        one.settle()
        assert one.told().loads == [LoadsDone(step, 0, (0,) if wrong else ())]
        assert one.worker.results.take_failed_blocks() == ({3, 4} if wrong else set())
        assert one.holds(3, 1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_copies_whose_end_nobody_saw_are_told_as_lost(one: OneRank) -> None:
    one.hand()

    def died() -> Copier:
        before = set(threading.enumerate())
        copier = ThreadCopier()
        (thread,) = set(threading.enumerate()) - before
        copier.submit(lambda: 1 // 0).exception(LIMIT_S)
        thread.join(LIMIT_S)  # what it died of is told in this test, and not in a later one
        return copier

    worker = one.make(died(), died())
    worker.start_loads(StepPlan(1, FIRST, (0,), loads=(scatter(0, 2),), trips=(Trip(2, (scatter(0, 3),)),)))
    worker.start_stores(StepPlan(1, FIRST, (0,), loads=(scatter(0, 2),), stores=(gather(2, 5, 6),)))
    worker.poll(StepPlan())
    report = worker.results.take_report()
    assert sorted(report.loads) == [LoadsDone(1, 0, (0,)), LoadsDone(2, 0, (0,))]
    assert [done.sums for done in report.stores] == [{}]
    assert worker.results.take_failed_blocks() == {2, 3}


def test_a_thread_waits_for_copies_while_the_engine_goes_on(one: OneRank) -> None:
    pool = one.hand()
    worker = one.make(ThreadCopier(), ThreadCopier())
    one.fill(1, 1)
    worker.start_stores(storing(gather(0, 1, 2)))
    for _ in range(2000):
        worker.poll(StepPlan(idle=True))
        if report := worker.results.take_report():
            break
    assert report.stores[0].sums == {0: sums_of(one, pool, 0)}
    worker.close()


# ---- page-locked memory ----------------------------------------------------------------------------------------


def test_the_pool_is_locked_until_its_last_copy_is_over_and_again_at_a_new_boot() -> None:
    locks = Locks()
    one = OneRank(calls=locks.calls)
    one.hand(FIRST)
    first = set(locks.locked)
    assert len(first) == 1
    one.worker.start_stores(storing(gather(0, 1, 2)))
    one.hand(SECOND)
    one.retired()
    assert len(locks.locked) == 2, "unlocked under a copy"
    one.settle()
    assert one.told().stores
    one.retired()
    assert len(locks.locked) == 1
    assert not locks.locked & first
    one.worker.start_stores(storing(gather(0, 1, 2), step=2, boot=SECOND))
    one.close()
    assert not locks.locked
    assert not one.device.stores.held, "closed under a copy"


def test_a_pool_is_taken_and_locked_before_a_step_needs_it() -> None:
    locks = Locks()
    one = OneRank(calls=locks.calls)
    region = Region.create(POOL_NBYTES)
    send_pool(one.door.path, HandedPool(FIRST, region.fd, region.fd), 5.0)
    assert locks.some.wait(LIMIT_S)
    one.close()
    assert not locks.locked
    region.close()


def test_nobody_watches_for_a_pool_after_the_end() -> None:
    one = OneRank()
    one.close()
    assert not one.pool._thread.is_alive()


def test_a_pool_that_cannot_be_locked_works_through_staging_copies_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = OneRank("layerwise", Locks("no permission").calls)
    pool = one.hand()
    assert "(no permission): each copy of the rest goes through a staging buffer" in caplog.text
    one.fill(1, 1)
    one.fill(2, 2)
    plan = storing(gather(0, 1, 2))
    one.worker.save_layer(plan, "l0")
    one.worker.start_stores(plan)
    one.settle()
    (done,) = one.told().stores
    assert done.sums == {0: sums_of(one, pool, 0)}
    plan = loading(scatter(0, 3, 4), step=2)
    one.worker.start_loads(plan)
    assert one.holds(3, 1)
    assert one.holds(4, 2)
    one.worker.start_stores(plan)
    one.settle()
    assert one.told().loads == [LoadsDone(2, 0, ())]
    assert not one.device.stores.held
    assert not one.device.loads.held
    one.close()
