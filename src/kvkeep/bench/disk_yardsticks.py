"""Makes what `kvkeep bench disk` times: the disk tier, bare system calls on the same files, fio.

Each measure returns seconds or GB/s. Knows nothing about how rows are shown.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

from kvkeep.bench.rows import seconds
from kvkeep.config import Disk, Durability
from kvkeep.core.units import ALIGN_NBYTES
from kvkeep.memory.region import Region
from kvkeep.tiers.aligned import aligned_bytes
from kvkeep.tiers.disk.disk import DiskTier, open_disk
from kvkeep.tiers.record import record_nbytes
from kvkeep.tiers.tier import Read, Stored, Write

READERS = 5
WRITERS = 4  # one thread of the tier never stores
RANGES = 16
LIMIT_S = 120.0


def chunk(memory: np.ndarray, number: int, nbytes: int) -> Write:
    """Chunk `number` of `nbytes` in a memory of such chunks."""
    sizes = (nbytes // RANGES,) * RANGES if nbytes >= RANGES * ALIGN_NBYTES else (nbytes,)
    payload = memory[number * nbytes : (number + 1) * nbytes]
    sums = [xxhash.xxh3_128_digest(payload[at : at + sizes[0]].data) for at in range(0, nbytes, sizes[0])]
    return Write(bytes(16) + xxhash.xxh3_128_digest(number.to_bytes(4, "big")) * 2, sizes, payload, b"".join(sums))


class DiskBench:
    """A tier in a directory of its own, `count` chunks of `nbytes`, and the loop that drives it."""

    def __init__(self, root: Path, nbytes: int, count: int, durability: Durability, direct: bool) -> None:
        self.root = root
        self.loop = asyncio.new_event_loop()
        options = Disk(
            path=(str(root),),
            size=64 << 30,
            threads=READERS,
            durability=durability,
            min_free=0,
            direct=direct,
        )
        self.tier: DiskTier = self.loop.run_until_complete(open_disk(options))
        self.loop.run_until_complete(self.tier.wait_for_scan())
        self.direct = self.tier.figures().direct
        self.region = Region.create(nbytes * count)  # what a pool is made of
        self.memory = self.region.array
        self.memory[:] = np.random.default_rng(1).integers(0, 256, self.memory.nbytes, np.uint8)
        self.writes = [chunk(self.memory, number, nbytes) for number in range(count)]
        self.reads = [Read(write.key, write.sizes, write.payload) for write in self.writes]
        self.record_nbytes = record_nbytes(self.writes[0].sizes)
        self.nbytes = count * self.record_nbytes
        self.headers = [aligned_bytes(self.record_nbytes - nbytes) for _ in range(count)]
        self.aside = root / "aside"
        self.aside.mkdir()
        self.readers, self.writers = ThreadPoolExecutor(READERS), ThreadPoolExecutor(WRITERS)

    def path(self, key: bytes) -> str:
        """Where the tier keeps a record."""
        return f"{self.root}/{key[:16].hex()}/{key[16:17].hex()}/{key[16:].hex()}"

    # ---- in seconds

    def store(self) -> float:
        """All chunks."""
        stored: list[Stored] = []
        elapsed = seconds(lambda: stored.extend(self.loop.run_until_complete(self.tier.store(self.writes))))
        assert stored == [Stored.STORED] * len(self.writes)
        return elapsed

    def load(self, cold: bool = True) -> float:
        """All chunks, verified."""
        if cold:
            self._cold()
        found: list[bytes | None] = []
        elapsed = seconds(lambda: found.extend(self.loop.run_until_complete(self.tier.load(self.reads))))
        assert None not in found
        return elapsed

    def delete(self) -> None:
        """All chunks."""
        self.loop.run_until_complete(self.tier.delete([write.key for write in self.writes]))

    def raw_load(self, cold: bool = True) -> float:
        """The same files by preadv, from as many threads."""
        if cold:
            self._cold()
        return seconds(lambda: list(self.readers.map(self.raw_read, range(len(self.writes)))))

    def raw_store(self) -> float:
        """As many bytes in as many new files by pwritev, from as many threads as store."""
        elapsed = seconds(lambda: list(self.writers.map(self._raw_write, range(len(self.writes)))))
        for file in self.aside.iterdir():
            file.unlink()
        return elapsed

    def raw_read(self, number: int) -> None:
        """One file by preadv."""
        fd = os.open(self.path(self.writes[number].key), os.O_RDONLY | (os.O_DIRECT if self.direct else 0))
        got = os.preadv(fd, [self.headers[number].data, self.reads[number].into.data], 0)
        assert got == self.record_nbytes
        os.close(fd)

    def _raw_write(self, number: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if self.direct else 0)
        fd = os.open(f"{self.aside}/{number}", flags, 0o600)
        put = os.pwritev(fd, [self.headers[number].data, self.writes[number].payload.data], 0)
        assert put == self.record_nbytes
        os.close(fd)

    def _cold(self) -> None:
        if self.direct:
            return
        for write in self.writes:
            fd = os.open(self.path(write.key), os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    # ---- in GB/s

    def fio(self, verb: str) -> float:
        """What fio says that it reads (the same files) or writes (new ones), one call a file, from as many threads."""
        jobs = READERS if verb == "read" else WRITERS
        everywhere = {
            "rw": verb,
            "ioengine": "psync",
            "direct": int(self.direct),
            "bs": self.record_nbytes,
            "file_service_type": "sequential",
            "create_on_open": int(verb == "write"),
            "fallocate": "none",
            "group_reporting": 1,
            "output-format": "json",
        }
        command = ["fio", "--thread", *(f"--{name}={value}" for name, value in everywhere.items())]
        for job in range(min(jobs, len(self.writes))):
            command += [f"--name=job{job}", *self._files_of(verb, range(job, len(self.writes), jobs))]
        done = subprocess.run(command, check=True, capture_output=True, cwd=self.aside, timeout=LIMIT_S)  # noqa: S603
        for file in self.aside.iterdir():
            file.unlink()
        return float(json.loads(done.stdout)["jobs"][0][verb]["bw_bytes"]) / 1e9

    def _files_of(self, verb: str, numbers: range) -> list[str]:
        if verb == "write":
            return [f"--nrfiles={len(numbers)}", f"--filesize={self.record_nbytes}"]
        for number in numbers:  # fio takes short lists of names
            os.link(self.path(self.writes[number].key), self.aside / str(number))
        return ["--filename=" + ":".join(map(str, numbers))]

    def close(self) -> None:
        """Ends the tier and removes its directory."""
        self.loop.run_until_complete(self.tier.aclose())
        self.loop.close()
        self.readers.shutdown()
        self.writers.shutdown()
        del self.memory, self.writes, self.reads
        self.region.close()
        shutil.rmtree(self.root)


def has_fio() -> bool:
    """Whether fio is installed."""
    return shutil.which("fio") is not None


def rate(nbytes: int, run: Callable[[], float], after: Callable[[], object] = lambda: None) -> Callable[[], float]:
    """GB/s of a run; `after` is not in it."""

    def measure() -> float:
        elapsed = run()
        after()
        return nbytes / elapsed / 1e9

    return measure
