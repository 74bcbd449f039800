"""A store process with a disk tier, ended in every way and started again: what it kept is there, byte for byte."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import xxhash

from kvkeep.config import Config, Disk
from kvkeep.memory.region import Region
from kvkeep.telemetry import Miss
from kvkeep.testing.doubles.faulty_files import record_paths
from kvkeep.wire import messages as m
from kvkeep.wire.client import Client, Joining
from kvkeep.wire.start import Child, start_private

pytestmark = pytest.mark.process

SIZES = [8192, 4096]
CHUNK = sum(SIZES)
ROOM = 8
LIMIT_S = 20.0


def digest(number: int) -> bytes:
    return number.to_bytes(4, "big") * 8


def payload(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, CHUNK, dtype=np.uint8)


def sums(number: int) -> bytes:
    data = payload(number)
    return xxhash.xxh3_128_digest(data[: SIZES[0]].data) + xxhash.xxh3_128_digest(data[SIZES[0] :].data)


@contextmanager
def started(folder: Path, limit_nbytes: int = 1 << 20) -> Iterator[tuple[Child, Client, Region]]:
    """A private store over `folder`, its client, and the pool as a worker maps it."""
    options = Disk(path=(str(folder),), size=limit_nbytes, min_free=0)
    child = start_private(Config(pool_size=ROOM * CHUNK, max_pinned_share=1.0, log_level="error", tiers=[options]))
    hello = m.Hello(
        name="test", namespace=b"n" * 16, identity="", chunk_nbytes=CHUNK, holders=[os.getpid()], sizes=SIZES
    )
    client = Joining(child.sock, hello).wait(LIMIT_S)
    with Region.attach(os.dup(client.pool_fd)) as region:
        yield child, client, region
    client.drop()
    child.end(LIMIT_S)


def figures(client: Client) -> dict[str, int]:
    answer = client.wait(client.stats(check=True), LIMIT_S)
    assert isinstance(answer, m.Stats), client.why_gone
    assert answer.problem == ""
    return answer.figures


def until(client: Client, name: str, value: int) -> None:
    """Asks until a figure has this value: each question is one turn of the store's loop."""
    end = time.monotonic() + LIMIT_S
    while figures(client).get(name, 0) != value:
        assert time.monotonic() < end, figures(client)


def keep(client: Client, region: Region, *numbers: int) -> None:
    granted = client.wait(client.reserve([digest(n) for n in numbers]), LIMIT_S)
    assert isinstance(granted, m.Granted)
    for number, offset in zip(numbers, granted.offsets, strict=True):
        region.array[offset : offset + CHUNK] = payload(number)
    committed = client.wait(client.commit(granted.lease, range(len(numbers)), [sums(n) for n in numbers]), LIMIT_S)
    assert isinstance(committed, m.Committed)
    assert all(committed.done)
    client.release(granted.lease)


def given(client: Client, region: Region, *numbers: int) -> m.Matched:
    """What a fetch is answered with, after a comparison of all bytes."""
    matched = client.wait(client.fetch([digest(n) for n in numbers], LIMIT_S), LIMIT_S)
    assert isinstance(matched, m.Matched), client.why_gone
    for number, offset in zip(numbers, matched.offsets, strict=False):
        assert (region.array[offset : offset + CHUNK] == payload(number)).all()
    client.release(matched.lease)
    return matched


def owned(client: Client) -> None:
    until(client, "disk_scanned", 1)


@pytest.mark.parametrize("end", ["goodbye", "end of file", "killed"])
def test_what_was_written_is_there_after_a_restart(tmp_path: Path, end: str) -> None:
    with started(tmp_path) as (child, client, region):
        owned(client)
        keep(client, region, 1, 2, 3)
        if end == "killed":
            until(client, "disk_stored", 3)
            child.process.kill()
        elif end == "goodbye":
            client.close()
    with started(tmp_path) as (_, client, region):
        owned(client)
        matched = given(client, region, 1, 2, 3)
        assert (len(matched.offsets), matched.sources) == (3, {"disk": 3})
        assert given(client, region, 1, 2, 3).sources == {"pool": 3}
        now = figures(client)
        assert (now["pinned_nbytes"], now["writing_nbytes"], now["chunks"]) == (0, 0, 3)


def test_more_than_the_pool_holds_is_given_from_disk(tmp_path: Path) -> None:
    with started(tmp_path) as (_, client, region):
        owned(client)
        for first in range(0, 24, 4):
            keep(client, region, *range(first, first + 4))
            until(client, "disk_stored", first + 4)
        matched = given(client, region, 0, 1, 2, 3)
        assert matched.sources == {"disk": 4}
        assert figures(client)["evictions"] > 0


