"""A directory that version 1 of the record wrote (kvkeep at c9769f5): swept, told in one line, never misread."""

from __future__ import annotations

import errno
import logging
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from kvkeep.cli.check import examine
from kvkeep.testing.doubles.faulty_files import FaultyDisk, record_paths
from kvkeep.testing.suites.tiers import holds, key, write_of
from kvkeep.tiers.disk.directio import posix_files
from kvkeep.tiers.disk.scrub import Condition
from kvkeep.tiers.epochs import decode_epochs
from kvkeep.tiers.record import record_nbytes
from kvkeep.tiers.tier import Stored, Write

ZEROS = np.zeros(100 * 4096, np.uint8)
ZERO_SUM = xxhash.xxh3_128_digest(bytes(4096))
WRITES = [
    write_of(key(0), (4096,)),
    write_of(key(1), (4096,)),
    Write(key(2), (4096, 8192), ZEROS[:12288], ZERO_SUM + xxhash.xxh3_128_digest(bytes(8192))),
    Write(key(3, namespace=2), (4096,) * 100, ZEROS, ZERO_SUM * 100),
]
VERSION_1_NBYTES = 2 * 8192 + 16384 + 101 * 4096
FRESH = write_of(key(9), (4096,))


@pytest.fixture(autouse=True)
def version_1(root: Path) -> None:
    with tarfile.open(Path(__file__).parent.parent / "data" / "record-v1.tar.xz") as archive:
        archive.extractall(root, filter="data")
    root.chmod(0o700)
    assert len(list(record_paths(str(root)))) == 4


def nbytes_of(root: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in root.glob("*/*/*"))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


@pytest.mark.parametrize("clean", [True, False], ids=["clean", "killed"])
def test_it_is_swept_and_said_once(run: Any, opened: Any, root: Path, clean: bool, caplog: Any) -> None:
    async def test() -> None:
        if not clean:
            (root / "order").unlink()
        last = decode_epochs((root / "epochs").read_bytes()).last
        async with opened(at_once=True) as tier:
            assert tier.figures().used_nbytes in ((VERSION_1_NBYTES,) if clean else (1 << 20,))
            assert [await holds(tier, one) for one in WRITES] == [False] * 4, "before it is swept"
            await tier.wait_for_scan()
            assert [await holds(tier, one) for one in WRITES] == [False] * 4
            assert await tier.contains([one.key for one in WRITES]) == [False] * 4
            assert (list(record_paths(str(root))), tier.figures().used_nbytes, tier.figures().corrupt) == ([], 0, 0)
            assert await tier.store(WRITES) == [Stored.STORED] * 4
            assert all([await holds(tier, one) for one in WRITES])
        [line] = lines(caplog)
        assert "its 4 records have format version 1, this kvkeep reads version 2 only: they are removed" in line
        epochs = decode_epochs((root / "epochs").read_bytes())
        assert (epochs.version, epochs.last > last) == (2, True)
        async with opened() as tier:
            assert all([await holds(tier, one) for one in WRITES])
        assert len(lines(caplog)) == 1, "said again"

    run(test)


def test_the_limit_holds_while_it_is_swept(run: Any, opened: Any, root: Path) -> None:
    async def test() -> None:
        limit_nbytes = VERSION_1_NBYTES + 4096
        disk = FaultyDisk()
        most_nbytes = 0

        def watch(_call: str, _path: str) -> int:
            nonlocal most_nbytes
            most_nbytes = max(
                most_nbytes,
                nbytes_of(root)
                + sum(one.stat().st_blocks * 512 for one in root.glob("new/*-*") if "state" not in one.name),
            )
            return 0

        disk.fault = watch
        async with opened(disk.files, at_once=True, size=limit_nbytes) as tier:
            await tier.store([FRESH, *WRITES[:2]])
            assert tier.figures().used_nbytes <= limit_nbytes
            await tier.wait_for_scan()
            await tier.store([FRESH, *WRITES])
            assert await holds(tier, FRESH)
            assert tier.figures().used_nbytes <= limit_nbytes
        assert 0 < most_nbytes <= limit_nbytes

    run(test)


def test_a_sweep_that_does_not_end_goes_on_at_the_next_start(run: Any, opened: Any, root: Path) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        stuck = root / f"{key(3, namespace=2)[:16].hex()}"
        disk.fault = lambda call, path: errno.EROFS if call == "unlink" and path.startswith(str(stuck)) else 0
        async with opened(disk.files) as tier:
            assert [await holds(tier, one) for one in WRITES] == [False] * 4
            assert tier.figures().stalled == 1
        assert len(list(record_paths(str(root)))) == 1
        async with opened() as tier:
            assert [await holds(tier, one) for one in WRITES] == [False] * 4
            assert list(record_paths(str(root))) == []
            assert tier.figures().used_nbytes == 0

    run(test)


def test_a_check_calls_its_records_old(root: Path) -> None:
    bad, counts, _ = examine(posix_files(), str(root))
    assert counts == {Condition.OLD: 4}
    assert all("format version 1" in one.why for one in bad)


@pytest.mark.parametrize("number", range(4))
def test_one_that_is_moved_among_records_of_now_is_a_miss_and_makes_way(
    run: Any, opened: Any, root: Path, tmp_path: Path, number: int
) -> None:
    """Also where header and payload would fit by their lengths."""

    async def test() -> None:
        old = root.rename(tmp_path / "old")
        write = WRITES[number]
        async with opened() as tier:
            assert await tier.store([FRESH]) == [Stored.STORED]
        [path] = (one for one in old.glob("*/*/*") if one.name == write.key[16:].hex())
        moved = root / path.relative_to(old)
        moved.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, moved)
        async with opened() as tier:
            assert not await holds(tier, write)
            assert not moved.exists()
            assert tier.figures().used_nbytes == record_nbytes(FRESH.sizes)
            assert await tier.store([write]) == [Stored.STORED]
            assert await holds(tier, write)
            assert await holds(tier, FRESH)

    run(test)
