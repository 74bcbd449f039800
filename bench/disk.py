"""The disk tier beside system calls and fio (`kvkeep bench disk`), beside LMCache's disk backend, and its start.

`OMP_NUM_THREADS=1 python bench/disk.py [--only NAME ...] [--json FILE]`, about 4 minutes and 1 GiB of $TMPDIR. Without
the environment of `scripts/peers.sh` LMCache's rows are left out.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import xxhash

from kvkeep.bench.disk import SIZES, DiskBenches, DiskSize, disk_rows
from kvkeep.bench.disk_yardsticks import READERS, WRITERS, rate
from kvkeep.bench.rows import Case, Row, alternate, run_groups, say, seconds
from kvkeep.config import Disk
from kvkeep.tiers.disk.disk import open_disk

HERE = Path(__file__).resolve().parent
PEER = HERE.parent / "build" / "peer-venv" / "bin" / "python"
RUNS = 7
RECORDS = 100_000


# ---- LMCache


def lmcache_rows() -> list[Row]:
    """Store and load of the same chunks by its local disk backend: O_DIRECT on both sides, A B A B."""
    if not PEER.exists():
        say(f"no LMCache at {PEER}: its rows are left out (bash scripts/peers.sh makes it)")
        return []
    with tempfile.TemporaryDirectory(prefix="kvkeep-bench-") as directory:
        return [row for size in SIZES[:2] for row in size_rows(DiskBenches(Path(directory) / size.name), size)]


def size_rows(make: DiskBenches, size: DiskSize) -> list[Row]:
    """Both verbs for chunks of one size."""
    with make.sides(size.nbytes, size.chunks) as sides, peer(sides.aside, size) as tell:
        nbytes = size.nbytes * size.chunks
        stored = alternate(
            RUNS,
            rate(nbytes, sides.store, sides.delete),
            rate(nbytes, lambda: tell("store"), lambda: tell("delete")),
        )
        sides.store()
        tell("store")
        loaded = alternate(RUNS, rate(nbytes, sides.load), rate(nbytes, lambda: tell("load")))
    how = f"O_DIRECT, no checksums; ours {{}} threads, its {WRITERS}"
    return [
        Case(f"disk-{verb}-{size.name}-vs-lmcache", "GB/s", f"LMCache 0.5.6, {how.format(threads)}", "higher").row(
            *values
        )
        for verb, threads, values in (("store", WRITERS, stored), ("load", READERS, loaded))
    ]


class Tell:
    """A running `disk_peer.py`: what each verb took (seconds)."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._answer()

    def __call__(self, verb: str) -> float:
        into: IO[str] | None = self._process.stdin
        assert into is not None
        into.write(verb + "\n")
        into.flush()
        return float(self._answer())

    def _answer(self) -> str | float:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit("LMCache's side ended")
        answer: str | float = json.loads(line)
        return answer


@contextmanager
def peer(folder: Path, size: DiskSize) -> Iterator[Tell]:
    """LMCache's side over a folder, ended with the block."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "LMCACHE_TRACK_USAGE": "false", "LMCACHE_LOG_LEVEL": "ERROR"}
    command = [str(PEER), str(HERE / "disk_peer.py"), str(folder), str(size.nbytes >> 20), str(size.chunks)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        try:
            yield Tell(process)
        finally:
            process.kill()


# ---- the start


def scan_rows() -> list[Row]:
    """The look through 100,000 records after a kill, inodes cold where we may drop them; beside a bare walk."""
    with tempfile.TemporaryDirectory(prefix="kvkeep-bench-") as directory:
        root = Path(directory) / "scan"
        make_names(root, RECORDS)

        def ours() -> float:
            drop_inodes()
            return asyncio.run(look_through(root, RECORDS))

        def walk() -> float:
            drop_inodes()
            return seconds(lambda: [entry.stat() for entry in walked(str(root))])

        found, bare = alternate(3, ours, walk)
    return [Case("disk-scan-100k", "s", "scandir and stat", goal="<= 5 s").row(found, bare)]


async def look_through(root: Path, records: int) -> float:
    tier = await open_disk(Disk(path=(str(root),), size=1 << 50, min_free=0))
    await tier.wait_for_scan()
    figures = tier.figures()
    assert figures.records == records
    await tier.aclose()
    (root / "order").unlink()
    return figures.scan_s


def make_names(root: Path, count: int) -> None:
    """Files with names of records and no content; the epochs of an empty directory."""
    asyncio.run(look_through(root, 0))
    for number in range(count):
        name = xxhash.xxh3_128_hexdigest(number.to_bytes(4, "big")) * 2
        path = root / ("00" * 16) / name[:2]
        with suppress(FileExistsError):
            path.mkdir(parents=True)
        fd = os.open(path / name, os.O_WRONLY | os.O_CREAT, 0o600)
        os.ftruncate(fd, 8192)
        os.close(fd)


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


GROUPS = {"disk": lambda: disk_rows(RUNS), "lmcache": lmcache_rows, "scan": scan_rows}

if __name__ == "__main__":
    run_groups(GROUPS, "The disk tier", __doc__)
