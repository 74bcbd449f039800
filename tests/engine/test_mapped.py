"""Pools in a process that uses them: taken as they come, let go when their store ends, never by an engine's thread."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvkeep.config import Config
from kvkeep.core.layout import GroupLayout, LayerLayout, ShardLayout
from kvkeep.engine.link import FIRST_PAUSE_S, Link, PrivateSource
from kvkeep.engine.pool import LATE_S, MappedPool
from kvkeep.errors import StoreGone
from kvkeep.memory.limits import Limit, MemoryLimits, check_room
from kvkeep.memory.page_lock import PinCalls
from kvkeep.memory.region import Region
from kvkeep.testing.doubles.device import LOCKS
from kvkeep.testing.doubles.transfers import ManualClock
from kvkeep.wire.messages import Hello
from kvkeep.wire.pool_socket import MAX_WAITING, HandedPool, PoolDoor, send_pool

SHARD = ShardLayout(1, (GroupLayout(1, 0, (LayerLayout("l", (mmap.PAGESIZE,)),)),))
POOL_NBYTES = 16 * mmap.PAGESIZE
LIMIT_S = 20.0
BOOTS = [bytes([n]) * 16 for n in range(12)]


def until(right: Callable[[], bool]) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not right():
        assert time.monotonic() < end_s, "it does not come"


def held(inodes: Iterable[int]) -> int:
    """How often this process has these pools: mappings and descriptors."""
    wanted = {str(inode) for inode in inodes}
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "kvkeep-pool" in line]
    found = sum(line[4] in wanted for line in lines)
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing
            path = f"/proc/self/fd/{name}"
            found += "kvkeep-pool" in os.readlink(path) and str(os.stat(path).st_ino) in wanted
    return found


@dataclass
class Stores:
    """One start of a store after the other, as a worker meets them; this process keeps nothing of their pools."""

    door: PoolDoor = field(default_factory=PoolDoor)
    lives: list[int] = field(default_factory=list)
    inodes: list[int] = field(default_factory=list)

    @property
    def held(self) -> int:
        """How often this process has any of their pools."""
        return held(self.inodes)

    def start(self, boot: bytes) -> None:
        region = Region.create(POOL_NBYTES)
        self.inodes.append(os.fstat(region.fd).st_ino)
        life, ours = os.pipe()
        self.lives.append(ours)
        try:
            send_pool(self.door.path, HandedPool(boot, region.fd, life), 1.0)
        finally:
            region.close()
            os.close(life)

    def end(self) -> None:
        """All that were started have ended."""
        for fd in self.lives:
            os.close(fd)
        self.lives.clear()


@pytest.fixture
def stores() -> Iterator[Stores]:
    made = Stores()
    yield made
    made.end()
    made.door.close()


@pytest.fixture(params=[None, LOCKS], ids=["plain", "locked"])
def pins(request: pytest.FixtureRequest) -> PinCalls | None:
    calls: PinCalls | None = request.param
    return calls


def close_notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that unmap regions, as they do it."""
    names: list[str] = []
    close = Region.close

    def noting(region: Region) -> None:
        if region.fd >= 0:
            names.append(threading.current_thread().name)
        close(region)

    monkeypatch.setattr(Region, "close", noting)
    return names


# ---- what is at the door -----------------------------------------------------------------------------------------


@pytest.mark.long
def test_pools_are_taken_as_they_come_though_no_step_runs(stores: Stores) -> None:
    mapped = MappedPool(stores.door)
    for boot in BOOTS:
        stores.start(boot)
        until(lambda boot=boot: mapped.has(boot))  # type: ignore[misc]
    until(lambda: stores.held == 3)  # the newest: its mapping, its descriptor, and the mapping's own
    mapped.close()
    assert stores.held == 0


def test_a_pool_that_came_a_moment_before_its_plan_is_there(stores: Stores) -> None:
    mapped = MappedPool(stores.door)
    for boot in BOOTS:
        stores.start(boot)
        lease = mapped.lease(boot, 0, SHARD)
        assert lease is not None
        lease.close()
    mapped.close()
    until(lambda: stores.held == 0)


