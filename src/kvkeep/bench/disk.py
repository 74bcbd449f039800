"""Times the disk tier beside bare preadv and pwritev of the same bytes, and beside fio: `kvkeep bench disk`.

All use the same files, as many threads and O_DIRECT; every load of ours includes checksums. Where there is no O_DIRECT
the page cache is dropped file by file. Knows nothing about how rows are shown.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

from kvkeep.bench.disk_yardsticks import READERS, WRITERS, DiskBench, has_fio, rate
from kvkeep.bench.rows import Case, Row, alternate, say, seconds
from kvkeep.config import Durability
from kvkeep.tiers.record import first_bad_range

MOST_RUNS = 9
TINY = 4096
SMALL_COUNT = 512


class DiskSize(NamedTuple):
    """Chunks of one size: what they are called, how many, what is asked for."""

    name: str
    nbytes: int
    chunks: int
    goal: str


SIZES = (
    DiskSize("32m", 32 << 20, 8, ">= 0.95"),
    DiskSize("2m", 2 << 20, 128, ">= 0.95"),
    DiskSize("256k", 256 << 10, SMALL_COUNT, ">= 0.70"),
)


def disk_rows(runs: int) -> list[Row]:
    """All cases; takes 2 minutes and 1 GiB of the temporary directory ($TMPDIR)."""
    few = min(runs, MOST_RUNS)
    if not has_fio():
        say("fio is not installed: its rows are left out")
    with tempfile.TemporaryDirectory(prefix="kvkeep-bench-") as directory:
        make = DiskBenches(Path(directory))
        return [
            *[row for size in SIZES for row in transfer_rows(make, size, few)],
            *[row for size in SIZES[:2] for row in cached_rows(make, size, few)],
            *verify_rows(make, runs),
            *metadata_rows(make, few),
            *durability_rows(make, few),
        ]


class DiskBenches:
    """Makes sides, each in a directory of its own under `root`, which it makes too."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root = root
        self._numbers = count()

    @contextmanager
    def sides(
        self, nbytes: int, chunks: int, durability: Durability = Durability.NONE, direct: bool = True
    ) -> Iterator[DiskBench]:
        """DiskBench that are ended and removed."""
        sides = DiskBench(self._root / str(next(self._numbers)), nbytes, chunks, durability, direct=direct)
        try:
            yield sides
        finally:
            sides.close()


def transfer_rows(make: DiskBenches, size: DiskSize, runs: int) -> list[Row]:
    """Store and load of chunks of one size, past the page cache."""
    with make.sides(size.nbytes, size.chunks) as sides:
        say(f"disk, {size.name} ...")
        how = "O_DIRECT" if sides.direct else "buffered, cold"
        store, raw_store = rate(sides.nbytes, sides.store, sides.delete), rate(sides.nbytes, sides.raw_store)
        written = beside(runs, store, raw_store, lambda: sides.fio("write"))
        sides.store()
        load, raw_load = rate(sides.nbytes, sides.load), rate(sides.nbytes, sides.raw_load)
        read = beside(runs, load, raw_load, lambda: sides.fio("read"))
    made = []
    for verb, call, threads, values in (
        ("store", "pwritev", WRITERS, written),
        ("load", "preadv", READERS, read),
    ):
        case = Case(f"disk-{verb}-{size.name}", "GB/s", f"{call}, {how}, {threads} threads", "higher", goal=size.goal)
        made.append(case.row(values[0], values[1]))
        if len(values) > 2:
            fio = Case(f"disk-{verb}-{size.name}-vs-fio", "GB/s", f"fio, {how}, {threads} threads", "higher")
            made.append(fio.row(values[0], values[2]))
    return made


def beside(runs: int, *measures: Callable[[], float]) -> list[list[float]]:
    """The measures in turn, the last one only where fio is installed."""
    return alternate(runs, *measures) if has_fio() else alternate(runs, *measures[:-1])


def cached_rows(make: DiskBenches, size: DiskSize, runs: int) -> list[Row]:
    """Loads through the page cache that has it all."""
    with make.sides(size.nbytes, size.chunks, direct=False) as sides:
        sides.store()
        load, raw = rate(sides.nbytes, lambda: sides.load(False)), rate(sides.nbytes, lambda: sides.raw_load(False))
        loaded, read = alternate(runs, load, raw)
    return [Case(f"disk-load-{size.name}-cached", "GB/s", "preadv, page cache", "higher").row(loaded, read)]


def verify_rows(make: DiskBenches, runs: int) -> list[Row]:
    """What the checksums of a chunk of 32 MiB cost, beside reading it; one thread."""
    with make.sides(32 << 20, 4) as sides:
        sides.store()
        numbers = count()

        def verify() -> float:
            write = sides.writes[next(numbers) % 4]
            return seconds(lambda: first_bad_range(write.payload, write.sizes, write.sums)) * 1e3

        def read() -> float:
            return seconds(lambda: sides.raw_read(next(numbers) % 4)) * 1e3

        ours, theirs = alternate(runs, verify, read)
    return [Case("disk-verify-share", "ms", "preadv of the chunk", goal="<= 0.10").row(ours, theirs)]


def metadata_rows(make: DiskBenches, runs: int) -> list[Row]:
    """All that is not the transfer itself, a chunk: chunks of one page that are in the page cache, 512 a call."""
    with make.sides(TINY, SMALL_COUNT, direct=False) as sides:
        per_chunk = 1e6 / SMALL_COUNT

        def store() -> float:
            elapsed = sides.store()
            sides.delete()
            return elapsed * per_chunk

        stored, wrote = alternate(runs, store, lambda: sides.raw_store() * per_chunk)
        sides.store()
        loaded, read = alternate(runs, lambda: sides.load(False) * per_chunk, lambda: sides.raw_load(False) * per_chunk)
    return [
        Case("disk-metadata", "us", "open, preadv, close", goal="<= 60 us").row(loaded, read),
        Case("disk-metadata-store", "us", "open, pwritev, close").row(stored, wrote),
    ]


def durability_rows(make: DiskBenches, runs: int) -> list[Row]:
    """What each setting costs a store of chunks of 2 MiB."""
    rows = []
    for durability in Durability:
        with make.sides(2 << 20, 32, durability) as sides:
            store, raw = rate(sides.nbytes, sides.store, sides.delete), rate(sides.nbytes, sides.raw_store)
            ours, theirs = alternate(runs, store, raw)
        case = Case(f"disk-durability-{durability.value}", "GB/s", "pwritev, not synced", "higher")
        rows.append(case.row(ours, theirs))
    return rows