def test_a_damaged_file_is_a_miss_and_gone(tmp_path: Path) -> None:
    with started(tmp_path) as (_, client, region):
        owned(client)
        keep(client, region, 1, 2)
        until(client, "disk_stored", 2)
    (file,) = tmp_path.glob(f"**/{digest(2).hex()}*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with started(tmp_path) as (_, client, region):
        owned(client)
        matched = given(client, region, 1, 2)
        assert (len(matched.offsets), matched.why) == (1, Miss.TIER_FAILED)
        assert figures(client)["disk_corrupt"] == 1
    assert not file.exists()


def test_what_was_cleared_does_not_come_back(tmp_path: Path) -> None:
    with started(tmp_path) as (_, client, region):
        owned(client)
        keep(client, region, 1, 2)
        until(client, "disk_stored", 2)
        assert isinstance(client.wait(client.clear(), LIMIT_S), m.Cleared)
    with started(tmp_path) as (_, client, region):
        owned(client)
        assert given(client, region, 1).offsets == []


def test_what_was_cleared_on_a_full_disk_does_not_come_back_after_a_kill(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=0700", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        with started(folder) as (child, client, region):
            owned(client)
            keep(client, region, 1, 2)
            until(client, "disk_stored", 2)
            with suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
            assert os.statvfs(folder).f_bavail == 0
            call = client.clear()
            assert client.wait(call, LIMIT_S) == m.Cleared(call.number, 2)
            child.process.kill()
        (folder / "filler").unlink()
        with started(folder) as (_, client, region):
            owned(client)
            assert given(client, region, 1).offsets == []
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_reset_drops_what_was_under_the_old_name(tmp_path: Path) -> None:
    with started(tmp_path) as (_, client, region):
        owned(client)
        keep(client, region, 1, 2)
        until(client, "disk_stored", 2)
        cleared = client.clear()
        client.rename(b"e" * 16, "")  # both on their way at once
        assert isinstance(client.wait(cleared, LIMIT_S), m.Cleared)
    with started(tmp_path) as (_, client, region):
        owned(client)
        assert given(client, region, 1).offsets == []


def test_a_chunk_that_failed_is_deleted_under_the_name_that_it_had(tmp_path: Path) -> None:
    with started(tmp_path) as (_, client, region):
        owned(client)
        keep(client, region, 1)
        until(client, "disk_stored", 1)
        client.discard([digest(1)])
        client.rename(b"e" * 16, "")
        until(client, "disk_records", 0)


def test_a_second_store_on_the_same_directory_goes_on_without_it(tmp_path: Path) -> None:
    with started(tmp_path) as (_, client, region), started(tmp_path) as (_, other, theirs):
        owned(client)
        keep(client, region, 1)
        keep(other, theirs, 2)
        assert given(other, theirs, 2).sources == {"pool": 1}
        assert "disk_used_nbytes" not in figures(other)


@pytest.mark.parametrize("end", ["ended", "killed"])
def test_a_second_store_takes_the_directory_over_and_both_keep_its_limit(tmp_path: Path, end: str) -> None:
    """Watched from outside all the time: the limit is that of the directory, not of each store."""
    limit = 5 * (CHUNK + 4096) + 4096
    with watched(tmp_path) as most, started(tmp_path, limit_nbytes=limit) as (child, client, region):
        owned(client)
        with started(tmp_path, limit_nbytes=limit) as (_, other, theirs):
            for first in range(0, 12, 2):
                keep(client, region, first, first + 1)
                keep(other, theirs, 100 + first, 101 + first)
                until(client, "disk_stored", first + 2)
            if end == "killed":
                child.process.kill()
            else:
                client.drop()
            owned(other)
            until(other, "disk_flush_waiting", 0)
            assert figures(other)["disk_stored"] > 0, "what it had kept before it owned the directory"
            for first in range(112, 120, 2):
                keep(other, theirs, first, first + 1)
            until(other, "disk_flush_waiting", 0)
            assert figures(other)["disk_used_nbytes"] <= limit
            assert given(other, theirs, 118, 119).why is None
    assert 4 * (CHUNK + 4096) <= max(most) <= limit


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """What the records of a folder take on the device, looked at again and again by a thread."""
    most, over = [0], threading.Event()

    def look() -> None:
        while not over.is_set():
            seen = list(record_paths(str(folder)))  # those of them that are still there were all there at one moment
            nbytes = 0
            for path in seen:
                with suppress(FileNotFoundError):
                    nbytes += os.stat(path).st_blocks * 512
            most.append(nbytes)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()
