"""The disk tier beside bare preadv and pwritev of the same bytes: same files, same threads, same O_DIRECT.

`OMP_NUM_THREADS=1 python bench/disk.py [--dir DIR] [--only NAME ...] [--json FILE]`, about 2 minutes and 1 GiB of DIR.
Checksums are part of every load of ours. Where O_DIRECT is not to be had, the page cache is dropped file by file.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import xxhash

from kvkeep.cli.rows import Case, Row, alternate, say, seconds, show, write
from kvkeep.tiers.directio import aligned_bytes
from kvkeep.tiers.disk import DiskOptions, DiskTier, open_disk
from kvkeep.tiers.record import first_bad_range, record_nbytes
from kvkeep.tiers.shelf import Durability
from kvkeep.tiers.tier import Read, Stored, Write

THREADS = 4
RANGES = 16
TINY = 4096


class Bench:
    """A tier in a directory of its own, `count` chunks of `nbytes`, and the loop that drives it."""

    def __init__(self, root: Path, nbytes: int, count: int, durability: Durability, direct: bool) -> None:
        self.root = root
        self.loop = asyncio.new_event_loop()
        options = DiskOptions(
            directories=(str(root),),
            limit_nbytes=64 << 30,
            threads=THREADS,
            durability=durability,
            min_free_nbytes=0,
            direct=direct,
        )
        self.tier: DiskTier = self.loop.run_until_complete(open_disk(options))
        self.loop.run_until_complete(self.tier.looked_through())
        self.direct = self.tier.figures().direct
        sizes = (nbytes // RANGES,) * RANGES if nbytes >= RANGES * TINY else (nbytes,)
        self.memory = aligned_bytes(nbytes * count)
        self.memory[:] = np.random.default_rng(1).integers(0, 256, self.memory.nbytes, np.uint8)
        self.writes = [self._chunk(number, sizes) for number in range(count)]
        self.reads = [Read(one.key, one.sizes, one.payload) for one in self.writes]
        self.nbytes = count * record_nbytes(sizes)
        self.scratch = [aligned_bytes(TINY) for _ in range(count)]
        self.aside = root / "aside"
        self.aside.mkdir()
        self.pool = ThreadPoolExecutor(THREADS)

    def _chunk(self, number: int, sizes: tuple[int, ...]) -> Write:
        payload = self.memory[number * sum(sizes) : (number + 1) * sum(sizes)]
        size = sizes[0]
        sums = [xxhash.xxh3_128_digest(payload[at : at + size].data) for at in range(0, payload.nbytes, size)]
        return Write(
            bytes(16) + xxhash.xxh3_128_digest(bytes([number % 256, number >> 8])) * 2, sizes, payload, b"".join(sums)
        )

    def path(self, key: bytes) -> str:
        return f"{self.root}/{key[:16].hex()}/{key[16:17].hex()}/{key[16:].hex()}"

    # ---- what is timed, in seconds

    def store(self) -> float:
        stored: list[Stored] = []
        elapsed = seconds(lambda: stored.extend(self.loop.run_until_complete(self.tier.store(self.writes))))
        assert stored == [Stored.STORED] * len(self.writes)
        return elapsed

    def load(self, cold: bool = True) -> float:
        if cold:
            self._cold()
        found: list[bytes | None] = []
        elapsed = seconds(lambda: found.extend(self.loop.run_until_complete(self.tier.load(self.reads))))
        assert None not in found
        return elapsed

    def delete(self) -> None:
        self.loop.run_until_complete(self.tier.delete([one.key for one in self.writes]))

    def raw_load(self, cold: bool = True) -> float:
        if cold:
            self._cold()
        return seconds(lambda: list(self.pool.map(self._raw_read, range(len(self.writes)))))

    def raw_store(self) -> float:
        elapsed = seconds(lambda: list(self.pool.map(self._raw_write, range(len(self.writes)))))
        for file in self.aside.iterdir():
            file.unlink()
        return elapsed

    def _raw_read(self, number: int) -> None:
        fd = os.open(self.path(self.writes[number].key), os.O_RDONLY | (os.O_DIRECT if self.direct else 0))
        got = os.preadv(fd, [self.scratch[number].data, self.reads[number].into.data], 0)
        assert got == self.nbytes // len(self.writes)
        os.close(fd)

    def _raw_write(self, number: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if self.direct else 0)
        fd = os.open(f"{self.aside}/{number}", flags, 0o600)
        put = os.pwritev(fd, [self.scratch[number].data, self.writes[number].payload.data], 0)
        assert put == self.nbytes // len(self.writes)
        os.close(fd)

    def _cold(self) -> None:
        if self.direct:
            return
        for one in self.writes:
            fd = os.open(self.path(one.key), os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    def close(self) -> None:
        self.loop.run_until_complete(self.tier.aclose())
        self.loop.close()
        self.pool.shutdown()
        shutil.rmtree(self.root)


def rate(nbytes: int, run: Callable[[], float], after: Callable[[], object] = lambda: None) -> Callable[[], float]:
    """GB/s of a run; `after` is not in it."""

    def measure() -> float:
        elapsed = run()
        after()
        return nbytes / elapsed / 1e9

    return measure


def transfers(make: Callable[..., Bench], name: str, nbytes: int, count: int, runs: int, goal: str) -> list[Row]:
    """Load and store of chunks of one size."""
    bench = make(nbytes, count)
    how = "O_DIRECT" if bench.direct else "buffered"
    stored, wrote = alternate(runs, rate(bench.nbytes, bench.store, bench.delete), rate(bench.nbytes, bench.raw_store))
    bench.store()
    loaded, read = alternate(runs, rate(bench.nbytes, bench.load), rate(bench.nbytes, bench.raw_load))
    bench.close()
    return [
        Case(f"disk-store-{name}", "GB/s", f"pwritev, {how}, {THREADS} threads", "higher", goal).row(stored, wrote),
        Case(f"disk-load-{name}", "GB/s", f"preadv, {how}, {THREADS} threads", "higher", goal).row(loaded, read),
    ]


def verify_rows(make: Callable[..., Bench]) -> list[Row]:
    """What the checksums of a chunk of 32 MiB cost, beside reading it; one thread."""
    bench = make(32 << 20, 4)
    bench.store()
    numbers = iter(range(10**6))

    def verify() -> float:
        one = bench.writes[next(numbers) % 4]
        return seconds(lambda: first_bad_range(one.payload, one.sizes, one.sums)) * 1e3

    def read() -> float:
        return seconds(lambda: bench._raw_read(next(numbers) % 4)) * 1e3

    ours, theirs = alternate(16, verify, read)
    bench.close()
    return [Case("disk-verify-share", "ms", "preadv of the chunk", goal="<= 0.10").row(ours, theirs)]


def metadata_rows(make: Callable[..., Bench]) -> list[Row]:
    """All that is not the transfer itself, a chunk: chunks of one page that are in the page cache, 512 a call."""
    bench = make(TINY, 512, Durability.NONE, False)
    per_chunk = 1e6 / 512
    stored, wrote = alternate(
        8, lambda: (bench.store() * per_chunk, bench.delete())[0], lambda: bench.raw_store() * per_chunk
    )
    bench.store()
    loaded, read = alternate(8, lambda: bench.load(False) * per_chunk, lambda: bench.raw_load(False) * per_chunk)
    bench.close()
    return [
        Case("disk-metadata", "us", "open, preadv, close", goal="<= 60 us").row(loaded, read),
        Case("disk-metadata-store", "us", "open, pwritev, close").row(stored, wrote),
    ]


def durability_rows(make: Callable[..., Bench]) -> list[Row]:
    """What each setting costs a store of chunks of 2 MiB."""
    rows = []
    for durability in Durability:
        bench = make(2 << 20, 32, durability)
        ours, theirs = alternate(5, rate(bench.nbytes, bench.store, bench.delete), rate(bench.nbytes, bench.raw_store))
        bench.close()
        rows.append(
            Case(f"disk-durability-{durability.value}", "GB/s", "pwritev, not synced", "higher").row(ours, theirs)
        )
    return rows


def scan_rows(root: Path) -> list[Row]:
    """The look through 100,000 records after a kill, inodes cold where we may drop them; beside a bare walk."""
    count = 100_000
    make_names(root, count)

    def ours() -> float:
        drop_inodes()
        return asyncio.run(look_through(root, count))

    def walk() -> float:
        drop_inodes()
        return seconds(lambda: [entry.stat() for entry in walked(str(root))])

    found, bare = alternate(3, ours, walk)
    shutil.rmtree(root)
    return [Case("disk-scan-100k", "s", "scandir and stat", goal="<= 5 s").row(found, bare)]


async def look_through(root: Path, count: int) -> float:
    tier = await open_disk(DiskOptions(directories=(str(root),), limit_nbytes=1 << 50, min_free_nbytes=0))
    await tier.looked_through()
    figures = tier.figures()
    assert figures.records == count
    await tier.aclose()
    (root / "order").unlink()
    return figures.scan_s


def make_names(root: Path, count: int) -> None:
    """Files with names of records and no content; the epochs of an empty directory."""
    asyncio.run(look_through_empty(root))
    for number in range(count):
        name = xxhash.xxh3_128_hexdigest(number.to_bytes(4, "big")) * 2
        path = root / ("00" * 16) / name[:2]
        with suppress(FileExistsError):
            path.mkdir(parents=True)
        fd = os.open(path / name, os.O_WRONLY | os.O_CREAT, 0o600)
        os.ftruncate(fd, 8192)
        os.close(fd)


async def look_through_empty(root: Path) -> None:
    tier = await open_disk(DiskOptions(directories=(str(root),), limit_nbytes=1 << 50, min_free_nbytes=0))
    await tier.looked_through()
    await tier.aclose()
    (root / "order").unlink()


def walked(path: str) -> list[os.DirEntry[str]]:
    found: list[os.DirEntry[str]] = []
    for entry in os.scandir(path):
        if entry.is_dir():
            found += walked(entry.path)
        else:
            found.append(entry)
    return found


def drop_inodes() -> None:
    with suppress(OSError):
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("2")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--dir", type=Path, help="where to write (default: the temporary directory)")
    arguments.add_argument("--only", nargs="*", default=[], help="names of cases, or their beginnings")
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=given.dir, prefix="kvkeep-bench-") as directory:
        numbers = iter(range(1000))

        def make(nbytes: int, count: int, durability: Durability = Durability.NONE, direct: bool = True) -> Bench:
            return Bench(Path(directory) / str(next(numbers)), nbytes, count, durability, direct)

        groups: dict[str, Callable[[], list[Row]]] = {
            "32m": lambda: transfers(make, "32m", 32 << 20, 8, 7, ">= 0.95"),
            "2m": lambda: transfers(make, "2m", 2 << 20, 128, 7, ">= 0.95"),
            "256k": lambda: transfers(make, "256k", 256 << 10, 512, 7, ">= 0.70"),
            "verify": lambda: verify_rows(make),
            "metadata": lambda: metadata_rows(make),
            "durability": lambda: durability_rows(make),
            "scan": lambda: scan_rows(Path(directory) / "scan"),
        }
        rows: list[Row] = []
        for name, run in groups.items():
            if not given.only or name in given.only:
                say(f"{name} ...")
                rows += run()
    show(rows, "The disk tier beside bare system calls")
    write(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())
