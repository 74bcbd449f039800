"""What is not ours in the disk tier's directory: fifos, directories, links, hints and records that cannot be read.

None of them keeps a thread waiting, none leaves the tier out, and each key can be stored again.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvkeep.errors import TierUnavailable
from kvkeep.testing.doubles.faulty_files import FaultyDisk
from kvkeep.testing.suites.tiers import holds, key, memory_for, write_of
from kvkeep.tiers.disk.directio import posix_files
from kvkeep.tiers.disk.disk import DiskTier
from kvkeep.tiers.disk.scrub import Condition, known_epochs, record_paths, scrub
from kvkeep.tiers.record import record_nbytes
from kvkeep.tiers.tier import Stored, Write

SMALL = [write_of(key(number), (4096,)) for number in range(6)]
RECORD = record_nbytes((4096,))
LIMIT_S = 20.0  # of what must not wait at all


def path_of(root: Path, one: bytes) -> Path:
    return root / one[:16].hex() / one[16:17].hex() / one[16:].hex()


def fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            sock.bind(f"/proc/self/fd/{folder}/{path.name[:60]}")  # else the path is too long for one
            os.rename(path.parent / path.name[:60], path)
        finally:
            os.close(folder)


def directory(path: Path) -> None:
    path.mkdir()


def link(path: Path) -> None:
    path.symlink_to("/dev/zero")


KINDS = [fifo, a_socket, directory, link]


async def misses(tier: DiskTier, write: Write, by_range: bool, path: Path) -> bool:
    """Whether a load comes back at once and gives nothing; a thread that waits at a fifo is set free again."""
    read, _ = memory_for(write.key, write.sizes)
    task = asyncio.create_task(tier.load([read._replace(arrived=lambda _: None) if by_range else read]))
    await asyncio.wait([task], timeout=LIMIT_S)
    in_time = task.done()
    if not in_time:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    return in_time and await task == [None]


@pytest.mark.parametrize("by_range", [False, True])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_has_a_records_name_and_is_none(
    run: Any, opened: Any, root: Path, kind: Callable[[Path], None], direct: bool, by_range: bool
) -> None:
    async def test() -> None:
        async with opened(direct=direct) as tier:
            await tier.store(SMALL[:2])
            path = path_of(root, SMALL[0].key)
            path.unlink()
            kind(path)
            assert await misses(tier, SMALL[0], by_range, path)
            assert await holds(tier, SMALL[1])
            assert await tier.store(SMALL[:1]) == [Stored.STORED], "its key cannot be stored again"
            assert await holds(tier, SMALL[0])
            assert tier.figures().used_nbytes == FaultyDisk().allocated_nbytes(str(root)) == 2 * RECORD

    run(test)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_put_there_while_nobody_looked(
    run: Any, opened: Any, root: Path, kind: Callable[[Path], None]
) -> None:
    """A start over it, and `scrub`, which reads what a start only counts."""

    async def test() -> None:
        async with opened() as tier:
            await tier.store(SMALL[:2])
        path = path_of(root, SMALL[0].key)
        path.unlink()
        kind(path)
        async with opened() as tier:
            assert await misses(tier, SMALL[0], False, path)
            assert await holds(tier, SMALL[1])

    run(test)


@pytest.mark.parametrize("kind", [fifo, a_socket, link])
def test_a_scrub_waits_for_none_of_them(run: Any, opened: Any, root: Path, kind: Callable[[Path], None]) -> None:
    async def test() -> None:
        async with opened() as tier:
            await tier.store(SMALL[:2])

    run(test)
    for path in (path_of(root, SMALL[0].key), root / "epochs"):
        path.unlink()
        kind(path)
    files = posix_files()
    found: dict[str, Condition] = {}

    def scrubs() -> None:
        try:
            known = known_epochs(files, str(root))
        except OSError:
            known = None
        found.update((one.path, one.condition) for one in scrub(files, record_paths(files, str(root)), known) if one)

    thread = threading.Thread(target=scrubs, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert len(found) == 2, "it waits"
    assert found[str(path_of(root, SMALL[1].key))] is Condition.OLD
    assert found[str(path_of(root, SMALL[0].key))] in (Condition.CORRUPT, Condition.UNREADABLE)


@pytest.mark.parametrize("kind", KINDS)
def test_an_order_that_is_no_file_is_no_order(run: Any, opened: Any, root: Path, kind: Callable[[Path], None]) -> None:
    async def test() -> None:
        async with opened() as tier:
            await tier.store(SMALL[:2])
        (root / "order").unlink()
        kind(root / "order")
        async with opened() as tier:
            assert [await holds(tier, one) for one in SMALL[:2]] == [True, True]
            assert await tier.store(SMALL[2:3]) == [Stored.STORED]

    run(test)


def test_an_order_that_is_a_full_directory_keeps_nothing_out(run: Any, opened: Any, root: Path) -> None:
    async def test() -> None:
        (root / "order" / "more").mkdir(parents=True)
        root.chmod(0o700)
        for number in range(2):
            async with opened() as tier:
                assert await tier.store(SMALL[number : number + 1]) == [Stored.STORED]

    run(test)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_an_order_that_cannot_be_read_is_gone_before_anything_is_stored(
    run: Any, opened: Any, root: Path, code: int
) -> None:
    """Else a later start, which can read it, would take its bytes for all that there are."""

    async def test() -> None:
        async with opened() as tier:
            await tier.store(SMALL[:2])
        disk = FaultyDisk(fault=lambda call, path: code if call == "open" and path.endswith("/order") else 0)
        async with opened(disk.files) as tier:
            assert [await holds(tier, one) for one in SMALL[:2]] == [True, True]
            assert (root / "order").exists()
            assert await tier.store(SMALL[2:3]) == [Stored.STORED]
            assert not (root / "order").exists()

    run(test)


def test_what_lies_in_new_and_cannot_be_removed_does_not_stop_the_look_through(
    run: Any, opened: Any, root: Path
) -> None:
    async def test() -> None:
        async with opened() as tier:
            await tier.store(SMALL[:2])
        (root / "new" / "folder" / "more").mkdir(parents=True)
        async with opened() as tier:
            assert tier.figures().scan_s >= 0
            assert await tier.store(SMALL[2:3]) == [Stored.STORED]

    run(test)


def test_directories_without_a_record_are_removed_at_the_next_start(run: Any, opened: Any, root: Path) -> None:
    """Else each namespace that there ever was leaves 257 of them for ever."""
    other = write_of(key(1, namespace=2), (4096,))

    async def test() -> None:
        async with opened() as tier:
            await tier.store([*SMALL[:2], other])
            await tier.clear(other.key[:16])
            await tier.delete([SMALL[0].key])
        strange = root / ("ab" * 16) / "ab" / "notes"
        strange.parent.mkdir(parents=True)
        strange.touch()
        async with opened() as tier:
            assert await holds(tier, SMALL[1])
            there = {path for path in root.rglob("*") if path.is_dir()}
            kept = path_of(root, SMALL[1].key)
            assert there == {root / "new", kept.parent, kept.parent.parent, strange.parent, strange.parent.parent}

    run(test)


def test_a_directory_that_is_removed_while_a_record_goes_there_is_made_again(run: Any, opened: Any, root: Path) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        folder = path_of(root, SMALL[0].key).parent
        removed = 0

        def removes(call: str, path: str) -> int:
            nonlocal removed
            if call == "publish" and removed < 2 and folder.exists():
                removed += 1
                folder.rmdir()
                folder.parent.rmdir()
            return 0

        disk.fault = removes
        async with opened(disk.files) as tier:
            assert await tier.store(SMALL[:1]) == [Stored.STORED]
            assert removed == 2
            assert await holds(tier, SMALL[0])

    run(test)


# ---- records that cannot be read


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENXIO])
@pytest.mark.parametrize("failing", ["open", "readv", "stat"])
@pytest.mark.parametrize("by_range", [False, True])
def test_a_record_that_cannot_be_read_is_replaced_when_its_chunk_is_stored_again(
    run: Any, opened: Any, root: Path, failing: str, code: int, by_range: bool
) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            await tier.store(SMALL[:2])
            path = path_of(root, SMALL[0].key)
            inode = path.stat().st_ino

            def fails(call: str, where: str) -> int:
                return code if call == failing and where == str(path) and path.stat().st_ino == inode else 0

            disk.fault = fails
            assert await misses(tier, SMALL[0], by_range, path)
            held = os.open(path, os.O_RDONLY)  # so that the new file has an inode of its own
            if failing == "stat":  # by its name it can be looked at again, or it could not be removed
                disk.fault = lambda _call, _path: 0
            assert await tier.store(SMALL[:2]) == [Stored.STORED, Stored.PRESENT]
            os.close(held)
            assert await holds(tier, SMALL[0])
            assert tier.figures().used_nbytes == disk.allocated_nbytes(str(root)) == 2 * RECORD

    run(test)


def test_a_record_that_can_be_read_again_is_kept(run: Any, opened: Any, root: Path) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            await tier.store(SMALL[:1])
            disk.fault = lambda call, _: errno.EIO if call == "readv" else 0
            assert not await holds(tier, SMALL[0])
            disk.fault = lambda _call, _path: 0
            assert await holds(tier, SMALL[0])
            assert await tier.store(SMALL[:1]) == [Stored.PRESENT]

    run(test)


# ---- what an I/O thread meets


def test_chunks_that_no_record_can_hold_are_refused_and_the_others_stored(run: Any, opened: Any) -> None:
    """As a hostile client commits them: more ranges than a header has room for, sums of another length."""

    async def test() -> None:
        ranges = 174_759  # 24 bytes each: one more than 1,024 pages hold
        torn = SMALL[1]._replace(sums=b"1")
        untouched = np.frombuffer(mmap.mmap(-1, 4096 * ranges), np.uint8)
        wide = Write(SMALL[2].key, (4096,) * ranges, untouched, bytes(16 * ranges))
        async with opened(size=1 << 40) as tier:
            for _ in range(tier.directories[0].state.options.threads + 1):
                answers = await tier.store([SMALL[0], torn, wide])
                assert answers[1:] == [Stored.REFUSED] * 2
            assert await holds(tier, SMALL[0])
            assert (tier.figures().degraded, tier.figures().errors) == ("", 0)

    run(test)


def test_a_bug_in_an_io_thread_costs_only_its_job(run: Any, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than there are threads: each fails with a typed error, and the tier works on."""
    died: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", died.append)

    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            await tier.store(SMALL[:2])

            def breaks() -> None:
                raise ZeroDivisionError

            bugs = 2 * tier.directories[0].state.options.threads
            for _ in range(bugs):
                disk.after = breaks
                with pytest.raises(TierUnavailable, match="bug"):
                    await tier.load([memory_for(SMALL[0].key, (4096,))[0]])
            disk.after = lambda: None
            assert [await holds(tier, one) for one in SMALL[:2]] == [True, True]
            assert await tier.store(SMALL[2:3]) == [Stored.STORED]
            while len(died) < bugs:  # each thread ends with a traceback, soon after it has given its answer
                await asyncio.sleep(0)

    run(test)
    assert all(one.exc_type is ZeroDivisionError for one in died)
