"""The disk tier on healthy files: limits, restarts, order, owners, what the directory looks like."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from kvkeep.config import Config, Disk, Durability
from kvkeep.core.policies.queue import lru
from kvkeep.errors import TierBusy, TierOwned, TierUnavailable
from kvkeep.testing.doubles.faulty_files import FaultyDisk
from kvkeep.testing.suites.tiers import holds, key, memory_for, write_of
from kvkeep.tiers.disk.disk import DiskTier, open_disk
from kvkeep.tiers.record import record_nbytes
from kvkeep.tiers.tier import Stored

WRITES = [write_of(key(number)) for number in range(12)]
RECORD = record_nbytes(WRITES[0].sizes)
ROOM_FOR_4 = 4 * (RECORD + 4096)  # a block more is counted while one is written


def path_of(root: Path, one: bytes) -> Path:
    return root / one[:16].hex() / one[16:17].hex() / one[16:].hex()


async def kept(tier: DiskTier) -> list[int]:
    """Which of WRITES are given back."""
    return [number for number, write in enumerate(WRITES) if await holds(tier, write)]


def test_paths_are_hex_and_nobody_else_may_look(run: Any, opened: Any, root: Path) -> None:
    async def test() -> None:
        async with opened() as tier:
            await tier.store(WRITES[:1])
            file = path_of(root, WRITES[0].key)
            assert file.stat().st_size == RECORD
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            for directory in (root, root / "new", file.parent, file.parent.parent):
                assert stat.S_IMODE(directory.stat().st_mode) == 0o700
            assert list((root / "new").iterdir()) == []

    run(test)


def test_it_survives_a_restart_with_its_order(run: Any, opened: Any) -> None:
    async def test() -> None:
        async with opened(size=ROOM_FOR_4) as tier:
            await tier.store(WRITES[:4])
            for number in (2, 0):
                assert await holds(tier, WRITES[number])
        async with opened(size=ROOM_FOR_4) as tier:
            assert tier.figures().used_nbytes == 4 * RECORD
            assert await tier.store(WRITES[4:6]) == [Stored.STORED] * 2
            assert tier.figures().evicted == 2
            assert await kept(tier) == [0, 2, 4, 5], "the least recently used of the last run go first"

    run(test)


def test_it_survives_a_kill_newest_first(run: Any, opened: Any, root: Path) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            await tier.store(WRITES[:4])
            disk.kill_at = 0
        for number, written_s in enumerate((40, 10, 30, 20)):
            os.utime(path_of(root, WRITES[number].key), (written_s, written_s))
        async with opened(size=ROOM_FOR_4) as tier:
            await tier.store(WRITES[4:6])
            assert await kept(tier) == [0, 2, 4, 5]

    run(test)


def test_it_serves_at_once_after_a_restart(run: Any, opened: Any) -> None:
    """The look through hangs; what is there is found, what is not is not, and nothing goes over the bound."""

    async def test() -> None:
        async with opened(size=ROOM_FOR_4) as tier:
            await tier.store(WRITES[:3])
        disk = FaultyDisk()
        async with opened(disk.files, at_once=True, size=ROOM_FOR_4) as tier:
            disk.hanging = frozenset({"scan"})
            assert await tier.contains([WRITES[0].key, WRITES[9].key]) == [True, False]
            assert await kept(tier) == [0, 1, 2]
            assert tier.figures().scan_s < 0
            assert await tier.store([WRITES[3]]) == [Stored.STORED], "a clean end says how much is in use"
            assert await tier.store([WRITES[4]]) == [Stored.REFUSED], "nobody knows yet what could be evicted"
            await tier.delete([WRITES[1].key])
            assert await tier.contains([WRITES[1].key]) == [False]
            disk.wake.set()
            await tier.wait_for_scan()
            assert await kept(tier) == [0, 2, 3]
            assert tier.figures().used_nbytes == 3 * RECORD

    run(test)


def test_after_a_kill_nothing_is_stored_before_it_was_looked_through(run: Any, opened: Any) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files, size=ROOM_FOR_4) as tier:
            await tier.store(WRITES[:2])
            disk.kill_at = 0
        disk = FaultyDisk()
        async with opened(disk.files, at_once=True, size=ROOM_FOR_4) as tier:
            disk.hanging = frozenset({"scan"})
            assert await tier.store([WRITES[3]]) == [Stored.REFUSED]
            assert await kept(tier) == [0, 1]
            disk.wake.set()
            await tier.wait_for_scan()
            assert await tier.store([WRITES[3]]) == [Stored.STORED]

    run(test)


def test_a_clear_while_it_is_looked_through(run: Any, opened: Any) -> None:
    async def test() -> None:
        async with opened() as tier:
            await tier.store([*WRITES[:3], write_of(key(1, namespace=2))])
        disk = FaultyDisk()
        async with opened(disk.files, at_once=True) as tier:
            disk.hanging = frozenset({"scan"})
            await tier.clear(key(0)[:16])
            assert await tier.contains([WRITES[0].key]) == [False]
            assert await tier.store(WRITES[1:2]) == [Stored.STORED], "an old record makes way for a new one"
            disk.wake.set()
            await tier.wait_for_scan()
            assert await kept(tier) == [1]
            assert await holds(tier, write_of(key(1, namespace=2)))
            assert tier.figures().used_nbytes == 2 * RECORD

    run(test)


@pytest.mark.parametrize("limit_nbytes", [RECORD - 1, 2 * RECORD + 4096, ROOM_FOR_4])
@pytest.mark.parametrize("restarts", ["clean", "killed"])
def test_the_limit_holds_at_every_moment(run: Any, opened: Any, root: Path, limit_nbytes: int, restarts: str) -> None:
    """Counted from outside after every call to the file system, through evictions, deletes, readers, restarts."""
    most = 0

    async def rounds(disk: FaultyDisk, number: int) -> None:
        def look() -> None:
            nonlocal most
            most = max(most, disk.allocated_nbytes(str(root)))

        async with opened(disk.files, size=limit_nbytes) as tier:
            disk.after = look
            for first in (number, number + 4, number + 2):
                reads = [memory_for(one.key)[0] for one in WRITES]
                await asyncio.gather(
                    tier.store(WRITES[first : first + 4]),
                    tier.load(reads),
                    tier.delete([WRITES[first + 1].key]),
                    tier.store(WRITES[first + 2 : first + 6]),
                )
                assert disk.allocated_nbytes(str(root)) == tier.figures().used_nbytes
            if restarts == "killed":
                disk.kill_at = 0

    async def test() -> None:
        for number in range(3):
            await rounds(FaultyDisk(), number)
        assert most <= limit_nbytes
        assert most >= min(limit_nbytes // RECORD * RECORD - 4096, 4 * RECORD) or limit_nbytes < RECORD

    run(test)


def test_a_lower_limit_is_kept_from_the_start(run: Any, opened: Any) -> None:
    async def test() -> None:
        async with opened() as tier:
            await tier.store(WRITES)
        async with opened(size=ROOM_FOR_4) as tier:
            assert tier.figures().used_nbytes <= ROOM_FOR_4
            assert await kept(tier) == [8, 9, 10, 11]

    run(test)


def test_an_unlinked_file_counts_until_it_is_closed(run: Any, opened: Any) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files, size=2 * RECORD + 4096) as tier:
            await tier.store(WRITES[:1])
            disk.hanging = frozenset({"readv"})
            load = asyncio.create_task(holds(tier, WRITES[0]))
            while not disk.waiting:
                await asyncio.sleep(0)
            await tier.delete([WRITES[0].key])
            assert tier.figures().used_nbytes == RECORD, "the file is still open"
            assert await tier.store(WRITES[1:3]) == [Stored.STORED, Stored.REFUSED]
            disk.wake.set()
            assert await load
            assert tier.figures().used_nbytes == RECORD
            assert await tier.store(WRITES[2:3]) == [Stored.STORED]

    run(test)


def test_a_record_that_is_read_is_not_evicted(run: Any, opened: Any) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files, size=2 * RECORD + 4096) as tier:
            await tier.store(WRITES[:2])
            disk.hanging = frozenset({"readv"})
            load = asyncio.create_task(holds(tier, WRITES[0]))
            while not disk.waiting:
                await asyncio.sleep(0)
            assert await tier.store(WRITES[2:3]) == [Stored.STORED]
            disk.wake.set()
            assert await load
            assert await kept(tier) == [0, 2]

    run(test)


def test_other_programs_leave_less_room(run: Any, opened: Any, root: Path) -> None:
    """`min_free_nbytes` stay free: older records make way, and what still does not fit is refused."""

    async def test() -> None:
        disk = FaultyDisk()
        device = 10 * RECORD
        others = 0

        def free() -> int:
            return device - others - disk.allocated_nbytes(str(root))

        disk.free = free
        async with opened(disk.files, size=8 * RECORD, min_free=2 * RECORD) as tier:
            assert await tier.store(WRITES[:6]) == [Stored.STORED] * 6
            others = 3 * RECORD
            await tier.store(WRITES[6:8])
            await tier.store(WRITES[8:9])
            assert free() >= 2 * RECORD
            assert (await kept(tier))[-1] == 8
            others = 9 * RECORD
            await tier.store(WRITES[9:10])
            assert await tier.store(WRITES[10:11]) == [Stored.REFUSED]
            others = 0
            assert await tier.store(WRITES[10:11]) == [Stored.STORED]

    run(test)


def test_a_second_owner_is_told_so(run: Any, opened: Any) -> None:
    async def test() -> None:
        async with opened() as tier:
            await tier.store(WRITES[:1])
            with pytest.raises(TierOwned):
                async with opened():
                    pass
            assert await kept(tier) == [0]
        async with opened() as tier:
            assert await kept(tier) == [0]

    run(test)


def test_one_owned_directory_of_several_gives_the_others_back(run: Any, tmp_path: Path) -> None:
    async def test() -> None:
        def options(*names: str) -> Disk:
            return Disk(path=tuple(str(tmp_path / name) for name in names), size=1 << 20)

        tier = await open_disk(options("b"))
        with pytest.raises(TierOwned):
            await open_disk(options("a", "b"))
        await (await open_disk(options("a"))).aclose()
        await tier.aclose()

    run(test)


def test_a_place_that_is_no_directory_is_unavailable(run: Any, tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(TierUnavailable):
            await open_disk(Disk(path=(str(tmp_path / "file"),), size=1 << 20))

    run(test)


def test_temporary_files_of_an_earlier_boot_are_removed(run: Any, opened: Any, root: Path) -> None:
    async def test() -> None:
        async with opened():
            pass
        (root / "new" / "abc-1").write_bytes(bytes(4096))
        async with opened() as tier:
            assert list((root / "new").iterdir()) == []
            assert tier.figures().used_nbytes == 0

    run(test)


@pytest.mark.parametrize("content", [b"", b"{}", None])
def test_lost_epochs_are_no_hits(run: Any, opened: Any, root: Path, content: bytes | None) -> None:
    """Nobody knows what had been cleared: everything that is there is old, and makes way."""

    async def test() -> None:
        async with opened() as tier:
            await tier.store(WRITES[:3])
        file = root / "epochs"
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        async with opened() as tier:
            assert await kept(tier) == []
            assert tier.figures().used_nbytes == 0
            assert await tier.store(WRITES[:3]) == [Stored.STORED] * 3
        async with opened() as tier:
            assert await kept(tier) == [0, 1, 2]

    run(test)


def test_deleted_while_it_is_written(run: Any, opened: Any) -> None:
    async def test() -> None:
        disk = FaultyDisk(hanging=frozenset({"publish"}))
        async with opened(disk.files) as tier:
            store = asyncio.create_task(tier.store(WRITES[:1]))
            await asyncio.sleep(0)
            await tier.delete([WRITES[0].key])
            disk.wake.set()
            assert await store == [Stored.REFUSED]
            assert await kept(tier) == []
            assert tier.figures().used_nbytes == 0
            assert await tier.store(WRITES[:1]) == [Stored.STORED]

    run(test)


@pytest.mark.parametrize(("durability", "syncs"), [("none", 0), ("group", 4 + 12), ("every", 4 * 4)])
def test_what_is_synced(run: Any, opened: Any, durability: str, syncs: int) -> None:
    """Each file and the directories above it: once a batch, or once a record."""

    async def test() -> None:
        synced: list[str] = []

        def note(call: str, path: str) -> int:
            if call == "sync" and "epochs" not in path and not path.endswith("-state"):
                synced.append(path)
            return 0

        disk = FaultyDisk(fault=note)
        async with opened(disk.files, durability=Durability(durability)) as tier:
            synced.clear()
            await tier.store(WRITES[:4])
            assert len({path for path in synced if "/new/" in path}) == (4 if syncs else 0)
            assert len(synced) <= syncs
            assert bool(synced) == bool(syncs)

    run(test)


def test_too_much_waiting_is_shed(run: Any, opened: Any) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files, queue_jobs=2, threads=2, read_batch=1) as tier:
            await asyncio.gather(*(tier.store([one]) for one in WRITES[:2]))
            disk.hanging = frozenset({"open"})
            loads = asyncio.gather(*(holds(tier, WRITES[0]) for _ in range(9)))
            for _ in range(20):
                await asyncio.sleep(0)
            disk.wake.set()
            there = await loads
            assert 2 <= sum(there) <= 4
            assert tier.figures().shed == 9 - sum(there)

    run(test)


def test_a_clear_before_which_too_much_waits_says_so(run: Any, opened: Any) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files, queue_jobs=1, threads=2) as tier:
            await tier.store(WRITES[:4])
            disk.hanging = frozenset({"unlink"})
            deletes = []
            for taken, write in enumerate(WRITES[:4], 1):
                deletes.append(asyncio.ensure_future(tier.delete([write.key])))
                while disk.waiting < min(taken, 2):  # a thread takes it, while there is one
                    await asyncio.sleep(0)
            with pytest.raises(TierBusy):
                await tier.clear(None)
            disk.hanging = frozenset()
            disk.wake.set()
            await asyncio.gather(*deletes)

    run(test)


def test_the_figures(run: Any, opened: Any) -> None:
    async def test() -> None:
        async with opened() as tier:
            await tier.store([*WRITES[:3], WRITES[0]])
            await kept(tier)
            found = tier.figures()
            assert (found.records, found.used_nbytes, found.limit_nbytes) == (3, 3 * RECORD, 1 << 20)
            assert (found.hits, found.misses, found.stored, found.corrupt) == (3, 9, 3, 0)
            assert (found.degraded, found.errors, found.stalled) == ("", 0, 0)
            assert found.scan_s >= 0

    run(test)


def test_its_policy_learns_which_lookups_found_nothing(run: Any, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    missed: list[bytes] = []

    class Noted:
        def __init__(self) -> None:
            self.insert, self.evict = (queue := lru()).insert, queue.evict
            self.touch, self.remove, self.set_hidden = queue.touch, queue.remove, queue.set_hidden
            self.missed = missed.append

    monkeypatch.setattr("kvkeep.tiers.disk.directory.policy_by_name", lambda _: Noted())

    async def test() -> None:
        async with opened() as tier:
            await tier.store(WRITES[:2])
            assert await tier.contains([write.key for write in WRITES[:4]]) == [True, True, False, False]
            assert await tier.contains([WRITES[0].key]) == [True]
            assert missed == [WRITES[2].key], "the key at which a lookup ends, once"

    run(test)


@pytest.mark.parametrize(("policy", "evicted"), [("lru", 1), ("fifo", 0), ("mru", 0), ("lfu", 1)])
def test_the_policy_of_the_settings_says_which_record_goes_also_after_a_restart(
    run: Any, root: Path, policy: str, evicted: int
) -> None:
    """Three records fill the directory; the first has been used since: who makes way for a fourth?"""

    async def test() -> None:
        config = Config(disk_path=str(root), disk_size=4 * RECORD - 4096, disk_min_free=0, disk_policy=policy)
        [disk] = config.tiers
        tier = await open_disk(disk)
        await tier.wait_for_scan()
        assert await tier.store(WRITES[:3]) == [Stored.STORED] * 3
        assert await holds(tier, WRITES[0])
        await tier.aclose()
        tier = await open_disk(disk)
        await tier.wait_for_scan()
        assert await tier.store(WRITES[3:4]) == [Stored.STORED]
        assert [number for number in range(4) if not await holds(tier, WRITES[number])] == [evicted]
        assert tier.figures().evicted == 1
        await tier.aclose()

    run(test)
