from __future__ import annotations

import logging
import mmap
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.core.layout import GroupLayout, LayerLayout, ShardLayout
from kvkeep.memory.page_lock import PageLock, PinCalls
from kvkeep.memory.pool import Pool
from kvkeep.memory.region import Region

BASE = 1 << 20
SHARD = ShardLayout(1, (GroupLayout(1, 0, (LayerLayout("l", (mmap.PAGESIZE,)),)),))


class Device:
    """Locks memory as CUDA does: no range twice, and only whole ranges are unlocked."""

    def __init__(self, limit: int = 1 << 40) -> None:
        self.locked: dict[int, int] = {}
        self.limit = limit
        self.calls = PinCalls(self.lock, self.unlock)

    def lock(self, address: int, nbytes: int) -> str:
        if sum(self.locked.values()) + nbytes > self.limit:
            return "out of memory"
        overlap = [at for at, size in self.locked.items() if at < address + nbytes and address < at + size]
        assert not overlap, "already registered"
        self.locked[address] = nbytes
        return ""

    def unlock(self, address: int) -> str:
        return "" if self.locked.pop(address, None) else "not registered"


@given(st.integers(1, 1000), st.integers(1, 300), st.lists(st.integers(0, 1000)))
def test_what_is_populated_is_locked_in_whole_pieces_and_nothing_else(nbytes: int, piece: int, steps: list[int]):
    device = Device()
    pin = PageLock(BASE, nbytes, device.calls, piece)
    for populated in [*sorted(min(step, nbytes) for step in steps), nbytes]:
        pin.grow(populated)
        assert sum(device.locked.values()) == pin.pinned_nbytes <= populated
        assert populated - pin.pinned_nbytes < piece
    assert pin.pinned_nbytes == nbytes
    assert max(device.locked.values()) <= piece
    pin.release()
    assert not device.locked
    assert pin.pinned_nbytes == 0


@given(st.integers(1, 500), st.integers(1, 100), st.integers(0, 500), st.integers(0, 400), st.integers(1, 100))
def test_pieces_are_those_that_the_device_was_given(nbytes: int, piece: int, grown: int, offset: int, length: int):
    device = Device()
    pin = PageLock(BASE, nbytes, device.calls, piece)
    pin.grow(min(grown, nbytes))
    bytes_locked = [at - BASE + i for at, size in device.locked.items() for i in range(size)]
    wanted = range(offset, offset + length)
    if set(wanted) <= set(bytes_locked):
        starts = {at - BASE for at in device.locked}
        assert pin.pieces(offset, length) == (0, *(at - offset for at in wanted[1:] if at in starts))
    else:
        assert pin.pieces(offset, length) == ()


def test_a_refusal_is_told_once_with_what_it_costs(caplog: pytest.LogCaptureFixture):
    device = Device(limit=2 << 20)
    pin = PageLock(BASE, 5 << 20, device.calls, 1 << 20)
    for populated in range(1 << 20, 6 << 20, 1 << 20):
        pin.grow(populated)
    assert pin.pinned_nbytes == 2 << 20
    assert pin.refusal == "out of memory"
    assert pin.pieces(0, 2 << 20) == (0, 1 << 20)
    assert pin.pieces(1 << 20, (1 << 20) + 1) == ()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "2 of 5 MiB of the pool are page-locked (out of memory): each copy of the rest" in record.message
    pin.release()
    assert not device.locked


def test_the_log_says_now_and_then_how_far_it_has_come(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "kvkeep")
    pin = PageLock(BASE, 40 << 30, Device().calls, 4 << 30)
    for populated in range(0, 44 << 30, 4 << 30):
        pin.grow(populated)
    told = [record.message.split(" MiB")[0].removeprefix("kvkeep: ") for record in caplog.records]
    assert told == ["16384 of 40960", "32768 of 40960", "40960 of 40960"]
    assert [record.message.endswith("so far") for record in caplog.records] == [True, True, False]


def test_nothing_is_locked_after_the_end(caplog: pytest.LogCaptureFixture):
    device = Device()
    pin = PageLock(BASE, 10, device.calls, 5)
    pin.grow(5)
    device.locked.clear()
    pin.release()
    assert "not registered" in caplog.text
    pin.release()
    pin.grow(10)
    assert not device.locked


def pool_with(device: Device | None, until: Callable[[Pool], bool]) -> Pool:
    pool = Pool(b"boot", Region.create(64 * mmap.PAGESIZE), device.calls if device is not None else None)
    pool.populated.wait(10.0)
    assert until(pool)
    return pool


def test_a_pool_locks_its_own_mapping_and_unlocks_it_before_it_goes():
    device = Device()
    pool = pool_with(device, lambda pool: pool.page_lock is not None and pool.page_lock.pinned_nbytes == pool.nbytes)
    with pool.lend(3 * mmap.PAGESIZE, SHARD) as lease:
        assert lease.pieces == (0,)
        (address, nbytes) = next(iter(device.locked.items()))
        assert lease.views()[0].ctypes.data == address + 3 * mmap.PAGESIZE
        assert nbytes == pool.nbytes
    pool.close()
    assert pool.wait(10.0)
    assert not device.locked


@pytest.mark.parametrize("device", [None, Device(limit=0)])
def test_a_pool_that_cannot_be_locked_lends_as_any_other(device: Device | None):
    pool = pool_with(device, lambda pool: pool.page_lock is None or pool.page_lock.refusal == "out of memory")
    with pool.lend(0, SHARD) as lease:
        assert lease.pieces == ()
        lease.views()[0][:] = 1
    pool.close()


@pytest.mark.parametrize("lease_first", [True, False])
def test_memory_stays_locked_while_a_copy_may_be_under_way_in_it(lease_first: bool):
    device = Device()
    pool = pool_with(device, lambda pool: pool.page_lock is not None and pool.page_lock.pinned_nbytes == pool.nbytes)
    first, second = pool.lease(0, SHARD), pool.lease(mmap.PAGESIZE, SHARD)
    first.close()
    first.close()
    assert device.locked
    if lease_first:
        second.close()
        assert device.locked, "the pool is still open"
        pool.close()
    else:
        pool.close()
        assert not pool.wait(10.0)
        assert device.locked, "a lease is still open"
        second.views()[0][:] = 1
        second.close()
    assert pool.wait(10.0)
    assert not device.locked
