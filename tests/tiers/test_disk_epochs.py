"""Clears on a disk that does not take the epochs at once: what was cleared does not come back, or the clear says so."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kvkeep.errors import TierUnavailable
from kvkeep.testing.doubles.faulty_files import FaultyDisk, record_paths
from kvkeep.testing.suites.tiers import holds, key, write_of
from kvkeep.tiers.epochs import Epochs, decode_epochs, encode_epochs
from kvkeep.tiers.tier import Stored

SMALL = [write_of(key(number), (4096,)) for number in range(6)]
OURS = key(0)[:16]


def no_new_files(call: str, _path: str) -> int:
    """As a disk without a free block or inode: what has its blocks can still be written."""
    return errno.ENOSPC if call in ("create", "mkdir") else 0


async def left_in(opened: Any) -> list[bool]:
    """What a start after a kill finds."""
    async with opened() as tier:
        return [await holds(tier, one) for one in SMALL]


def test_a_full_disk_takes_the_epochs_whose_room_was_taken_before(run: Any, opened: Any) -> None:
    """Although no record can be removed: what lies there is of an old epoch."""

    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            await tier.store(SMALL)
            disk.fault = lambda call, path: errno.EIO if call == "unlink" else no_new_files(call, path)
            await tier.clear(OURS)
            disk.kill_at = 0
        assert not any(await left_in(opened))

    run(test)


def test_where_no_room_was_taken_the_records_make_it(run: Any, opened: Any, root: Path) -> None:
    async def test() -> None:
        disk = FaultyDisk(fault=lambda call, path: errno.ENOSPC if call == "create" and "epochs." in path else 0)
        async with opened(disk.files) as tier:
            await tier.store(SMALL)
            disk.fault = lambda call, path: no_new_files(call, path) if list(record_paths(str(root))) else 0
            await tier.clear(OURS)
            epochs = decode_epochs((root / "epochs").read_bytes())
            assert epochs.of(OURS) == tier.directories[0].state.epochs.of(OURS)

    run(test)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EPERM, errno.EIO])
@pytest.mark.parametrize("failing", ["replace", "sync", "writev"])
def test_a_clear_that_is_not_durable_says_so_and_deletes_all_the_same(
    run: Any, opened: Any, failing: str, code: int
) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            await tier.store(SMALL)
            disk.fault = lambda call, path: code if call == failing and "epochs" in _meant(disk, path) else 0
            with pytest.raises(TierUnavailable, match=r"may be found again after a restart.*clear again"):
                await tier.clear(OURS)
            assert not any([await holds(tier, one) for one in SMALL])
            disk.kill_at = 0
        assert not any(await left_in(opened))

    run(test)


def _meant(disk: FaultyDisk, path: str) -> str:
    """Also what is written first under a temporary name."""
    return "epochs" if path.endswith("-state") else path


@pytest.mark.parametrize("when", ["at the next store", "at the end", "at the next clear"])
def test_epochs_that_could_not_be_written_are_tried_again(run: Any, opened: Any, root: Path, when: str) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            await tier.store(SMALL[:3])
            disk.fault = lambda call, _: errno.EIO if call in ("sync", "unlink") else 0
            with pytest.raises(TierUnavailable):
                await tier.clear(OURS)
            disk.fault = lambda call, _: errno.EIO if call == "unlink" else 0
            if when == "at the next store":
                await tier.store(SMALL[3:4])
                while len(tier.directories[0].state.tasks):
                    await asyncio.wait(set(tier.directories[0].state.tasks))
            elif when == "at the next clear":
                await tier.clear(bytes(16))
            if when != "at the end":
                disk.kill_at = 0
        assert [there for there in (await left_in(opened))[:3] if there] == []

    run(test)


def test_many_clears_at_once_write_few_epochs(run: Any, opened: Any) -> None:
    async def test() -> None:
        written = 0

        def counts(call: str, path: str) -> int:
            nonlocal written
            written += call == "replace" and path.endswith("/epochs")
            return 0

        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            disk.fault = counts
            await asyncio.gather(*(tier.clear(bytes([number]) * 16) for number in range(100)))
            assert 1 <= written <= 4

    run(test)


def test_a_directory_of_before_is_read_and_so_is_what_is_filled_up(run: Any, opened: Any, root: Path) -> None:
    async def test() -> None:
        async with opened() as tier:
            await tier.store(SMALL[:1])
            epochs = tier.directories[0].state.epochs
        (root / "epochs").write_bytes(encode_epochs(epochs))
        async with opened() as tier:
            assert await holds(tier, SMALL[0])
            await tier.clear(bytes(16))
        assert (root / "epochs").stat().st_size % 4096 == 0
        assert not (root / "epochs.next").exists()
        async with opened() as tier:
            assert await holds(tier, SMALL[0])

    run(test)


def test_epochs_are_filled_up_with_spaces() -> None:
    epochs = Epochs(7, 5, {"ab" * 16: 7}, frozenset(["ab" * 16]))
    plain = encode_epochs(epochs)
    for nbytes in (0, len(plain), len(plain) + 1, 8192):
        octets = encode_epochs(epochs, nbytes)
        assert len(octets) == max(nbytes, len(plain))
        assert decode_epochs(octets) == epochs


def test_what_was_left_of_the_next_epochs_is_replaced(run: Any, opened: Any, root: Path) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            await tier.store(SMALL[:1])
            disk.kill_at = 0
        assert (root / "epochs.next").exists()
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            assert await holds(tier, SMALL[0])
            disk.fault = no_new_files
            await tier.clear(OURS)

    run(test)


def _is_full(file: io.FileIO) -> bool:
    try:
        file.write(bytes(4096))
    except OSError:
        return True
    return False


@pytest.mark.process
def test_a_tmpfs_that_somebody_else_has_filled(run: Any, opened: Any, root: Path) -> None:
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k,mode=0700", "none", str(root)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")

    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            assert await tier.store(SMALL) == [Stored.STORED] * len(SMALL)
            filled = False
            with (root / "filler").open("wb", buffering=0) as file:
                while not filled:
                    filled = _is_full(file)
            disk.fault = lambda call, _: errno.EIO if call == "unlink" else 0
            for _ in range(2):
                await tier.clear(None)
            disk.kill_at = 0
        (root / "filler").unlink()
        assert not any(await left_in(opened))

    try:
        run(test)
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


def test_the_room_for_the_next_epochs_grows_with_them(run: Any, opened: Any, root: Path) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            for number in range(1, 200):
                disk.fault = lambda call, path: errno.ENOSPC if call == "create" and "-state" in path else 0
                await tier.clear(bytes([number]) * 16)
            assert (root / "epochs").stat().st_size > 8192

    run(test)