def test_a_plan_that_names_the_pool_of_before_gets_it_a_moment_longer(stores: Stores) -> None:
    clock = ManualClock()
    mapped = MappedPool(stores.door, clock=clock)
    stores.start(BOOTS[0])
    until(lambda: mapped.has(BOOTS[0]))
    stores.start(BOOTS[1])
    until(lambda: mapped.has(BOOTS[1]))
    for _ in range(3):  # each use is a reason to wait again
        clock.advance(LATE_S - 0.1)
        lease = mapped.lease(BOOTS[0], 0, SHARD)
        assert lease is not None, "it was promised while its store was there"
        lease.close()
    clock.advance(LATE_S + 0.1)
    os.eventfd_write(mapped._wake, 1)
    until(lambda: held(stores.inodes[:1]) == 0)
    assert mapped.lease(BOOTS[0], 0, SHARD) is None
    mapped.close()


def test_once_a_plan_names_the_new_pool_the_one_of_before_goes(stores: Stores) -> None:
    mapped = MappedPool(stores.door, clock=ManualClock())
    for boot in BOOTS[:2]:
        stores.start(boot)
        until(lambda boot=boot: mapped.has(boot))  # type: ignore[misc]
    lease = mapped.lease(BOOTS[1], 0, SHARD)
    assert lease is not None
    assert mapped.lease(BOOTS[0], 0, SHARD) is None
    until(lambda: held(stores.inodes[:1]) == 0)
    lease.close()
    mapped.close()


def test_a_worker_that_is_stopped_keeps_few_pools_and_takes_others_when_it_goes_on(stores: Stores) -> None:
    for boot in BOOTS[: MAX_WAITING + 1]:  # each of them keeps a pool in memory
        stores.start(boot)
    with pytest.raises(StoreGone, match="has not taken the last pool"):
        stores.start(BOOTS[-1])
    mapped = MappedPool(stores.door)
    until(lambda: mapped.has(BOOTS[MAX_WAITING]))
    stores.start(BOOTS[-1])
    until(lambda: mapped.has(BOOTS[-1]))
    mapped.close()
    assert stores.held == 0


# ---- when their store has ended ------------------------------------------------------------------------------------


def test_the_pool_of_a_store_that_has_ended_goes_though_no_step_runs(stores: Stores, pins: PinCalls | None) -> None:
    mapped = MappedPool(stores.door, pins, late_s=0.0)
    stores.start(BOOTS[0])
    until(lambda: mapped.has(BOOTS[0]))
    stores.end()
    until(lambda: stores.held == 0)
    assert mapped.lease(BOOTS[0], 0, SHARD) is None
    stores.start(BOOTS[1])
    until(lambda: mapped.has(BOOTS[1]))
    mapped.close()


def test_a_lease_on_it_is_good_until_it_ends(stores: Stores, pins: PinCalls | None) -> None:
    mapped = MappedPool(stores.door, pins, late_s=0.0)
    stores.start(BOOTS[0])
    lease = mapped.lease(BOOTS[0], 0, SHARD)
    assert lease is not None
    stores.end()
    until(lambda: not mapped.has(BOOTS[0]))
    lease.views()[0][:] = 7
    assert stores.held > 0
    lease.close()
    until(lambda: stores.held == 0)
    mapped.close()


def test_plans_that_were_made_before_the_end_was_known_still_find_it(stores: Stores) -> None:
    clock = ManualClock()
    mapped = MappedPool(stores.door, clock=clock)
    stores.start(BOOTS[0])
    until(lambda: mapped.has(BOOTS[0]))
    stores.end()
    until(lambda: mapped._left_s() == LATE_S)
    clock.advance(LATE_S - 0.5)
    lease = mapped.lease(BOOTS[0], 0, SHARD)
    assert lease is not None
    lease.close()
    assert mapped._left_s() == LATE_S, "it is asked for: some plans are late"
    clock.advance(LATE_S)
    mapped._wake_up()  # its thread's own wait is by real time
    until(lambda: not mapped.has(BOOTS[0]))
    mapped.close()


