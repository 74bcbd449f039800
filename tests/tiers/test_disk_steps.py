"""The disk tier killed at every step by the kernel's own kill -9, and clears among writes and reads that are under way."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvkeep.config import Durability
from kvkeep.errors import TierUnavailable
from kvkeep.testing.doubles.faulty_files import FaultyDisk, record_paths
from kvkeep.testing.doubles.power_cut import PowerCut
from kvkeep.testing.suites.tiers import holds, key, memory_for, write_of
from kvkeep.tiers.disk.disk import DiskTier
from kvkeep.tiers.record import record_nbytes
from kvkeep.tiers.tier import Stored

SIZES = (4096, 8192)
CHUNKS = [write_of(key(number), SIZES) for number in range(4)]
RECORD = record_nbytes(SIZES)
NAMESPACE = key(0)[:16]

EVERY_FEW = [5, pytest.param(1, marks=pytest.mark.slow)]

# Forks a child for each step, which kills itself there; prints how many steps there were.
STEPS = """
import asyncio, itertools, os, shutil, signal, sys
from kvkeep.testing.doubles.faulty_files import FaultyDisk
from kvkeep.testing.suites.tiers import key, write_of
from kvkeep.tiers.disk.disk import open_disk
from kvkeep.config import Disk

root, before, stride = sys.argv[1:]

async def work(folder, step):
    disk = FaultyDisk()
    disk.after = lambda: os.kill(os.getpid(), signal.SIGKILL) if disk.calls >= step else None
    options = Disk(path=(folder,), size=1 << 20, min_free=0, threads=2)
    tier = await open_disk(options, disk.files)
    await tier.wait_for_scan()
    await tier.store([write_of(key(number), (4096, 8192)) for number in (2, 3)])
    await tier.clear(key(0)[:16])
    await tier.store([write_of(key(2), (4096, 8192))])
    await tier.aclose()

for step in itertools.count(1, int(stride)):
    folder = f"{root}/{step}"
    shutil.copytree(before, folder)
    pid = os.fork()
    if not pid:
        asyncio.run(work(folder, step))
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
        break
