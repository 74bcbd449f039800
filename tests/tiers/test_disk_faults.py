"""The disk tier on files that fail: either the right bytes or a miss, nothing leaked, the key can be stored again."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvkeep.config import Durability
from kvkeep.errors import TierOwned, TierUnavailable
from kvkeep.testing.doubles.faulty_files import FaultyDisk, flip_bit
from kvkeep.testing.doubles.power_cut import PowerCut
from kvkeep.testing.suites.tiers import UNTOUCHED, holds, key, memory_for, write_of
from kvkeep.tiers.disk.directio import PosixNames, posix_files
from kvkeep.tiers.disk.disk import DiskTier
from kvkeep.tiers.record import record_nbytes
from kvkeep.tiers.tier import Stored

SMALL = [write_of(key(number), (4096,)) for number in range(6)]
RECORD = record_nbytes((4096,))
OURS = key(0)[:16]


def path_of(root: Path, one: bytes) -> str:
    return f"{root}/{one[:16].hex()}/{one[16:17].hex()}/{one[16:].hex()}"


async def is_whole(tier: DiskTier, disk: FaultyDisk | None = None) -> None:
    """Nothing is leaked, and every key can be stored (again) and comes back."""
    for write in SMALL:
        there = await holds(tier, write)
        assert await tier.store([write]) == [Stored.PRESENT if there else Stored.STORED], "a key cannot be stored again"
        assert await holds(tier, write)
    figures = tier.figures()
    assert figures.records == len(SMALL)
    assert figures.used_nbytes == len(SMALL) * RECORD, "bytes are leaked"
    assert (figures.stalled, figures.degraded) == (0, "")
    root = tier.directories[0].state.record_files.root
    assert (disk or FaultyDisk()).allocated_nbytes(root) == figures.used_nbytes


# ---- bad bytes


def test_truncation_at_every_offset(run: Any, opened: Any, root: Path) -> None:
    async def test() -> None:
        async with opened(direct=False) as tier:
            for nbytes in [*range(0, RECORD, 97), *range(4090, 4102), RECORD - 1, RECORD + 1, RECORD + 4096]:
                await tier.store(SMALL[:1])
                os.truncate(path_of(root, SMALL[0].key), nbytes)
                assert not await holds(tier, SMALL[0]), f"cut at {nbytes}"
                assert not os.path.exists(path_of(root, SMALL[0].key))
            await is_whole(tier)

    run(test)


@pytest.mark.parametrize("direct", [True, False])
def test_flipped_bits(run: Any, opened: Any, root: Path, direct: bool) -> None:
    async def test() -> None:
        async with opened(direct=direct) as tier:
            for bit in range(0, RECORD * 8, 211):
                await tier.store(SMALL[:1])
                flip_bit(path_of(root, SMALL[0].key), bit)
                assert not await holds(tier, SMALL[0]), f"bit {bit}"
            assert tier.figures().corrupt == len(range(0, RECORD * 8, 211))
            await is_whole(tier)

    run(test)


def test_swapped_foreign_and_other_files(run: Any, opened: Any, root: Path) -> None:
    """Two records under each other's names, one of another namespace, a link, a directory's worth of rubbish."""

    async def test() -> None:
        async with opened() as tier:
            other = write_of(key(2, namespace=2), (4096,))
            await tier.store([*SMALL[:5], other])
            paths = [path_of(root, one.key) for one in SMALL]
            os.rename(paths[0], root / "aside")
            os.rename(paths[1], paths[0])
            os.rename(root / "aside", paths[1])
            shutil.copy(path_of(root, other.key), paths[2])
            os.unlink(paths[3])
            os.symlink(path_of(root, other.key), paths[3])
            assert [await holds(tier, one) for one in SMALL[:5]] == [False] * 4 + [True]
            assert await holds(tier, other), "the file that a link named is not ours to delete"
            await tier.delete([other.key])
            await is_whole(tier)

    run(test)


def test_deleted_under_us(run: Any, opened: Any, root: Path) -> None:
    async def test() -> None:
        async with opened() as tier:
            await tier.store(SMALL[:3])
            os.unlink(path_of(root, SMALL[0].key))
            shutil.rmtree(os.path.dirname(path_of(root, SMALL[1].key)))
            assert [await holds(tier, one) for one in SMALL[:3]] == [False, False, True]
            await is_whole(tier)

    run(test)


def test_only_a_record_that_is_not_there_is_told_to_be_gone(run: Any, opened: Any, root: Path) -> None:
    """Evicted or removed since somebody looked; not one that is bad, or that the device does not give."""

    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            await tier.store(SMALL[:5])
            gone: list[int] = []
            reads = [
                memory_for(one.key, (4096,))[0]._replace(gone=partial(gone.append, n)) for n, one in enumerate(SMALL)
            ]
            os.unlink(path_of(root, SMALL[1].key))
            await tier.delete([SMALL[2].key])
            flip_bit(path_of(root, SMALL[3].key), 40_000)
            unreadable = path_of(root, SMALL[4].key)
            disk.fault = lambda call, path: errno.EIO if call == "readv" and path == unreadable else 0
            assert await tier.load(reads) == [SMALL[0].sums, *([None] * 5)]
            assert sorted(gone) == [1, 2, 5]

    run(test)


def test_a_bad_record_that_was_replaced_meanwhile_is_kept(run: Any, opened: Any, root: Path) -> None:
    """Only the file that was read is deleted, whatever has its name now."""

    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            await tier.store(SMALL[:1])
            path = path_of(root, SMALL[0].key)
            shutil.copy(path, root / "good")
            flip_bit(path, 40_000)
            disk.fault = lambda call, _: 0 if call != "stat" or not os.path.exists(root / "good") else _swap(root, path)
            assert not await holds(tier, SMALL[0])
            assert await tier.store(SMALL[:1]) == [Stored.PRESENT]
            await is_whole(tier, disk)

    run(test)


def _swap(root: Path, path: str) -> int:
    """Runs once the bad file is open."""
    os.rename(root / "good", path)
    return 0


# ---- a device that fails

WRITING = ["create", "writev", "stat", "publish", "mkdir", "free"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("failing", WRITING)
def test_a_store_that_fails_is_dropped(run: Any, opened: Any, failing: str, code: int) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            await tier.store(SMALL[:1])
            disk.fault = lambda call, _: code if call == failing else 0
            assert await tier.store(SMALL[1:3]) == [Stored.REFUSED] * 2
            assert tier.figures().degraded
            assert tier.figures().refused == 2
            disk.fault = lambda _call, _path: 0
            assert await holds(tier, SMALL[0])
            await is_whole(tier, disk)

    run(test)


@pytest.mark.parametrize("durability", [Durability.GROUP, Durability.EVERY])
def test_a_sync_that_fails_is_no_store(run: Any, opened: Any, durability: Durability) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files, durability=durability) as tier:
            disk.fault = lambda call, path: errno.EIO if call == "sync" and "/new/" in path else 0
            assert await tier.store(SMALL[1:3]) == [Stored.REFUSED] * 2
            disk.fault = lambda _call, _path: 0
            await is_whole(tier, disk)

    run(test)


@pytest.mark.parametrize("durability", [Durability.GROUP, Durability.EVERY])
@pytest.mark.parametrize("call", ["sync", "open"])
def test_names_that_may_not_be_durable_are_no_store(run: Any, opened: Any, durability: Durability, call: str) -> None:
    """The sync of a directory fails: the records have their names by then, and go again."""

    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files, durability=durability) as tier:
            await tier.store(SMALL[:1])
            disk.fault = lambda name, path: errno.EIO if name == call and "/new/" not in path else 0
            assert await tier.store(SMALL[1:3]) == [Stored.REFUSED] * 2
            assert tier.figures().degraded
            assert tier.figures().refused == 2
            assert (
                tier.figures().used_nbytes
                == disk.allocated_nbytes(tier.directories[0].state.record_files.root)
                == RECORD
            )
            assert await tier.store(SMALL[:1]) == [Stored.PRESENT], "it was stored when the device worked"
            disk.fault = lambda _call, _path: 0
            await is_whole(tier, disk)

    run(test)


def test_a_directory_that_cannot_be_synced_costs_only_its_own_records(run: Any, opened: Any) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files, durability=Durability.GROUP) as tier:
            bad = path_of(Path(tier.directories[0].state.record_files.root), SMALL[1].key).rpartition("/")[0]
            disk.fault = lambda call, path: errno.EIO if call == "sync" and path == bad else 0
            assert await tier.store(SMALL[:3]) == [Stored.STORED, Stored.REFUSED, Stored.STORED]

    run(test)


@pytest.mark.parametrize("failing", [False, True], ids=["healthy", "directories fail"])
@pytest.mark.parametrize("durability", [Durability.GROUP, Durability.EVERY])
def test_what_is_called_stored_outlives_a_power_cut(
    run: Any, opened: Any, tmp_path: Path, durability: Durability, failing: bool
) -> None:
    async def test() -> None:
        (tmp_path / "shadow").mkdir()
        disk = FaultyDisk()
        cut = PowerCut(disk, str(tmp_path / "shadow"))
        async with opened(cut.files, durability=durability) as tier:
            if failing:
                disk.fault = lambda call, path: errno.EIO if call == "sync" and "/new/" not in path else 0
            stored = await tier.store(SMALL[:3])
            cut.cut()
        async with opened() as tier:
            there = [await holds(tier, one) for one in SMALL[:3]]
            assert there == [one is Stored.STORED for one in stored] == [not failing] * 3
            await is_whole(tier)

    run(test)


def test_hits_are_served_on_a_full_disk(run: Any, opened: Any) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            await tier.store(SMALL[:2])
            disk.fault = lambda call, _: errno.ENOSPC if call in WRITING else 0
            assert await tier.store(SMALL[2:]) == [Stored.REFUSED] * 4
            disk.fault = lambda call, _: errno.ENOSPC if call in ("create", "writev") else 0
            assert [await holds(tier, one) for one in SMALL[:2]] == [True, True]

    run(test)


@pytest.mark.parametrize("failing", ["open", "readv", "stat"])
def test_a_read_error_is_a_miss_and_the_record_stays(run: Any, opened: Any, failing: str) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            await tier.store(SMALL[:2])
            disk.fault = lambda call, _: errno.EIO if call == failing else 0
            assert not await holds(tier, SMALL[0])
            assert tier.figures().errors == 1
            disk.fault = lambda _call, _path: 0
            assert await holds(tier, SMALL[0])
            await is_whole(tier, disk)

    run(test)


def test_a_file_that_cannot_be_removed_is_counted_and_tried_again(run: Any, opened: Any) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            await tier.store(SMALL[:2])
            disk.fault = lambda call, _: errno.EIO if call == "unlink" else 0
            await tier.delete([SMALL[0].key])
            assert not await holds(tier, SMALL[0]), "it is deleted for whoever asks"
            assert tier.figures().used_nbytes == 2 * RECORD
            assert tier.figures().stalled == 1
            assert await tier.store(SMALL[:1]) == [Stored.REFUSED]
            disk.fault = lambda _call, _path: 0
            await is_whole(tier, disk)

    run(test)


def test_what_stays_behind_is_counted_until_the_next_boot(run: Any, opened: Any) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            disk.fault = lambda call, _: errno.EIO if call in ("writev", "unlink") else 0
            assert await tier.store(SMALL[:2]) == [Stored.REFUSED] * 2
            assert tier.figures().used_nbytes >= 2 * RECORD, "two temporary files are still there"
        async with opened() as tier:
            assert tier.figures().used_nbytes == 0

    run(test)


def test_an_old_order_does_not_come_back(run: Any, opened: Any, root: Path, tmp_path: Path) -> None:
    """Once something was stored, the bytes that a clean end noted are no bound any more, also not after a power cut."""

    async def test() -> None:
        async with opened() as tier:
            await tier.store(SMALL[:2])
        assert (root / "order").exists()
        (tmp_path / "shadow").mkdir()
        cut = PowerCut(FaultyDisk(), str(tmp_path / "shadow"))
        async with opened(cut.files) as tier:
            await tier.store(SMALL[2:4])
            cut.cut()
        assert not (root / "order").exists()

    run(test)


@pytest.mark.parametrize("short", [4096, 8192])
def test_short_transfers_are_made_whole(run: Any, opened: Any, short: int) -> None:
    async def test() -> None:
        disk = FaultyDisk(short=short)
        async with opened(disk.files) as tier:
            write = write_of(key(9), (4096, 5 * 4096))
            assert await tier.store([write]) == [Stored.STORED]
            assert await holds(tier, write)
        disk = FaultyDisk(short=1000)
        async with opened(disk.files, direct=False) as tier:
            assert await holds(tier, write)
            assert await tier.store(SMALL[:1]) == [Stored.STORED]
            assert await holds(tier, SMALL[0])

    run(test)


@pytest.mark.process
def test_a_small_tmpfs_runs_full(run: Any, opened: Any, root: Path) -> None:
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=0700", "none", str(root)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")

    async def test() -> None:
        async with opened(size=1 << 30) as tier:
            writes = [write_of(key(number), (16384,)) for number in range(20)]
            stored = [(await tier.store([one]))[0] for one in writes]
            assert Stored.REFUSED in stored
            assert tier.figures().degraded or tier.figures().evicted
            there = [await holds(tier, one) for one in writes]
            assert sum(there) >= 8
            await tier.clear(None)
            assert tier.figures().used_nbytes == 0
            assert await tier.store(writes[:8]) == [Stored.STORED] * 8

    try:
        run(test)
    finally:
        subprocess.run(["umount", str(root)], check=True)


def test_renames_that_replace_nothing_without_renameat2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kvkeep.tiers.disk.directio._LIBC", object())
    names = PosixNames()
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    names.publish(f"{tmp_path}/a", f"{tmp_path}/c")
    with pytest.raises(FileExistsError):
        names.publish(f"{tmp_path}/b", f"{tmp_path}/c")
    assert {one.name: one.read_text() for one in tmp_path.iterdir()} == {"b": "b", "c": "a"}


# ---- a device that hangs


def test_a_hanging_read_delays_nobody_else_and_no_end(run: Any, opened: Any) -> None:
    """Its memory is not given back before its thread has returned, however often it is cancelled."""

    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files, close_s=0.05) as tier:
            await tier.store(SMALL[:2])
            disk.hanging = frozenset({"readv"})
            read, memory = memory_for(SMALL[0].key, (4096,))
            load = asyncio.create_task(_ignored(tier, read))
            while not disk.waiting:
                await asyncio.sleep(0)
            disk.hanging = frozenset()
            assert await holds(tier, SMALL[1])
            for _ in range(3):
                load.cancel()
                await asyncio.sleep(0)
            assert not load.done(), "its memory may still be written"
            await tier.aclose()
            assert not load.done()
            with pytest.raises(TierUnavailable):
                async with opened():
                    pass
            assert (memory == UNTOUCHED).all()
            disk.wake.set()
            await asyncio.wait([load])
            assert load.cancelled()
            assert bytes(read.into) == bytes(SMALL[0].payload), "so late it was"

    run(test)


async def _ignored(tier: DiskTier, read: Any) -> None:
    await tier.load([read])


def test_a_store_that_waits_for_room_ends_when_it_is_cancelled(run: Any, opened: Any) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files, size=3 * RECORD) as tier:
            await tier.store(SMALL[:2])
            disk.hanging = frozenset({"unlink"})
            store = asyncio.create_task(tier.store(SMALL[2:3]))
            for _ in range(5):
                await asyncio.sleep(0)
            store.cancel()
            await asyncio.wait([store])
            assert store.cancelled()
            disk.wake.set()
            await tier.delete([one.key for one in SMALL])
            assert tier.figures().used_nbytes <= RECORD
            assert await tier.store(SMALL[2:3]) == [Stored.STORED]

    run(test)


@pytest.mark.parametrize("hanging", ["mkdir", "create"])
@pytest.mark.parametrize("cancelled", [False, True])
def test_a_start_on_a_device_that_hangs_is_unavailable(run: Any, opened: Any, hanging: str, cancelled: bool) -> None:
    """Also where the device comes back: the lock that is taken too late is given back then, and not at the end."""

    async def test() -> None:
        disk = FaultyDisk(hanging=frozenset({hanging}))
        if cancelled:
            opening = asyncio.create_task(opened(disk.files).__aenter__())
            while not disk.waiting:
                await asyncio.sleep(0)
            opening.cancel()
            await asyncio.wait([opening])
        else:
            with pytest.raises(TierUnavailable):
                async with opened(disk.files, open_s=0.05):
                    pass
        if hanging == "create":  # the lock is taken by then
            with pytest.raises(TierOwned):
                async with opened():
                    pass
        disk.wake.set()
        for _ in range(100_000):
            try:
                async with opened() as tier:
                    await is_whole(tier)
                return
            except TierOwned:
                await asyncio.sleep(0)
        raise AssertionError("the lock is never given back")

    run(test)


# ---- the end at any step


def steps(disk: FaultyDisk, most: int = 400) -> Iterator[int]:
    """Kill at the next call, at the one after that, and so on, until nothing was killed any more."""
    for step in range(1, most):
        yield step
        if disk.calls < disk.kill_at:
            return
    raise AssertionError("there is no end to it")


@pytest.mark.parametrize("durability", list(Durability))
def test_a_kill_at_every_step_of_a_store(run: Any, opened: Any, root: Path, durability: Durability) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        for step in steps(disk):
            shutil.rmtree(root, ignore_errors=True)
            disk = FaultyDisk()
            async with opened(disk.files, durability=durability) as tier:
                await tier.store(SMALL[:1])
                disk.kill_at = disk.calls + step
                stored = await tier.store(SMALL[1:3])
                disk.calls = max(disk.calls, disk.kill_at) if Stored.REFUSED in stored else disk.calls
                killed = disk.calls >= disk.kill_at
                disk.kill_at = min(disk.kill_at, disk.calls)
            async with opened() as tier:
                assert await holds(tier, SMALL[0])
                if not killed:
                    assert [await holds(tier, one) for one in SMALL[1:3]] == [True, True]
                await is_whole(tier)
            if not killed:
                return

    run(test)


def test_a_kill_at_every_step_of_a_start(run: Any, opened: Any, root: Path) -> None:
    async def test() -> None:
        async with opened() as tier:
            await tier.store(SMALL[:3])
        (root / "new" / "earlier").write_bytes(bytes(4096))
        for step in range(1, 60):
            disk = FaultyDisk(kill_at=step)
            try:
                async with opened(disk.files) as tier:
                    await tier.store(SMALL[3:4])
                    killed = disk.calls >= step
                    disk.kill_at = min(disk.kill_at, disk.calls)
            except TierUnavailable:
                continue
            async with opened() as tier:
                assert [await holds(tier, one) for one in SMALL[:3]] == [True] * 3
                await tier.delete([SMALL[3].key])
                assert tier.figures().used_nbytes == 3 * RECORD
            if not killed:
                return
        raise AssertionError("there is no end to it")

    run(test)


@pytest.mark.long
@pytest.mark.parametrize("power", [False, True], ids=["kill", "power-cut"])
@pytest.mark.parametrize("everything", [False, True])
def test_what_was_cleared_never_comes_back(
    run: Any, opened: Any, root: Path, tmp_path: Path, power: bool, everything: bool
) -> None:
    """Killed, or without power, at every step of a clear: once it has returned nothing is there, else all or nothing."""

    async def killed_at(step: int) -> bool:
        shutil.rmtree(root, ignore_errors=True)
        shadow = tmp_path / f"shadow-{step}"
        shadow.mkdir()
        disk = FaultyDisk()
        cut = PowerCut(disk, str(shadow))
        returned = False
        async with opened(cut.files if power else disk.files, durability=Durability.EVERY) as tier:
            await tier.store(SMALL[:3])
            disk.kill_at = disk.calls + step
            try:
                await tier.clear(None if everything else OURS)
                returned = True
            except TierUnavailable:
                pass
            assert [await holds(tier, one) for one in SMALL[:3]] == [False] * 3
            killed = disk.calls >= disk.kill_at
            if power:
                cut.cut()
            disk.kill_at = 0
        async with opened() as tier:
            there = [await holds(tier, one) for one in SMALL[:3]]
            assert there in ([True] * 3, [False] * 3), "a part of it was cleared"
            assert not (returned and any(there)), "what was cleared is back"
            await is_whole(tier)
        return killed

    async def test() -> None:
        for step in range(1, 60):
            if not await killed_at(step):
                return
        raise AssertionError("there is no end to it")

    run(test)


def test_a_clear_that_cannot_be_made_durable_says_so(run: Any, opened: Any) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            await tier.store(SMALL[:2])
            disk.fault = lambda call, _: errno.EIO if call == "sync" else 0
            with pytest.raises(TierUnavailable):
                await tier.clear(None)
            assert [await holds(tier, one) for one in SMALL[:2]] == [False] * 2, "it holds as long as this tier is open"
            disk.fault = lambda _call, _path: 0
            await is_whole(tier, disk)

    run(test)


def test_a_clear_during_a_store_and_a_load(run: Any, opened: Any) -> None:
    """Both began before it: what is written is not found after it, what is read is not given back."""

    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            await tier.store(SMALL[:1])
            disk.hanging = frozenset({"publish", "readv"})
            store = asyncio.create_task(tier.store(SMALL[1:2]))
            load = asyncio.create_task(tier.load([memory_for(SMALL[0].key, (4096,))[0]]))
            while disk.waiting < 2:
                await asyncio.sleep(0)
            await tier.clear(OURS)
            disk.wake.set()
            assert await store == [Stored.REFUSED]
            assert await load == [None]
            assert tier.figures().used_nbytes == 0
            await is_whole(tier, disk)

    run(test)


@pytest.mark.parametrize("waits_for", ["a file that could not be removed", "what files take"])
def test_a_clear_while_a_store_waits_to_begin(run: Any, opened: Any, root: Path, waits_for: str) -> None:
    """What was handed over before the clear is not kept after it, and not found by the next start either."""

    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            await tier.store(SMALL[:2])
            if waits_for == "what files take":
                os.unlink(path_of(root, SMALL[0].key))
                await tier.delete([SMALL[0].key])
                disk.hanging = frozenset({"stat"})
            else:
                disk.fault = lambda call, _: errno.EIO if call == "unlink" else 0
                await tier.delete([SMALL[0].key])
                disk.fault = lambda _call, _path: 0
                disk.hanging = frozenset({"unlink"})
            store = asyncio.create_task(tier.store(SMALL[2:3]))
            while not disk.waiting:
                await asyncio.sleep(0)
            disk.hanging = frozenset()
            await tier.clear(OURS)
            disk.wake.set()
            assert await store == [Stored.REFUSED]
            assert not await holds(tier, SMALL[2])
        async with opened() as tier:
            assert not await holds(tier, SMALL[2])
            await is_whole(tier)

    run(test)


def test_the_real_files_are_the_default() -> None:
    assert type(posix_files().names) is PosixNames


# ---- files that somebody moved about


@pytest.mark.parametrize("by", ["load", "delete"])
def test_the_limit_holds_after_files_of_different_sizes_changed_places(
    run: Any, opened: Any, root: Path, by: str
) -> None:
    """A small file in a large one's place: when it goes, the large one is still somewhere and still counts."""

    async def test() -> None:
        large, small, more = (write_of(key(n), (4096,) * ranges) for n, ranges in ((1, 8), (2, 1), (3, 8)))
        limit_nbytes = record_nbytes(large.sizes) + record_nbytes(small.sizes) + 4 * 4096
        disk = FaultyDisk()
        async with opened(disk.files, size=limit_nbytes) as tier:
            assert await tier.store([large, small]) == [Stored.STORED] * 2
            paths = [next(root.glob(f"*/*/{one.key[16:].hex()}")) for one in (large, small)]
            paths[0].rename(root / "aside")
            paths[1].rename(paths[0])
            (root / "aside").rename(paths[1])
            if by == "load":
                assert not await holds(tier, large)
            else:
                await tier.delete([large.key])
            await tier.store([more])
            assert disk.allocated_nbytes(str(root)) <= limit_nbytes
            assert not await holds(tier, small)
            await tier.store([])
            assert tier.figures().used_nbytes == disk.allocated_nbytes(str(root))

    run(test)


def test_what_is_written_again_while_it_is_found_counts_once_and_at_once(run: Any, opened: Any, root: Path) -> None:
    """After a restart, before all is known: the file of an earlier boot and the one that is being written both count."""

    async def test() -> None:
        writes = [write_of(key(n), (4096,) * 4) for n in range(4)]
        limit_nbytes = 5 * record_nbytes(writes[0].sizes) - 4096
        async with opened(size=limit_nbytes) as tier:
            assert await tier.store(writes) == [Stored.STORED] * 4
        most = 0

        def look() -> None:
            nonlocal most
            most = max(most, disk.allocated_nbytes(str(root)))

        disk = FaultyDisk(after=look)
        async with opened(disk.files, at_once=True, size=limit_nbytes) as tier:
            for one in writes:
                await tier.store([one])
            await tier.wait_for_scan()
            assert most <= limit_nbytes
            assert tier.figures().used_nbytes == disk.allocated_nbytes(str(root))

    run(test)