def test_the_same_pool_again_is_the_one_that_is_mapped(stores: Stores) -> None:
    """A session that was resumed: its store has never ended."""
    mapped = MappedPool()
    region = Region.create(POOL_NBYTES)
    life, ours = os.pipe()
    for _ in range(2):
        mapped.put(HandedPool(BOOTS[0], os.dup(region.fd), os.dup(life)), POOL_NBYTES)
    os.close(life)
    region.close()
    inode = os.fstat(region_fd(mapped)).st_ino
    until(lambda: held([inode]) == 3)
    assert mapped.has(BOOTS[0])
    os.close(ours)
    mapped.close()


# ---- who unmaps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leases", [0, 1])
def test_an_engine_s_thread_never_unmaps(
    stores: Stores, pins: PinCalls | None, leases: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = MappedPool(stores.door, pins, late_s=0.0)
    stores.start(BOOTS[0])
    until(lambda: mapped.has(BOOTS[0]))
    second = pool_of(BOOTS[1])
    names = close_notes(monkeypatch)
    lent = [mapped.lease(BOOTS[0], 0, SHARD) for _ in range(leases)]
    mapped.put(second, POOL_NBYTES)  # in the place of the first
    for lease in lent:
        assert lease is not None
        assert not names, "unmapped under a lease"
        lease.close()
    until(lambda: len(names) == 1)
    lent = [mapped.lease(BOOTS[1], 0, SHARD) for _ in range(leases)]
    mapped.close()
    for lease in lent:
        assert lease is not None
        lease.close()
    until(lambda: len(names) == 2 and stores.held == 0)
    assert names == ["kvkeep-pool", "kvkeep-pool"]


def region_fd(mapped: MappedPool) -> int:
    assert mapped._pool is not None
    return mapped._pool._region.fd


def pool_of(boot: bytes) -> HandedPool:
    """A pool that nobody else has, of a store that never ends."""
    with Region.create(POOL_NBYTES) as region:
        return HandedPool(boot, os.dup(region.fd), os.open("/dev/null", os.O_RDONLY))


# ---- the next store --------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_store_whose_pool_does_not_fit_beside_a_dead_one_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes; the machine has room for one pool and a half, and what this process still has counts."""

    inodes: list[int] = []

    def checked(nbytes: int) -> None:
        in_use = POOL_NBYTES if held(inodes) else 0
        check_room(nbytes, MemoryLimits((Limit("/proc/meminfo", POOL_NBYTES * 3 // 2, in_use),)), beside_nbytes=0)

    monkeypatch.setattr("kvkeep.store.process.check_room", checked)
    clock, door = ManualClock(), PoolDoor()
    mapped = MappedPool(door, late_s=0.0)
    source = PrivateSource(Config(pool_size=POOL_NBYTES, log_level="error"))

    def hello(resumes: int) -> Hello:
        return Hello(
            name="t",
            namespace=b"n" * 16,
            identity="",
            chunk_nbytes=mmap.PAGESIZE,
            holders=[os.getpid()],
            verify_every=0,
            resumes=resumes,
        )

    link = Link(source, hello, [door.path], clock)
    link.start(LIMIT_S)
    client = link.client
    assert client is not None
    until(lambda: mapped.has(client.welcome.boot))
    inodes.append(os.fstat(region_fd(mapped)).st_ino)
    assert source._child is not None
    source._child.process.kill()
    source._child.process.wait(LIMIT_S)
    until(lambda: not held(inodes))
    client.pump()
    assert link.live(idle=True) is None
    clock.advance(FIRST_PAUSE_S)
    until(lambda: link.live(idle=True) is not None)
    again = link.client
    assert again is not None
    until(lambda: mapped.has(again.welcome.boot))
    mapped.close()
    link.close()