print(step)
"""


async def is_whole(tier: DiskTier, disk: FaultyDisk | None = None) -> list[bool]:
    """Which chunks were there; all can be stored (again) after that, and not a byte is leaked."""
    there = [await holds(tier, one) for one in CHUNKS]
    wanted = [Stored.PRESENT if one else Stored.STORED for one in there]
    assert await tier.store(CHUNKS) == wanted
    assert [await holds(tier, one) for one in CHUNKS] == [True] * 4
    root = tier.directories[0].state.record_files.root
    assert tier.figures().used_nbytes == 4 * RECORD == (disk or FaultyDisk()).allocated_nbytes(root)
    return there


@pytest.mark.process
@pytest.mark.parametrize("stride", EVERY_FEW)
def test_kill_9_at_every_step_of_a_restart_a_write_and_a_clear(
    run: Any, opened: Any, root: Path, tmp_path: Path, stride: int
) -> None:
    async def before() -> None:
        async with opened() as tier:
            assert await tier.store(CHUNKS[:2]) == [Stored.STORED] * 2

    run(before)
    (root / "new" / "earlier").write_bytes(bytes(4096))
    (tmp_path / "steps").mkdir()
    command = [sys.executable, "-c", STEPS, str(tmp_path / "steps"), str(root), str(stride)]
    done = subprocess.run(command, capture_output=True, timeout=50, check=True)
    count = int(done.stdout)
    assert count > 30

    async def after(folder: Path, last: bool) -> list[bool]:
        async with opened(path=(str(folder),)) as tier:
            there = await is_whole(tier)
            assert tier.figures().corrupt == 0, "a record that has its name is whole"
            assert not last or there == [False, False, True, False]
            return there

    async def all_steps() -> None:
        found = [await after(tmp_path / "steps" / str(step), step == count) for step in range(1, count + 1, stride)]
        assert all(there[0] == there[1] for there in found), "a part of it was cleared"
        kept = [there[0] for there in found]
        assert kept == sorted(kept, reverse=True), "what was cleared is back"
        assert any(kept)

    run(all_steps)


@pytest.mark.long
@pytest.mark.parametrize("stride", EVERY_FEW)
@pytest.mark.parametrize("end", ["kill", "power-cut"])
def test_a_clear_among_writes_and_reads_at_every_step(
    run: Any, opened: Any, tmp_path: Path, end: str, stride: int
) -> None:
    """All three begin at once: what the clear found, and what was being written then, never comes back after it."""

    async def ended_at(step: int) -> bool:
        folder, shadow = tmp_path / f"disk-{step}", tmp_path / f"shadow-{step}"
        shadow.mkdir()
        disk = FaultyDisk()
        cut = PowerCut(disk, str(shadow))
        files = cut.files if end == "power-cut" else disk.files
        returned = False
        async with opened(files, path=(str(folder),), durability=Durability.EVERY, threads=2) as tier:
            await tier.store(CHUNKS[:2])
            disk.kill_at = disk.calls + step
            reads = [memory_for(one.key, SIZES)[0] for one in CHUNKS[:2]]
            store = asyncio.create_task(tier.store(CHUNKS[2:]))
            load = asyncio.create_task(tier.load(reads))
            await asyncio.sleep(0)
            try:
                await tier.clear(NAMESPACE)
                returned = True
            except TierUnavailable:
                pass
            await asyncio.wait([store, load])
            assert [await holds(tier, one) for one in CHUNKS] == [False] * 4
            killed = disk.calls >= disk.kill_at
            if end == "power-cut":
                cut.cut()
            disk.kill_at = 0
        async with opened(path=(str(folder),)) as tier:
            there = await is_whole(tier)
            assert not (returned and any(there)), "what was cleared is back"
        shutil.rmtree(folder)
        return killed

    async def test() -> None:
        step = 1
        while await ended_at(step):
            step += stride
        assert step > 10

    run(test)


def test_a_record_that_is_replaced_while_it_is_read_is_read_to_its_end(run: Any, opened: Any, root: Path) -> None:
    """Short transfers: the file under the name is another one from the second call on, and is deleted at the third."""
    other = write_of(CHUNKS[0].key, SIZES, seed=1)

    async def test() -> None:
        async with opened() as tier:
            await tier.store([other])
        [path] = record_paths(str(root))
        shutil.copy(path, root / "aside")
        os.unlink(path)
        disk = FaultyDisk(short=4096)
        reading: list[str] = []

        def swap(call: str, _: str) -> int:
            if call == "readv":
                reading.append(call)
                if len(reading) == 2:
                    os.replace(root / "aside", path)
                elif len(reading) == 3:
                    os.unlink(path)
            return 0

        async with opened(disk.files) as tier:
            await tier.store(CHUNKS[:1])
            disk.fault = swap
            assert await holds(tier, CHUNKS[0]), "through one descriptor: the record that was opened, whole"
            assert len(reading) >= 4
            assert not await holds(tier, CHUNKS[0])

    run(test)


@pytest.mark.process
def test_a_start_on_a_read_only_file_system_is_unavailable_and_loses_nothing(run: Any, opened: Any, root: Path) -> None:
    """One that becomes read-only while it is used: `test_a_store_that_fails_is_dropped`."""
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "none", str(root)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")

    async def test() -> None:
        async with opened() as tier:
            await tier.store(CHUNKS[:2])
        subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
        with pytest.raises(TierUnavailable):
            async with opened():
                pass
        subprocess.run(["mount", "-o", "remount,rw", str(root)], check=True)
        async with opened() as tier:
            assert await is_whole(tier) == [True, True, False, False]

    try:
        run(test)
    finally:
        subprocess.run(["umount", str(root)], check=True)
